"""Sizes of a Wan 2.1 text-to-video transformer, and the card of a student."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..memory.config import MemoryConfig
from ..memory.fields import checked_fields, json_object, quoted
from ..memory.view import ATTENDS
from .flow import SOLVERS, warped_sigmas
from .units import LATENT_CHANNELS, check_size

CARD_KEY = "context_forcing"
"""The key of the student card in a safetensors file's metadata."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of one network (docs/method.md, Network)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    channels: int = LATENT_CHANNELS
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"num_heads: {self.num_heads} does not divide dim {self.dim} into even head dims")


PUBLISHED_SIZES: Mapping[str, WanConfig] = {
    "wan2.1-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
PRESETS: Mapping[str, WanConfig] = {
    "demo": WanConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=6),
    "demo-4-blocks": WanConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=4),
    **PUBLISHED_SIZES,
}


def published_size(config: WanConfig) -> str | None:
    """The name of the published Wan 2.1 that has these sizes."""
    return next((name for name, sizes in PUBLISHED_SIZES.items() if sizes == config), None)


@dataclass(frozen=True, kw_only=True)
class StudentCard:
    """What a student was trained with (docs/students.md, The card); loader and sampler take their defaults from it."""

    name: str = "unnamed"
    base: str = "wan2.1-1.3b"
    stage: str = "unknown"
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """Denoising timesteps before the shift."""
    first_steps: tuple[float, ...] = ()
    """Timesteps of a chunk that is made with an empty memory; empty: `steps`."""
    shift: float = 5.0
    solver: str = "renoise"
    """`renoise` for distilled students, `euler` for flow-matching ones (flow.SOLVERS)."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    commit_attends: str = "all"
    """What the commit pass over a finished chunk attends to (view.ATTENDS)."""
    match_sink: float = 0.0
    """Share by which mean and deviation of each latent channel of a finished chunk move to those of the sink."""
    fps: int = 16
    size: tuple[int, int] = (832, 480)
    """Width and height in pixels of the training videos."""
    revision: str = "unknown"
    """Git revision of the code that trained it."""
    data: str = "unknown"
    data_seed: int | None = None
    train_steps: int | None = None
    train_seconds: float | None = None

    def __post_init__(self):
        for name in ("steps", "first_steps", "size"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or any(type(value) not in (int, float) for value in values):
                raise ValueError(f"{name}: {quoted(values)} is not a list of numbers")
        if type(self.shift) not in (int, float):
            raise ValueError(f"shift: {quoted(self.shift)} is not a number")
        if type(self.match_sink) not in (int, float) or not 0 <= self.match_sink <= 1:
            raise ValueError(f"match_sink: {quoted(self.match_sink)} is not a share; it must be a number in [0, 1]")
        if type(self.fps) is not int or self.fps < 1:
            raise ValueError(f"fps: {quoted(self.fps)} is not a positive integer")
        if len(self.size) != 2 or any(type(side) is not int for side in self.size):
            raise ValueError(f"size: {quoted(self.size)} is not a width and a height in pixels")
        check_size(*self.size)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: {quoted(self.solver)} is not one of {', '.join(SOLVERS)}")
        if self.commit_attends not in ATTENDS:
            raise ValueError(f"commit_attends: {quoted(self.commit_attends)} is not one of {', '.join(ATTENDS)}")
        for steps in (self.steps, self.first_steps or self.steps):
            warped_sigmas(steps, self.shift)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the sampler, shifted, without the final 0."""
        return warped_sigmas(self.steps, self.shift)

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Noise levels of a chunk that is made with an empty memory; empty: `sigmas`."""
        return warped_sigmas(self.first_steps, self.shift) if self.first_steps else ()

    def to_json(self) -> str:
        """The card as in a file's metadata."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StudentCard":
        """A card from JSON text. Raises ValueError for an unknown field or an impossible value."""
        fields = checked_fields(cls, json_object(text, "student card"), "student card")
        if "memory" in fields:
            fields["memory"] = MemoryConfig.from_dict(fields["memory"])
        return cls(**fields)
