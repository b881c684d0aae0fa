"""Files on disk -> students. Reading never executes code; every message is one line with a remedy."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...memory.fields import quoted
from ..config import CARD_KEY, PUBLISHED_SIZES, StudentCard, WanConfig
from ..wan import WanModel
from .containers import DTYPE_NAMES, SAFETENSORS, Container, open_container, write_safetensors
from .float8 import scaled
from .layouts import Named, commit_name, name_tensors
from .lora import Lora, parse_lora, read_lora
from .published import DEFAULT, KNOWN, CardChoice, choose_card, override, published_student, transformer_config

log = logging.getLogger("context_forcing")

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_STUDENT = ASSETS / "demo_student.safetensors"
Net = TypeVar("Net", bound=nn.Module)

WEIGHTS = ("auto", "generator", "generator_ema")
CHARACTERISTIC = {
    "patch_embedding.weight": 5,
    "head.modulation": 3,
    **{f"{name}.weight": 2 for name in ("head.head", "blocks.0.ffn.0", "text_embedding.0", "time_embedding.0")},
}
"""Tensors that every Wan 2.1 network has, with their number of dims."""


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

    @classmethod
    def parse(
        cls,
        path: str | Path | None,
        weights: str = "auto",
        card: str = "auto",
        settings: Iterable[str] = (),
        loras: Iterable[str] = (),
    ) -> "StudentSource":
        """A student from texts: `key=value`, several with spaces between, and `FILE:strength`. Raises ValueError."""
        overrides = tuple(part for text in settings for part in re.split(r"\s+(?=[\w.]+=)", text))
        return cls(path, weights=weights, card=card, overrides=overrides, loras=tuple(map(parse_lora, loras)))

    def open(self) -> "StudentFile":
        """The student, checked; its weights stay on disk. Raises ValueError, one line."""
        student = StudentFile(self)
        student.check()
        return student


@dataclass(frozen=True)
class StudentFile:
    """A student of any published layout. Its cached properties are the stages of reading, in order.

    A stage runs once, when it is first used. It raises ValueError, one line, for a file that it cannot read.
    """

    source: StudentSource

    @cached_property
    def container(self) -> Container:
        path = Path(self.source.path or DEMO_STUDENT)
        if not path.exists():
            raise ValueError(f"{path}: no such file; {KNOWN}")
        return open_container(path)

    @cached_property
    def weights(self) -> tuple[str, dict[str, Tensor]]:
        """The network's tensors, and the name of the set that holds them; empty for a flat file."""
        weights, card, container = self.source.weights, self.source.card, self.container
        if weights not in WEIGHTS:
            raise ValueError(f"weights: {quoted(weights)} is not one of {', '.join(WEIGHTS)}")
        first = published_student(DEFAULT if card == "auto" else card).weights if weights == "auto" else weights
        name, state = container.take((first, "generator_ema", "generator", "model", "state_dict"))
        if weights not in ("auto", *name.split(".")):
            sets = ", ".join(container.sets) or "one set of weights"
            raise ValueError(f"{container.path}: holds {sets}, no {weights}; leave weights at auto")
        return name, state

    @cached_property
    def named(self) -> Named:
        return name_tensors(self.weights[1], self.container.metadata, self.container.path)

    @cached_property
    def config(self) -> WanConfig:
        """The sizes of the network."""
        metadata, config = transformer_config(self.container.metadata), self.container.config
        values = metadata.get("num_heads"), config.get("num_attention_heads"), config.get("num_heads")
        num_heads = next((value for value in values if value is not None), None)
        if num_heads is not None and (type(num_heads) is not int or num_heads < 1):
            raise ValueError(f"{self.container.path}: num_heads: {quoted(num_heads)} is not a number of heads")
        return infer_config(self.named.tensors, num_heads, self.container.path)

    @cached_property
    def own_card(self) -> StudentCard | None:
        """The card in the file's metadata."""
        try:
            text = self.container.metadata.get(CARD_KEY)
            return None if text is None else StudentCard.from_json(text)
        except ValueError as error:
            raise ValueError(f"{self.container.path}: {error}") from None

    @cached_property
    def card_choice(self) -> CardChoice:
        """The card, and why it is this one."""
        if self.source.card == "auto" and self.own_card:
            choice = CardChoice(card=self.own_card, reason="the card in its metadata")
        else:
            has_commit = bool(self.named.commit)
            choice = choose_card(self.container, self.weights[0], self.source.card, self.config, has_commit)
        return dataclasses.replace(choice, card=override(choice.card, self.source.overrides))

    @cached_property
    def loras(self) -> tuple[Lora, ...]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.named.tensors.items()}
        return tuple(read_lora(file, shapes, strength) for file, strength in self.source.loras)

    def check(self) -> None:
        """Run all stages. Raises ValueError unless the network is complete."""
        with torch.device("meta"):
            net = WanModel(self.config)
        check_tensors(net, self.named.tensors, self.container.path)
        if self.named.commit:
            check_tensors(net, self.named.commit, f"{self.container.path}: weights for the commit pass (memory_*)")
        for name, tensor in self.stored.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(f"{self.container.path}: {name} is {tensor.dtype}; weights are floats of 8 to 64 bits")
        _ = self.card_choice, self.loras

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
        is_wan = self.named.layout == "Wan" and not (self.named.removed or self.loras or self.named.commit)
        num_heads = transformer_config(self.container.metadata).get("num_heads", self.config.dim // 128)
        return is_file and is_wan and num_heads == self.config.num_heads

    @property
    def unmerged(self) -> Mapping[str, Tensor]:
        """The weights without LoRAs, for the fingerprint; empty if there are no LoRAs."""
        return self.named.tensors if self.loras else {}

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        """All weights under Wan's names, as stored; those of the commit pass under `commit_name`."""
        return self.named.tensors | {commit_name(name): tensor for name, tensor in self.named.commit.items()}

    def tensor(self, name: str) -> Tensor:
        """One of `stored`: as it is, or in float32 where it is scaled or a LoRA changes it."""
        tensor = scaled(self.stored[name], self.named.scales.get(name))
        for lora in self.loras:
            tensor = lora.add(name, tensor)
        return tensor

    def dtype_of(self, name: str) -> torch.dtype:
        """The default dtype of a weight in a new file: as stored, but bfloat16 for a changed float8 one."""
        stored = self.stored[name].dtype
        is_changed = name in self.named.scales or any(lora.changes(name) for lora in self.loras)
        return torch.bfloat16 if is_changed and stored.itemsize == 1 else stored

    def load(self, dtype: torch.dtype = torch.float32) -> WanModel:
        """The network on the CPU, ready to run; logs `note`."""
        if self.note:
            log.warning("%s", self.note)
        return self._build({name: self.tensor(name).to(dtype) for name in self.named.tensors})

    def load_commit(self, dtype: torch.dtype = torch.float32) -> WanModel | None:
        """The network of the commit pass on the CPU; None if it is that of denoising. LoRAs do not change it."""
        if not self.named.commit:
            return None
        return self._build({name: tensor.to(dtype) for name, tensor in self.named.commit.items()})

    def _build(self, state: Mapping[str, Tensor]) -> WanModel:
        return build(lambda: WanModel(self.config), state, self.container.path)


def infer_config(state: Mapping[str, Tensor], num_heads: int | None, path: str | Path) -> WanConfig:
    """Sizes of the network with this state dict. Raises ValueError if it is not a Wan 2.1 text-to-video model."""
    for key, ndim in CHARACTERISTIC.items():
        if key not in state:
            raise ValueError(f"{path}: not a Wan 2.1 model, {key} is missing; {KNOWN}")
        if state[key].ndim != ndim:
            raise ValueError(f"{path}: not a Wan 2.1 model, {key} has shape {tuple(state[key].shape)}; {KNOWN}")
    dim, channels = state["patch_embedding.weight"].shape[:2]
    last = max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key))
    if last >= len(state):
        raise ValueError(f"{path}: has block {last}, but only {len(state)} tensors; download it again")
    try:
        config = WanConfig(
            dim=dim,
            ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
            num_heads=num_heads or max(1, dim // 128),
            num_layers=last + 1,
            channels=channels,
            freq_dim=state["time_embedding.0.weight"].shape[1],
            text_dim=state["text_embedding.0.weight"].shape[1],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, sizes in PUBLISHED_SIZES.items():
        if sizes.dim == dim and sizes != config:
            size = next(f.name for f in dataclasses.fields(sizes) if getattr(sizes, f.name) != getattr(config, f.name))
            raise ValueError(
                f"{path}: {size} is {getattr(config, size)}, {name} has {getattr(sizes, size)}; a part is missing, or"
                " it is another model"
            )
    return config


def build(make: Callable[[], Net], state: Mapping[str, Tensor], path: str | Path) -> Net:
    """A frozen network with these tensors; `make` runs on the meta device. Raises ValueError as `check_tensors`."""
    with torch.device("meta"):
        net = make()
    check_tensors(net, state, path)
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def check_tensors(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, one line, unless the names and shapes are exactly the network's."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(
            f"{path}: {len(wrong)} of {len(expected)} tensors missing, extra or of another shape, first {wrong[0]}"
            f" (expected {expected.get(wrong[0])}, found {found.get(wrong[0])}); give a complete file of this model"
        )
