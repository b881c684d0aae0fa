"""Files on disk -> students. Reading never executes code; every message is one line with a remedy."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import CARD_KEY, PUBLISHED_SIZES, StudentCard, WanConfig
from ..wan import WanModel
from .containers import NESTED, SAFETENSORS, STORED_AS, Container, open_container, write_safetensors
from .layouts import Named, name_tensors
from .lora import Lora, read_lora
from .published import DEFAULT, CardChoice, card_in, choose_card, override, published_student

log = logging.getLogger("context_forcing")

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_STUDENT = ASSETS / "demo_student.safetensors"
WEIGHTS = ("auto", "generator", "generator_ema")


def write_student(path: str | Path, state: Mapping[str, Tensor], num_heads: int, card: StudentCard) -> None:
    """Write a student with its card, in Wan's layout. ComfyUI's UNETLoader reads the file too."""
    kept = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(Path(path), kept, state.__getitem__, student_metadata(num_heads, card))


def student_metadata(num_heads: int, card: StudentCard) -> dict[str, str]:
    """The card, and what ComfyUI cannot infer from shapes: heads other than dim / 128, and that it is causal."""
    transformer = {"num_heads": num_heads, "causal_ar": True}
    return {CARD_KEY: card.to_json(), "config": json.dumps({"transformer": transformer})}


@dataclass(frozen=True)
class StudentSource:
    """Where a student comes from and how it is read."""

    path: str | Path | None = None
    """A file or folder of any published layout; None is the built-in student."""
    _: KW_ONLY
    weights: str = "auto"
    """Which of two sets of weights in a training checkpoint: `generator`, `generator_ema`, or `auto`."""
    card: str = "auto"
    """The name of a published student, or `auto`: the card in the file."""
    overrides: tuple[str, ...] = ()
    """Fields of the card to replace, each `key=value`."""
    loras: tuple[tuple[Path, float], ...] = ()
    """LoRA files to merge, each with its strength."""

    def open(self) -> "StudentFile":
        """The student, checked; its weights stay on disk.

        Raises ValueError, one line, unless it is a complete Wan 2.1 text-to-video network.
        """
        student = StudentFile(self)
        student.check()
        return student


@dataclass(frozen=True)
class StudentFile:
    """A student of any published layout. Each property is a stage of reading; it runs once, when first used.

    Each stage raises ValueError, one line, for a file that it cannot read.
    """

    source: StudentSource

    @cached_property
    def container(self) -> Container:
        """Stage 1: the tensors in the file, as stored."""
        return open_container(self.source.path or DEMO_STUDENT)

    @cached_property
    def weights(self) -> tuple[str, dict[str, Tensor]]:
        """Stage 2: the network's tensors, and the name of the dict that holds them; empty for a flat file."""
        weights, card, container = self.source.weights, self.source.card, self.container
        if weights not in WEIGHTS:
            raise ValueError(f"weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
        first = published_student(DEFAULT if card == "auto" else card).weights if weights == "auto" else weights
        name, state = container.take((first, *(name for name in NESTED if name != first)))
        if weights not in ("auto", *name.split(".")):
            held = f"holds {', '.join(container.held)}" if container.held else "holds one set of weights"
            raise ValueError(f"{container.path}: {held}, no {weights}; leave weights at auto")
        return name, state

    @cached_property
    def named(self) -> Named:
        """Stage 3: the tensors under Wan's names."""
        return name_tensors(self.weights[1], self.container.metadata, self.container.path)

    @cached_property
    def config(self) -> WanConfig:
        """Stage 4: the sizes of the network."""
        return infer_config(self.named.tensors, num_heads_of(self.container), self.container.path)

    def check(self) -> None:
        """Run all stages."""
        path = self.container.path
        with torch.device("meta"):
            net = WanModel(self.config)
        check_tensors(net, self.named.tensors, path)
        for name, tensor in self.named.tensors.items():
            if tensor.dtype not in STORED_AS:
                raise ValueError(f"{path}: {name} is {tensor.dtype}; weights are floats of 8 to 64 bits")
        _ = self.card_choice, self.loras

    @cached_property
    def own_card(self) -> StudentCard | None:
        """The card in the file's metadata."""
        return card_in(self.container.metadata, self.container.path)

    @cached_property
    def card_choice(self) -> CardChoice:
        """Stage 5: the card, and why it is this one."""
        if self.source.card == "auto" and self.own_card:
            choice = CardChoice(card=self.own_card, reason="the card in its metadata")
        else:
            choice = choose_card(self.container, self.weights[0], self.source.card, self.config)
        return dataclasses.replace(choice, card=override(choice.card, self.source.overrides))

    @cached_property
    def loras(self) -> tuple[Lora, ...]:
        """Stage 6: the LoRAs to merge."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.named.tensors.items()}
        return tuple(read_lora(file, shapes, strength) for file, strength in self.source.loras)

    @property
    def card(self) -> StudentCard:
        return self.card_choice.card

    @property
    def note(self) -> str:
        """What a user should read before relying on the card; empty if the file has one."""
        return self.card_choice.note

    @property
    def is_plain(self) -> bool:
        """Whether ComfyUI can read the file itself: one safetensors file with Wan's names, and heads it can infer."""
        is_file = self.container.kind == "safetensors" and self.container.path.suffix.lower() in SAFETENSORS
        is_wan = self.named.layout == "Wan" and not self.named.removed and not self.loras
        num_heads = metadata_num_heads(self.container.metadata) or self.config.dim // 128
        return is_file and is_wan and num_heads == self.config.num_heads

    @property
    def unmerged(self) -> Mapping[str, Tensor]:
        """Weights that LoRAs change, without them; the fingerprint is taken of these. Empty without LoRAs."""
        return self.named.tensors if self.loras else {}

    def tensor(self, name: str) -> Tensor:
        """A weight under Wan's name: as stored or, where it is scaled or a LoRA changes it, in float32."""
        tensor = self.named.tensors[name]
        if name in self.named.scales:
            scale = self.named.scales[name].float()
            tensor = tensor.float() * (scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (tensor.ndim - 1)))
        for lora in self.loras:
            if lora.changes(name):
                tensor = lora.add(name, tensor)
        return tensor

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype a weight is written in by default: as stored, but bfloat16 for a changed float8 one."""
        stored = self.named.tensors[name].dtype
        changed = name in self.named.scales or any(lora.changes(name) for lora in self.loras)
        return torch.bfloat16 if changed and stored.itemsize == 1 else stored

    def load(self, dtype: torch.dtype = torch.float32) -> WanModel:
        """The network on the CPU, ready to run; logs `note`."""
        if self.note:
            log.warning("%s", self.note)
        with torch.device("meta"):
            net = WanModel(self.config)
        state = {name: self.tensor(name).to(dtype) for name in self.named.tensors}
        net.load_state_dict(state, strict=True, assign=True)
        return net.eval().requires_grad_(False)


def num_heads_of(container: Container) -> int | None:
    """Heads as the file or the folder it is in tell them. Raises ValueError for nonsense."""
    try:
        told = metadata_num_heads(container.metadata)
    except ValueError as error:
        raise ValueError(f"{container.path}: {error}") from None
    for key in ("num_attention_heads", "num_heads"):
        beside = container.config.get(key)
        if told is None and type(beside) is int and beside > 0:
            told = beside
    return told


def infer_config(state: Mapping[str, Tensor], num_heads: int | None, path: str | Path) -> WanConfig:
    """Sizes of the network whose state dict this is. Raises ValueError when it is not a Wan 2.1 text-to-video model."""
    needed = ("patch_embedding.weight", "head.modulation", "head.head.weight", "blocks.0.ffn.0.weight",
              "text_embedding.0.weight", "time_embedding.0.weight")  # fmt: skip
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"{path}: not a Wan 2.1 model, {missing[0]} is missing; give a student's weights")
    for key in needed:
        if key != "head.modulation" and state[key].ndim != (5 if key == needed[0] else 2):
            raise ValueError(f"{path}: not a Wan 2.1 model, {key} has shape {tuple(state[key].shape)}")
    dim, channels = state["patch_embedding.weight"].shape[:2]
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.") and key.split(".")[1].isdecimal()}
    if max(layers) >= len(state):
        raise ValueError(f"{path}: has a block {max(layers)} and {len(state)} tensors in all; not a whole network")
    try:
        found = WanConfig(
            dim=dim,
            ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
            num_heads=num_heads or max(1, dim // 128),
            num_layers=max(layers) + 1,
            channels=channels,
            freq_dim=state["time_embedding.0.weight"].shape[1],
            text_dim=state["text_embedding.0.weight"].shape[1],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, preset in PUBLISHED_SIZES.items():
        if preset.dim == dim and preset != found:
            sizes = (f.name for f in dataclasses.fields(preset))
            wrong = next(size for size in sizes if getattr(preset, size) != getattr(found, size))
            raise ValueError(
                f"{path}: {name} by its width, but its {wrong} is {getattr(found, wrong)} in place of"
                f" {getattr(preset, wrong)}; a part is missing or it is another model"
            )
    return found


def check_tensors(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, one line, unless the names and shapes are exactly the network's."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(
            f"{path}: {len(wrong)} of {len(expected)} tensors missing, extra or of another shape, first {wrong[0]}"
            f" (expected {expected.get(wrong[0])}, found {found.get(wrong[0])})"
        )


def metadata_num_heads(metadata: Mapping[str, str]) -> int | None:
    """Heads as ComfyUI's `config` metadata gives them, or None where it does not. Raises ValueError for nonsense."""
    try:
        num_heads = json.loads(metadata.get("config", "{}")).get("transformer", {}).get("num_heads")
    except (json.JSONDecodeError, AttributeError, RecursionError):
        return None
    if num_heads is not None and (type(num_heads) is not int or num_heads < 1):
        raise ValueError(f"num_heads: {num_heads!r} in the metadata is not a number of heads")
    return num_heads
