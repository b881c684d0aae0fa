"""Sizes and thresholds of a memory, checked."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from .fields import checked_fields, quoted

RECALL = "recall"
NOVEL = ("novel", "cover")
"""Policies that promote frames unlike everything remembered."""
CLEAN_POLICIES = (*NOVEL, "clean", "fifo", "uniform", RECALL)
"""Policies that decide once for all layers, on keys of clean latents or on the latents."""
RELEASED = "released"
POLICIES = (*CLEAN_POLICIES, RELEASED)
EVICTIONS = ("oldest", "redundant")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How many latent frames are remembered, and by which policy (docs/method.md, Memory and Policies).

    The chunk being generated counts as fast. It attends to `sink + slow + fast - chunk` remembered frames, and its last
    frame has position `sink + slow + fast - 1` at most.
    """

    sink: int = 3
    """The first latent frames of the video. They always stay."""
    slow: int = 12
    """Keyframes that are kept for long; 0: no slow memory."""
    fast: int = 6
    """The most recent latent frames, the chunk being generated included."""
    chunk: int = 3
    """Latent frames generated together."""
    window: int = 21
    """Number of positions the student was trained with, at least sink + slow + fast."""
    policy: str = "novel"
    """Which frames are promoted from fast to slow. `clean`: those unlike the frame before them (the paper's rule);
    `novel`: those unlike all remembered ones; `cover`: the same, with eviction `redundant`; `recall`: chosen anew from
    the whole film before every chunk (recall.py); `fifo`: all; `uniform`: every `uniform_stride`-th; `released`: the
    rule of the released Context Forcing weights (layer_store.py)."""
    slow_similarity_threshold: float = 0.95
    """tau: a frame with a lower key similarity is new (policies novel, cover, clean and released)."""
    eviction: str = "oldest"
    """Which slow frame is evicted: the `oldest`, or the most `redundant` one; under policy cover always that."""
    novel_against_sink: bool = True
    """Whether policies novel and cover compare with the sink too."""
    uniform_stride: int = 6

    def __post_init__(self):
        for name, least in dict(sink=0, slow=0, fast=0, chunk=1, window=0, uniform_stride=1).items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: {quoted(value)} latent frames; it must be a whole number, {least} or more")
        least = self.chunk + 1 if self.slow else self.chunk
        if self.fast < least:
            raise ValueError(
                f"fast: {self.fast} latent frames; it must be {least} or more: a chunk of {self.chunk} and, with slow"
                " memory, the frame before it"
            )
        sizes = f"sink {self.sink} + slow {self.slow} + fast {self.fast} = {self.num_slots} frames"
        if self.num_slots > self.window:
            raise ValueError(f"window: {sizes} do not fit in the window of {self.window}; make one of them smaller")
        if self.per_layer and self.num_slots % self.chunk:
            raise ValueError(f"policy: {self.policy} needs whole chunks; make {sizes} a multiple of {self.chunk}")
        for name, choices in (("policy", POLICIES), ("eviction", EVICTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {quoted(getattr(self, name))} is not one of {', '.join(choices)}")
        if type(self.novel_against_sink) is not bool:
            raise ValueError(f"novel_against_sink: {quoted(self.novel_against_sink)} is not true or false")
        tau = self.slow_similarity_threshold
        if type(tau) not in (int, float) or not -1 <= tau <= 1:
            raise ValueError(
                f"slow_similarity_threshold: {quoted(tau)} is not a cosine; it must be a number in [-1, 1]"
            )

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
    def recalls(self) -> bool:
        """Whether slow frames are chosen anew from the film before every chunk (memory/recall.py)."""
        return self.policy == RECALL

    @property
    def evicts_redundant(self) -> bool:
        """Whether the slow frame most like two others is evicted, not the oldest."""
        return self.policy == "cover" or self.eviction == "redundant"

    @property
    def uses_threshold(self) -> bool:
        """Whether the policy compares similarities with slow_similarity_threshold."""
        return self.policy in (*NOVEL, "clean", RELEASED)

    @property
    def compares_with(self) -> str:
        """What a frame that leaves fast is compared with, for policies that keep the similarity."""
        return "the frame before it" if self.policy == "clean" else "everything remembered"

    @classmethod
    def from_dict(cls, raw: object) -> "MemoryConfig":
        """A config from a mapping. Raises ValueError for an unknown field."""
        return cls(**checked_fields(cls, raw, "memory"))


MEMORY_PRESETS: Mapping[str, MemoryConfig] = {
    "slow-fast": MemoryConfig(),
    "context-forcing": MemoryConfig(policy="clean"),
    "released": MemoryConfig(policy=RELEASED),
    "longlive": MemoryConfig(slow=0, fast=9, window=12, policy="fifo"),
    "infinity-rope": MemoryConfig(sink=1, slow=0, fast=5, window=6, policy="fifo"),
}
"""Memories by name: the default, the paper's, that of the released weights, and the sliding windows of LongLive and
Infinity-RoPE students (docs/method.md, Policies)."""


def memory_preset(name: str) -> MemoryConfig:
    """An entry of MEMORY_PRESETS. Raises ValueError for an unknown name."""
    if name not in MEMORY_PRESETS:
        raise ValueError(f"memory: {quoted(name)} is not one of {', '.join(MEMORY_PRESETS)}")
    return MEMORY_PRESETS[name]


def named_memory(name: str, trained: MemoryConfig) -> MemoryConfig:
    """A memory by name, with the chunk of a student that was trained with `trained`.

    Raises ValueError for an unknown name, and for one that needs more positions than the student has.
    """
    preset = memory_preset(name)
    if preset.window > trained.window:
        raise ValueError(f"memory: {name} needs a window of {preset.window} frames, the student has {trained.window}")
    return dataclasses.replace(preset, chunk=trained.chunk)
