"""Settings of training: one frozen dataclass per stage, and the parts that stages share. Defaults are Wan 2.1 1.3B."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..memory.config import CLEAN_POLICIES, MEMORY_PRESETS, MemoryConfig
from ..memory.fields import quoted
from ..model.config import PRESETS, WanConfig
from ..model.device import dtype_named
from ..model.units import check_size, latent_size

PRECISIONS = ("fp32", "bf16")
"""Compute dtypes of the networks. Master weights, optimiser states and losses are always float32."""


def check_range(
    config: object, *names: str, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> None:
    """Raises ValueError for a field that is below `least`, above `most`, or not above `above`."""
    limits = {"at least": least, "at most": most, "above": above}
    expected = " and ".join(f"{word} {limit:.10g}" for word, limit in limits.items() if math.isfinite(limit))
    for name in names:
        value = getattr(config, name)
        if not (least <= value <= most and value > above):
            raise ValueError(f"{name}: {value} must be {expected}")


def check_choice(config: object, name: str, choices) -> None:
    """Raises ValueError for a field that is none of `choices`."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}: {quoted(getattr(config, name))} is not one of {', '.join(choices)}")


def field_defaults(config: Any) -> dict[str, Any]:
    """The default values of a dataclass, without the fields that have none."""
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(config) if f.default is not MISSING}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(values, default=asdict))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser of one network."""

    kind: str = "adamw"
    """`adamw`, or `muon` for the matrices of the blocks and AdamW for the other parameters."""
    lr: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    """Gradient norms above this are scaled down to it."""
    spike: float = 20.0
    """An update is skipped if its gradient norm is this many times the median of the last fifty; 0 never skips."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 keeps no average."""
    ema_from: int = 0
    """Number of updates during which the average is a copy of the weights."""

    def __post_init__(self):
        check_choice(self, "kind", ("adamw", "muon"))
        check_range(self, "lr", "clip", above=0)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: {self.ema} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the linear layers."""

    rank: int = 0
    """0 trains all weights, without adapters."""
    alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0 is the rank."""
    targets: tuple[str, ...] = (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
        "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
    )  # fmt: skip
    """Ends of the names of the layers."""

    def __post_init__(self):
        check_range(self, "rank", "alpha", least=0)

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return (self.alpha or self.rank) / self.rank


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the training loop, for every stage (train/loop.py)."""

    steps: int = 600
    batch: int = 64
    """Samples of an iteration over all processes. A process computes its samples one after the other."""
    sequence: int = 1
    """Processes that share each sample; each has a part of its tokens and heads (docs/training.md, Long clips)."""
    warmup: int = 0
    """Number of steps in which the learning rate rises."""
    decay: float = 0.0
    """Share of the steps, at the end, in which the learning rate falls to zero."""
    device: str = "auto"
    data_seed: int = 1
    seed: int = 0
    max_skipped: int = 10
    """Number of successive skipped updates after which the run stops."""
    checkpoint_every: int = 50
    sample_every: int = 50
    out: str = ""

    def __post_init__(self):
        check_range(self, "steps", "batch", "sequence", "checkpoint_every", "sample_every", above=0)
        check_range(self, "seed", "data_seed", least=0, most=2**31 - 1)
        check_range(self, "decay", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(LoopConfig):
    """Settings of every stage that trains a network in Wan's layout."""

    preset: str = "wan2.1-1.3b"
    memory: MemoryConfig = field(default_factory=lambda: MEMORY_PRESETS["context-forcing"])
    data: str = ""
    """`demo` for the demo world, or a folder made by `context-forcing encode`."""
    codec: str = "assets"
    """The codec of the demo world's clips and sample images: `assets` for the shipped one, or the path of a file."""
    size: tuple[int, int] = (832, 480)
    """Width and height of the videos in pixels."""
    shift: float = 5.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of every trained network of the stage."""
    precision: str = "bf16"
    recompute: bool = True
    """Keep only the inputs of blocks for the backward pass, and recompute the rest."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "shift", above=0)
        check_choice(self, "preset", PRESETS)
        check_choice(self, "precision", PRECISIONS)
        if self.memory.policy not in CLEAN_POLICIES:
            raise ValueError(
                f"memory.policy: {self.memory.policy} is for released weights; train with one of"
                f" {', '.join(CLEAN_POLICIES)}"
            )
        if not self.data:
            raise ValueError("data: missing; give demo, or the folder of a set made by `context-forcing encode`")
        if len(self.size) != 2:
            raise ValueError(f"size: {self.size} must be a width and a height")
        check_size(*self.size)
        self.check_sequence(self.preset)

    def check_sequence(self, preset: str) -> None:
        """Raises ValueError unless `sequence` divides heads of a preset and tokens of a latent frame."""
        numbers = {f"heads of {preset}": PRESETS[preset].num_heads, "tokens of a latent frame": self.frame_tokens}
        for name, number in numbers.items():
            if number % self.sequence:
                most = math.gcd(*numbers.values())
                fitting = ", ".join(str(count) for count in range(1, most + 1) if most % count == 0)
                raise ValueError(f"sequence: {self.sequence} does not divide {number} {name}; give one of {fitting}")

    @property
    def codec_path(self) -> str | None:
        """The file of the demo codec; None is the shipped one."""
        return None if self.codec == "assets" else self.codec

    @property
    def network(self) -> WanConfig:
        """Sizes of the networks."""
        return PRESETS[self.preset]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return dtype_named(self.precision)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """C, H, W of a latent frame."""
        return latent_size(*self.size)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        _, patch_rows, patch_columns = self.network.patch_size
        return self.latent_size[1] // patch_rows * (self.latent_size[2] // patch_columns)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Stage `export`: a file from the newest checkpoint of a run, written to another folder.

    A run exports its own file with every checkpoint.
    """

    run: str = ""
    """The folder of a run of `pretrain`, `teacher`, `local` or `contextual`."""
    out: str = ""
    """The folder; empty is `export/` and the name of the run's folder."""

    def __post_init__(self):
        if not self.run:
            raise ValueError("run: missing; give the folder of a run, for example run=runs/contextual")

    @property
    def folder(self) -> Path:
        """The folder that is written to."""
        return Path(self.out) if self.out else Path("export") / Path(self.run).resolve().name
