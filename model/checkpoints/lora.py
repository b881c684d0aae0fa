"""LoRA files of every common spelling -> what they add to Wan's weights, in float32 (method.md 2.3)."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .containers import Container, open_container, read_json
from .layouts import layout_of, plain_name, wan_stem

NESTED = ("generator_lora", "lora", "state_dict")
PREFIXES = ("base_model.model.", "transformer.", "unet.")
KOHYA = re.compile(r"lora_unet_+")

KINDS = {
    "lora_A.weight": "down", "lora_A.default.weight": "down", "lora_A": "down", "lora_down.weight": "down",
    "lora_B.weight": "up", "lora_B.default.weight": "up", "lora_B": "up", "lora_up.weight": "up",
    "alpha": "alpha", "diff": "weight", "diff_b": "bias", "diff_m": "modulation",
}  # fmt: skip
"""Ends of names: peft's, kohya's and ComfyUI's, and differences that some speed-up LoRAs hold whole."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What a file adds to a network, by the weight's name."""

    path: Path
    strength: float
    pairs: Mapping[str, tuple[Tensor, Tensor, float]]
    """Up [out, r], down [r, in] and alpha / r of a weight."""
    wholes: Mapping[str, Tensor]

    def changes(self, name: str) -> bool:
        """Whether it adds anything to this weight."""
        return name in self.pairs or name in self.wholes

    def add(self, name: str, weight: Tensor) -> Tensor:
        """W + strength * (alpha / r) * up @ down, and the whole difference if there is one; in float32."""
        weight = weight.float()
        if name in self.pairs:
            up, down, scale = self.pairs[name]
            delta = up.float().flatten(1) @ down.float().flatten(1)
            weight = weight + self.strength * scale * delta.reshape(weight.shape)
        if name in self.wholes:
            weight = weight + self.strength * self.wholes[name].float()
        return weight


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:strength`. Raises ValueError for a strength that is not finite."""
    path, _, strength = text.rpartition(":")
    try:
        parsed = (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # a colon in the file's name
    if not math.isfinite(parsed[1]):
        raise ValueError(f"lora: strength {strength} is not a number that can be multiplied by")
    return parsed


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, ...]], strength: float = 1.0) -> Lora:
    """A LoRA for a network with these weights. Raises ValueError, one line, unless every part finds its weight."""
    container = open_container(path)
    if "critic_lora" in container.held and "generator_lora" not in container.held:
        raise ValueError(f"{path}: holds critic_lora alone; a student's LoRA is generator_lora")
    _, state = container.take(NESTED)
    parts: dict[str, dict[str, Tensor]] = {}
    for weight, kind, tensor in _named(state, shapes, path):
        if kind in parts.setdefault(weight, {}):
            raise ValueError(f"{path}: holds the {kind} of {weight} twice, in two spellings")
        parts[weight][kind] = tensor
    alphas = _alphas(container)
    pairs, wholes = {}, {}
    for weight, held in parts.items():
        for kind in sorted(held.keys() & {"weight", "bias", "modulation"}):
            target = f"{weight.removesuffix('.weight')}.{kind}"
            if tuple(held[kind].shape) != (shape := _shape_of(path, target, shapes)):
                raise ValueError(f"{path}: {target} is {shape}, its difference {tuple(held[kind].shape)}")
            wholes[target] = held[kind]
        if not held.keys() & {"up", "down", "alpha"}:
            continue
        if missing := {"up", "down"} - held.keys():
            raise ValueError(f"{path}: {weight} has no {'up (B)' if 'up' in missing else 'down (A)'} matrix")
        pairs[weight] = _pair(path, weight, held, shapes, alphas)
    if not pairs and not wholes:
        raise ValueError(f"{path}: no LoRA in it; names would end in lora_A.weight or lora_down.weight")
    return Lora(path=Path(path), strength=strength, pairs=pairs, wholes=wholes)


def _pair(path, weight: str, held: Mapping[str, Tensor], shapes, alpha: float | None) -> tuple[Tensor, Tensor, float]:
    """Up, down and alpha / r of a weight; `alpha` is that of all where a pair has none of its own."""
    shape, up, down = _shape_of(path, weight, shapes), held["up"], held["down"]
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{path}: {weight}: {tuple(up.shape)} and {tuple(down.shape)} are no pair of a LoRA")
    if (up.shape[0], down[0].numel(), up[0].numel()) != (shape[0], math.prod(shape[1:]), up.shape[1]):
        raise ValueError(
            f"{path}: {weight} is {tuple(shape)}, its LoRA {tuple(up.shape)} x {tuple(down.shape)}; it was made for a"
            " network of another size"
        )
    if "alpha" in held:
        if held["alpha"].numel() != 1:
            raise ValueError(f"{path}: {weight}: its alpha is no single number")
        alpha = float(held["alpha"])
    return up, down, 1.0 if alpha is None else alpha / down.shape[0]


def _shape_of(path, weight: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if weight not in shapes:
        raise ValueError(f"{path}: changes {weight}, which this network does not have; it belongs to another model")
    return shapes[weight]


def _named(state: Mapping[str, Tensor], shapes: Iterable[str], path: str | Path) -> Iterator[tuple[str, str, Tensor]]:
    """(weight, kind, tensor) of every tensor; raises ValueError for a name that is not understood."""
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes if name.endswith(".weight")}
    split = []
    for name, tensor in state.items():
        end = next((end for end in KINDS if name.endswith(f".{end}")), None)
        if end is None:
            raise ValueError(f"{path}: {name} is no part of a LoRA that can be merged (lora_A, lora_down, alpha, diff)")
        split.append((name.removesuffix(f".{end}"), KINDS[end], tensor))
    stems = {stem: _plain_stem(stem) for stem, _, _ in split}
    layout = layout_of(f"{plain}." for plain in stems.values())
    for stem, kind, tensor in split:
        if KOHYA.match(stem):
            found = flat.get(KOHYA.sub("", stem, count=1))
        else:
            found = wan_stem(stems[stem], layout)
            found = found and f"{found}.weight"
        if found is None:
            raise ValueError(f"{path}: changes {stem}, which this network does not have; it belongs to another model")
        yield found, kind, tensor


def _plain_stem(stem: str) -> str:
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return plain_name(stem)[0]


def _alphas(container: Container) -> float | None:
    """The alpha of all pairs, where peft or diffusers wrote it beside the tensors; None: alpha is the rank.

    Raises ValueError where layers differ.
    """
    path, about = container.path, {}
    if path.is_dir() or path.stem == "adapter_model":
        about = read_json((path if path.is_dir() else path.parent) / "adapter_config.json", {})
    if not about and "lora_adapter_metadata" in container.metadata:
        try:
            about = json.loads(container.metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: its lora_adapter_metadata is not JSON") from None
        if not isinstance(about, dict):
            raise ValueError(f"{path}: its lora_adapter_metadata is not a JSON object")
    about = {key.rpartition(".")[2]: value for key, value in about.items()}
    if about.get("alpha_pattern") or about.get("rank_pattern") or about.get("use_rslora") or about.get("use_dora"):
        raise ValueError(f"{path}: its layers have ranks or scales of their own; merge it with peft first")
    alpha = about.get("lora_alpha")
    if alpha is not None and type(alpha) not in (int, float):
        raise ValueError(f"{path}: lora_alpha {alpha!r} is not a number")
    return alpha
