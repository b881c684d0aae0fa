"""Sizes and thresholds of a memory, checked."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from .fields import checked_fields

CLEAN_POLICIES = ("novel", "clean", "fifo", "uniform")
"""Those that decide once per frame, on keys of clean latents."""
RELEASED = "released"
POLICIES = (*CLEAN_POLICIES, RELEASED)
EVICTIONS = ("oldest", "redundant")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How many latent frames are remembered, and by which rule (Context Forcing, sec. 3; method.md 5.1, 8.3).

    The chunk being made counts among the fast frames: it sees `sink + slow + fast - chunk` remembered frames,
    and its last frame has position `sink + slow + fast - 1` at most.
    """

    sink: int = 3
    """The first latent frames of the video; they never leave."""
    slow: int = 12
    """Keyframes kept for long; 0 means no slow memory."""
    fast: int = 6
    """The most recent latent frames, the chunk being made included."""
    chunk: int = 3
    """Latent frames made together."""
    window: int = 21
    """Positions the student was trained with; sink + slow + fast must fit in."""
    policy: str = "novel"
    """Which frames leaving fast are promoted to slow:
    `clean` those unlike the frame just before them (the paper's rule), `novel` those unlike everything remembered,
    `fifo` all, `uniform` every `uniform_stride`-th. `released` is what the released Context Forcing weights were
    trained with: each layer keeps first frames of chunks as they stood in a pass over noise (memory/released.py)."""
    slow_similarity_threshold: float = 0.95
    """tau: a frame whose key similarity is below it counts as new (policies clean, novel and released)."""
    eviction: str = "oldest"
    """Who goes when slow is full: the `oldest` entry, or the most `redundant` one."""
    novel_against_sink: bool = True
    """Policy novel compares with the sink too."""
    uniform_stride: int = 6

    def __post_init__(self):
        for name in ("sink", "slow", "fast", "chunk", "window", "uniform_stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: {value!r} is not a whole number of latent frames")
        for name in ("sink", "slow"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} latent frames; it must be 0 or more")
        for name in ("chunk", "uniform_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} latent frames; it must be 1 or more")
        least = self.chunk + 1 if self.slow else self.chunk
        if self.fast < least:
            raise ValueError(
                f"fast: {self.fast} latent frames; it holds the chunk being made ({self.chunk}) and, with a slow"
                f" memory, the frame before it, so at least {least}"
            )
        if self.sink + self.slow + self.fast > self.window:
            raise ValueError(
                f"window: sink {self.sink} + slow {self.slow} + fast {self.fast} ="
                f" {self.sink + self.slow + self.fast} frames do not fit in the window of {self.window};"
                " make one of them smaller (positions past the window were never trained)"
            )
        if self.policy == RELEASED and (self.sink + self.slow + self.fast) % self.chunk:
            raise ValueError(
                f"policy: released fills sink {self.sink} + slow {self.slow} + fast {self.fast} frames by whole chunks"
                f" of {self.chunk}; make their sum a multiple of it"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy: {self.policy!r} is not one of {', '.join(POLICIES)}")
        if self.eviction not in EVICTIONS:
            raise ValueError(f"eviction: {self.eviction!r} is not one of {', '.join(EVICTIONS)}")
        tau = self.slow_similarity_threshold
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not -1 <= tau <= 1:
            raise ValueError(f"slow_similarity_threshold: {tau!r} is not a cosine; it must be a number in [-1, 1]")

    @property
    def num_slots(self) -> int:
        """Latent frames in sink, slow and fast, the chunk being generated included."""
        return self.sink + self.slow + self.fast

    @property
    def capacity(self) -> int:
        """Largest number of latent frames remembered between chunks."""
        return self.num_slots - self.chunk

    @property
    def per_layer(self) -> bool:
        """Whether every layer decides for itself which frames it keeps (memory/layer_store.py)."""
        return self.policy == RELEASED

    @property
    def uses_threshold(self) -> bool:
        """Whether the policy compares similarities with slow_similarity_threshold."""
        return self.policy in ("novel", "clean", RELEASED)

    @classmethod
    def from_dict(cls, raw: object) -> "MemoryConfig":
        """A config from a mapping. Raises ValueError for an unknown field or an impossible value."""
        return cls(**checked_fields(cls, raw, "memory"))


MEMORY_PRESETS: Mapping[str, MemoryConfig] = {
    "slow-fast": MemoryConfig(),
    "context-forcing": MemoryConfig(policy="clean"),
    "released": MemoryConfig(policy=RELEASED),
    "longlive": MemoryConfig(slow=0, fast=9, window=12, policy="fifo"),
    "infinity-rope": MemoryConfig(sink=1, slow=0, fast=5, window=6, policy="fifo"),
}
"""Memories by name: ours, the paper's, the released weights', and the sliding windows that LongLive and Infinity-RoPE students have
(method.md 3.5)."""


def memory_preset(name: str) -> MemoryConfig:
    """A memory by name. Raises ValueError for an unknown name."""
    if name not in MEMORY_PRESETS:
        raise ValueError(f"memory: {name!r} is not one of {', '.join(MEMORY_PRESETS)}")
    return MEMORY_PRESETS[name]


def named_memory(name: str, trained: MemoryConfig) -> MemoryConfig:
    """A memory by name for a student that was trained with `trained`.

    Raises ValueError for an unknown name, or one that needs positions the student was never trained with.
    """
    chosen = memory_preset(name)
    if chosen.window > trained.window:
        raise ValueError(f"memory: {name} needs a window of {chosen.window} frames, the student has {trained.window}")
    return dataclasses.replace(chosen, chunk=trained.chunk)
