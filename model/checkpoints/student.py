"""Files on disk -> networks ready to run. Reading never executes code; every refusal is one line with a remedy."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import CARD_KEY, PRESETS, StudentCard, WanConfig
from ..wan import WanModel
from .containers import NESTED, SAFETENSORS, STORED_AS, Container, open_container, write_safetensors
from .layouts import Named, name_tensors
from .lora import Lora, read_lora
from .published import DEFAULT, CardChoice, card_in, choose_card, override, published_student

log = logging.getLogger("context_forcing")

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_STUDENT = ASSETS / "demo_student.safetensors"


def save_student(path: str | Path, net: nn.Module, card: StudentCard) -> None:
    """A student in Wan's layout with its card; ComfyUI's UNETLoader reads it too."""
    write_student(path, net.state_dict(), net.blocks[0].self_attn.num_heads, card)


def write_student(path: str | Path, state: Mapping[str, Tensor], num_heads: int, card: StudentCard) -> None:
    """The same from a state dict."""
    kept = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(Path(path), kept, state.__getitem__, student_metadata(num_heads, card))


def student_metadata(num_heads: int, card: StudentCard) -> dict[str, str]:
    """The card, and what ComfyUI cannot guess from shapes: heads other than dim / 128, and that it is causal."""
    transformer = {"num_heads": num_heads, "causal_ar": True}
    return {CARD_KEY: card.to_json(), "config": json.dumps({"transformer": transformer})}


@dataclass(frozen=True, kw_only=True)
class StudentFile:
    """A student of any published layout, checked to be whole, its weights still on disk."""

    container: Container
    taken: str
    """Which of the file's dicts the weights are in; empty for a flat file."""
    named: Named
    config: WanConfig
    card_choice: CardChoice
    loras: tuple[Lora, ...] = ()

    @property
    def card(self) -> StudentCard:
        return self.card_choice.card

    @property
    def is_plain(self) -> bool:
        """Whether ComfyUI reads it as it is: one safetensors file in Wan's names, heads where it looks for them."""
        single = self.container.kind == "safetensors" and self.container.path.suffix.lower() in SAFETENSORS
        told = metadata_num_heads(self.container.metadata) or self.config.dim // 128
        plain = single and self.named.layout == "Wan" and not self.named.removed and not self.loras
        return plain and told == self.config.num_heads

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
        """What a weight is kept in when nothing else is asked for: as stored, but bfloat16 for changed float8 ones."""
        stored = self.named.tensors[name].dtype
        changed = name in self.named.scales or any(lora.changes(name) for lora in self.loras)
        return torch.bfloat16 if changed and stored.itemsize == 1 else stored


def open_student(
    path: str | Path | None = None,
    *,
    weights: str = "auto",
    card: str = "auto",
    overrides: Sequence[str] = (),
    loras: Sequence[tuple[Path, float]] = (),
) -> StudentFile:
    """A student file or folder of any published layout; None is the built-in one.

    `weights` is auto, generator or generator_ema: which of two sets a training checkpoint holds. `card` is auto or the
    name of a published student, `overrides` are `key=value` of its fields, `loras` (file, strength) to merge.
    Raises ValueError, one line, for what is not a whole Wan 2.1 text-to-video network.
    """
    container = open_container(path or DEMO_STUDENT)
    taken, state = take_weights(container, weights, card)
    named = name_tensors(state, container.metadata, container.path)
    config = infer_config(named.tensors, num_heads_of(container), container.path)
    with torch.device("meta"):
        net = WanModel(config)
    check_tensors(net, named.tensors, container.path)
    for name, tensor in named.tensors.items():
        if tensor.dtype not in STORED_AS:
            raise ValueError(f"{container.path}: {name} is {tensor.dtype}; weights are floats of 8 to 64 bits")
    choice = choose_card(container, taken, card, config)
    choice = dataclasses.replace(choice, card=override(choice.card, overrides))
    shapes = {name: tuple(tensor.shape) for name, tensor in named.tensors.items()}
    merged = tuple(read_lora(file, shapes, strength) for file, strength in loras)
    return StudentFile(container=container, taken=taken, named=named, config=config, card_choice=choice, loras=merged)


WEIGHTS = ("auto", "generator", "generator_ema")


def take_weights(container: Container, weights: str, card: str) -> tuple[str, dict[str, Tensor]]:
    """The network's tensors and where in the file they were. Raises ValueError where what was asked for is not."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
    first = published_student(DEFAULT if card == "auto" else card).weights if weights == "auto" else weights
    taken, state = container.take((first, *(name for name in NESTED if name != first)))
    if weights not in ("auto", *taken.split(".")):
        held = f"holds {', '.join(container.held)}" if container.held else "holds one set of weights"
        raise ValueError(f"{container.path}: {held}, no {weights}; leave weights at auto")
    return taken, state


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
    for name, preset in PRESETS.items():
        if name != "demo" and preset.dim == dim and preset != found:
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


def read_card(path: str | Path | None = None, **reading) -> StudentCard:
    """The card of a student, or of a LoRA of ours; None is the built-in one. `reading` as for `open_student`.

    Where the file has none, all of it is looked at. Raises ValueError as `open_student`.
    """
    container = open_container(path or DEMO_STUDENT)
    if reading.get("card", "auto") == "auto" and (own := card_in(container.metadata, container.path)):
        return override(own, reading.get("overrides", ()))
    return open_student(path, **reading).card


def load_student(
    path: str | Path | None = None, dtype: torch.dtype = torch.float32, **reading
) -> tuple[WanModel, StudentCard]:
    """A student ready to run, strict; None is the built-in one. `reading` as for `open_student`.

    What the user should know about it is logged. Raises ValueError, one line, for a file that is no student.
    """
    student = open_student(path, **reading)
    if student.card_choice.note:
        log.warning("%s", student.card_choice.note)
    with torch.device("meta"):
        net = WanModel(student.config)
    state = {name: student.tensor(name).to(dtype) for name in student.named.tensors}
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False), student.card


def metadata_num_heads(metadata: dict[str, str]) -> int | None:
    """Heads as ComfyUI's `config` metadata gives them, or None where it does not. Raises ValueError for nonsense."""
    try:
        num_heads = json.loads(metadata.get("config", "{}")).get("transformer", {}).get("num_heads")
    except (json.JSONDecodeError, AttributeError, RecursionError):
        return None
    if num_heads is not None and (type(num_heads) is not int or num_heads < 1):
        raise ValueError(f"num_heads: {num_heads!r} in the metadata is not a number of heads")
    return num_heads
