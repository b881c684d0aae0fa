"""What travels on our wires, and the card on a MODEL."""

import logging
from typing import NamedTuple

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..memory.memory import Memory
from ..model.checkpoint import fingerprint
from ..model.config import StudentCard

log = logging.getLogger("context_forcing")

CATEGORY = "Context Forcing"
CARD = "context_forcing_card"

MemoryType = io.Custom("CF_MEMORY")
"""An `OnWire`: immutable, so ComfyUI may cache it, hand it to two nodes and run a node again on it."""


class OnWire(NamedTuple):
    """A memory as it rests on a wire, between two nodes.

    ComfyUI's cache weighs CPU tensors that it finds in tuples. `tensors` are those that this memory does not share with
    the one it continues: all wires of a chain together weigh what they really hold.
    """

    memory: Memory
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, memory: Memory, before: Memory | None = None) -> "OnWire":
        shared = {id(tensor) for tensor in before.tensors()} if before else set()
        return cls(memory, tuple(tensor for tensor in memory.tensors() if id(tensor) not in shared))


def as_image(picture: Image.Image) -> torch.Tensor:
    """A drawn picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def card_of(model) -> StudentCard:
    """The student card on a MODEL; one without is taken for a Wan 2.1 student of the Self-Forcing family."""
    card = model.get_attachment(CARD)
    if card is None:
        card = StudentCard()
        log.warning(
            "this MODEL carries no student card: using steps %s, shift %g, chunk %d (Self-Forcing's)",
            [int(step) for step in card.steps], card.shift, card.memory.chunk,
        )  # fmt: skip
    return card


def wan_network(model):
    """The module tree of a MODEL. Raises ValueError, by name, for what is not Wan 2.1 text-to-video."""
    net = model.model.diffusion_model
    name = type(model.model).__name__
    parts = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
    if not all(hasattr(net, part) for part in parts):
        raise ValueError(f"model: {name} is not a Wan model; load a Wan 2.1 text-to-video student")
    if net.patch_embedding.weight.shape[1] != 16 or hasattr(net, "img_emb") and net.img_emb is not None:
        raise ValueError(f"model: {name} is not Wan 2.1 text-to-video (16 channels); this model cannot be rolled out")
    return net


def student_of(model) -> str:
    """Fingerprint of the weights on disk, whatever LoRAs are patched in: a memory may be continued with another LoRA."""
    return fingerprint(
        wan_network(model),
        {
            name.removeprefix("diffusion_model."): backup.weight
            for name, backup in model.backup.items()
            if name.startswith("diffusion_model.")
        },
    )
