"""LoRA files in every common naming -> changes to Wan's weights, in float32 (docs/method.md, Checkpoints)."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...memory.fields import json_object, quoted
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
"""Ends of names: peft's, kohya's and ComfyUI's, and whole differences that some speed-up LoRAs hold."""


def add_low_rank(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + scale * up @ down in float32, for up [out, r] and down [r, in]; further dims of `weight` are flattened."""
    delta = up.float().flatten(1) @ down.float().flatten(1)
    return weight.float() + scale * delta.reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The changes that a file makes to a network, by the weight's name."""

    path: Path
    strength: float
    pairs: Mapping[str, tuple[Tensor, Tensor, float]]
    """Up [out, r], down [r, in] and alpha / r of a weight."""
    wholes: Mapping[str, Tensor]
    """Differences of the whole weight."""

    def changes(self, name: str) -> bool:
        return name in self.pairs or name in self.wholes

    def add(self, name: str, weight: Tensor) -> Tensor:
        """W + strength * (alpha / r) * up @ down + strength * difference, in float32; as it is without changes."""
        if name in self.pairs:
            up, down, scale = self.pairs[name]
            weight = add_low_rank(weight, up, down, self.strength * scale)
        if name in self.wholes:
            weight = weight.float() + self.strength * self.wholes[name].float()
        return weight


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:strength`. Raises ValueError for a strength that is not finite."""
    path, _, strength = text.rpartition(":")
    try:
        parsed = (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # a colon in the file's name
    if not math.isfinite(parsed[1]):
        raise ValueError(f"lora: strength {strength} is not a finite number")
    return parsed


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, ...]], strength: float = 1.0) -> Lora:
    """A LoRA for weights of these shapes. Raises ValueError, one line, unless all of the file can be merged."""
    container = open_container(path)
    if "critic_lora" in container.sets and "generator_lora" not in container.sets:
        raise ValueError(f"{path}: holds critic_lora alone; give a file with generator_lora")
    weights: dict[str, dict[str, Tensor]] = {}
    for name, kind, tensor in _named(container.take(NESTED)[1], shapes, path):
        if kind in weights.setdefault(name, {}):
            raise ValueError(f"{path}: holds {kind} of {name} twice, under two names; keep one of them")
        weights[name][kind] = tensor
    alpha = _common_alpha(container)
    pairs, wholes = {}, {}
    for name, parts in weights.items():
        for kind in sorted(parts.keys() & {"weight", "bias", "modulation"}):
            target = f"{name.removesuffix('.weight')}.{kind}"
            if tuple(parts[kind].shape) != (shape := _shape_of(path, target, shapes)):
                raise ValueError(
                    f"{path}: {target} has shape {shape}, its difference {tuple(parts[kind].shape)}; give another LoRA"
                )
            wholes[target] = parts[kind]
        if parts.keys() & {"up", "down", "alpha"}:
            pairs[name] = _pair(f"{path}: {name}", parts, _shape_of(path, name, shapes), alpha)
    if not pairs and not wholes:
        raise ValueError(f"{path}: not a LoRA; names in a LoRA end in lora_A.weight or lora_down.weight")
    return Lora(path=Path(path), strength=strength, pairs=pairs, wholes=wholes)


def _shape_of(path: str | Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{path}: changes {name}, which this network does not have; it belongs to another model")
    return shapes[name]


def _pair(
    where: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], alpha: float | None
) -> tuple[Tensor, Tensor, float]:
    """Up, down and alpha / r of a weight; `alpha` is the common one, for a weight without its own."""
    for kind, title in (("up", "up (B)"), ("down", "down (A)")):
        if kind not in parts:
            raise ValueError(f"{where} has no {title} matrix; download the file again")
    up, down = parts["up"], parts["down"]
    if 0 in (*up.shape, *down.shape):
        raise ValueError(f"{where}: {tuple(up.shape)} and {tuple(down.shape)} have no rank; download it again")
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or up[0].numel() != up.shape[1]:
        raise ValueError(
            f"{where}: {tuple(up.shape)} and {tuple(down.shape)} are not the matrices of a LoRA; download it again"
        )
    if (up.shape[0], down[0].numel()) != (shape[0], math.prod(shape[1:])):
        raise ValueError(
            f"{where} has shape {shape}, its LoRA {tuple(up.shape)} x {tuple(down.shape)}; it belongs to a network of"
            " another size"
        )
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"{where}: alpha has {parts['alpha'].numel()} values in place of one")
        alpha = float(parts["alpha"])
    return up, down, 1.0 if alpha is None else alpha / down.shape[0]


def _named(state: Mapping[str, Tensor], shapes: Iterable[str], path: str | Path) -> Iterator[tuple[str, str, Tensor]]:
    """(weight, kind, tensor) of every tensor. Raises ValueError for an unknown name."""
    kohya = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes if name.endswith(".weight")}
    split = []
    for name, tensor in state.items():
        end = next((end for end in KINDS if name.endswith(f".{end}")), None)
        if end is None:
            raise ValueError(
                f"{path}: {name} is not a part of a LoRA that can be merged (lora_A, lora_down, alpha, diff)"
            )
        split.append((name.removesuffix(f".{end}"), KINDS[end], tensor))
    plain = {stem: _plain_stem(stem) for stem, _, _ in split}
    layout = layout_of(f"{stem}." for stem in plain.values())
    for stem, kind, tensor in split:
        if KOHYA.match(stem):
            weight = kohya.get(KOHYA.sub("", stem, count=1))
        else:
            wan = wan_stem(plain[stem], layout)
            weight = wan and f"{wan}.weight"
        yield weight or stem, kind, tensor


def _plain_stem(stem: str) -> str:
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return plain_name(stem)[0]


def _common_alpha(container: Container) -> float | None:
    """alpha of all pairs in peft's or diffusers' settings; None: the rank. Raises ValueError where layers differ."""
    path, config = container.path, {}
    if path.is_dir() or path.stem == "adapter_model":
        config = read_json((path if path.is_dir() else path.parent) / "adapter_config.json", {})
    if not config:
        config = json_object(container.metadata.get("lora_adapter_metadata", "{}"), f"{path}: lora_adapter_metadata")
    config = {key.rpartition(".")[2]: value for key, value in config.items()}
    for key in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is set, ranks or scales differ by layer; merge it with peft first")
    alpha = config.get("lora_alpha")
    if alpha is not None and type(alpha) not in (int, float):
        raise ValueError(f"{path}: lora_alpha {quoted(alpha)} is not a number")
    return alpha
