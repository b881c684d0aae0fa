"""Named runs: one dataclass a stage, one function a run. Overrides are `key=value`; unknown keys are errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import yaml

from ..memory.config import MemoryConfig
from ..model.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Stage `vae`: the demo codec's statistics and its decoder."""

    width: int = 96
    num_blocks: int = 3
    steps: int = 900
    batch: int = 32
    lr: float = 2e-3
    data_seed: int = 1
    """Seed of scenes and camera moves."""
    latent_noise: float = 0.05
    """Standard deviation of noise on the latents, so that a student's small errors are drawn over."""
    checkpoint_every: int = 250
    out: str = "runs/vae"

    def __post_init__(self):
        _check_positive(self, "width", "num_blocks", "steps", "batch", "lr", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Stage `pretrain`: teacher-forced flow matching over the Slow-Fast layout (demo_world.md 3)."""

    preset: str = "demo"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    codec: str = "assets"
    """`assets` for the shipped codec, or the path of a codec file."""
    init: str = ""
    """A student file to start from; empty starts from fresh weights."""
    num_chunks: int = 12
    steps: int = 4000
    batch: int = 4
    lr: float = 2e-3
    decay: float = 0.3
    """The last part of the steps in which the learning rate falls to zero."""
    clip: float = 1.0
    shift: float = 3.0
    """Warp of the training noise levels, and of the steps the student is used with."""
    sample_steps: int = 8
    """Denoising steps written on the card."""
    context_noise: float = 0.3
    """Most noise on a remembered frame, labelled clean: what keeps long rollouts from drifting."""
    context_noise_share: float = 0.7
    recall_weight: float = 5.0
    """How much more a column counts that only sink or slow frames can tell."""
    unseen_weight: float = 2.0
    """How much more a column counts that nothing remembered can tell: it has to be made up, and whole."""
    pacing: float = 0.5
    """Share of clips whose camera goes back and forth: there is more to look up in them."""
    openings: int = 24
    """Clips of a single chunk beside the `batch` long ones: a video has to begin somewhere."""
    text_dropout: float = 0.05
    data_seed: int = 1
    seed: int = 0
    """Seed of the weights and of the noise."""
    validate_every: int = 100
    checkpoint_every: int = 100
    out: str = "runs/pretrain"

    def __post_init__(self):
        _check_positive(self, "num_chunks", "steps", "batch", "lr", "decay", "clip", "shift", "sample_steps")
        _check_positive(self, "validate_every", "checkpoint_every", "recall_weight", "unseen_weight")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")


def vae_demo() -> VaeConfig:
    return VaeConfig()


def vae_smoke() -> VaeConfig:
    return VaeConfig(width=16, num_blocks=1, steps=3, batch=2, checkpoint_every=2, out="runs/smoke-vae")


def pretrain_demo() -> PretrainConfig:
    return PretrainConfig()


def pretrain_smoke() -> PretrainConfig:
    return PretrainConfig(
        steps=3, batch=1, openings=2, num_chunks=4, validate_every=2, checkpoint_every=2, out="runs/smoke-pretrain"
    )


CONFIGS: dict[str, dict[str, Callable]] = {
    "vae": {"demo": vae_demo, "smoke": vae_smoke},
    "pretrain": {"demo": pretrain_demo, "smoke": pretrain_smoke},
}


def load_config(stage: str, name: str, overrides: Sequence[str] = ()):
    """The configuration of a run. Raises ValueError for an unknown stage, name or key, or a value of another type."""
    if stage not in CONFIGS:
        raise ValueError(f"stage: {stage!r} is not one of {', '.join(CONFIGS)}")
    if name not in CONFIGS[stage]:
        raise ValueError(f"config: {name!r} is not one of {', '.join(CONFIGS[stage])} (stage {stage})")
    config = CONFIGS[stage][name]()
    for override in overrides:
        config = _override(config, override)
    return config


def _override(config, override: str):
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r}: an override is key=value, for example steps=100")
    head, _, rest = key.partition(".")
    known = {f.name for f in dataclasses.fields(config)}
    if head not in known:
        raise ValueError(f"{head}: unknown key; known are {', '.join(sorted(known))}")
    current = getattr(config, head)
    if rest and not dataclasses.is_dataclass(current):
        raise ValueError(f"{key}: {head} has no parts; give {head}=value")
    if rest:
        return dataclasses.replace(config, **{head: _override(current, f"{rest}={text}")})
    try:
        value = yaml.safe_load(text)
        if isinstance(current, float) and type(value) in (int, str):
            value = float(value)  # YAML reads 1e-3 as text
    except (yaml.YAMLError, ValueError):
        value = None
    if type(value) is not type(current) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{key}: {text!r} is not a {type(current).__name__}")
    return dataclasses.replace(config, **{head: value})


def _check_positive(config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)} must be above 0")
