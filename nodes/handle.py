"""What travels on our wires, and the card on a MODEL."""

from typing import NamedTuple

import numpy as np
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from PIL import Image

from ..memory.memory import Memory
from ..model.config import StudentCard
from ..model.fingerprint import COMPILED, fingerprint
from .patches import log, shifted

CATEGORY = "Context Forcing"
CARD = "context_forcing_card"
CHANNELS = 16

MemoryType = io.Custom("CF_MEMORY")
"""An `OnWire`: immutable, so ComfyUI may cache it, hand it to two nodes and run a node again on it."""


class MemoryHandle(NamedTuple):
    """A memory as it rests on a wire, between two nodes.

    ComfyUI's cache weighs CPU tensors that it finds in tuples. `tensors` are those that this memory does not share with
    the one it continues: all wires of a chain together weigh what they really hold.
    """

    memory: Memory
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, memory: Memory, before: Memory | None = None) -> "MemoryHandle":
        shared = {id(tensor) for tensor in before.tensors()} if before else set()
        return cls(memory, tuple(tensor for tensor in memory.tensors() if id(tensor) not in shared))


def as_image(picture: Image.Image) -> torch.Tensor:
    """A drawn picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def card_of(model) -> StudentCard:
    """The student card on a MODEL; one without is taken for a Wan 2.1 student of the Self-Forcing family.

    Raises ValueError, by name, for what is not Wan 2.1 text-to-video.
    """
    wan_network(model)
    card = model.get_attachment(CARD)
    if card is None:
        card = StudentCard()
        log.warning(
            "this MODEL carries no student card: using steps %s, shift %g, chunk %d (Self-Forcing's); Student Settings"
            " changes them", [int(step) for step in card.steps], card.shift, card.memory.chunk,
        )  # fmt: skip
    return shifted(card, model)


TEXT_TO_VIDEO = ("WAN21", "WAN21_CausalAR")
"""ComfyUI's classes for Wan 2.1 without any input but text. Those of its relatives have other layers besides."""


def wan_network(model):
    """The module tree of a MODEL. Raises ValueError, by name, for what is not Wan 2.1 text-to-video."""
    net, name = model.model.diffusion_model, type(model.model).__name__
    remedy = "load a Wan 2.1 text-to-video student, for example with Load Student"
    if name not in TEXT_TO_VIDEO:
        raise ValueError(f"model: {name} is not Wan 2.1 text-to-video; {remedy}")
    channels = net.patch_embedding.in_channels
    if channels != CHANNELS or net.img_emb is not None:
        pictures = " and picture embeddings" if net.img_emb is not None else ""
        raise ValueError(
            f"model: {name} with {channels} input channels{pictures} is made for other inputs than text (text-to-video"
            f" has {CHANNELS} channels); {remedy}"
        )
    return net


def student_of(model) -> str:
    """Fingerprint of the weights on disk, whatever LoRAs are patched in: a memory may be continued with another LoRA.

    ComfyUI either changes weights and keeps the old ones in `backup`, or leaves them and applies LoRAs as they are
    used. Of quantised weights the stored numbers count: they have the signs of the real ones, and need no unpacking.
    """
    net = wan_network(model)
    backups = {name.removeprefix("diffusion_model."): backup.weight for name, backup in model.backup.items()}
    stored = {name.replace(COMPILED, ""): weight for name, weight in [*net.named_parameters(), *backups.items()]}
    return fingerprint(
        net, {name: weight._qdata if isinstance(weight, QuantizedTensor) else weight for name, weight in stored.items()}
    )
