"""What `context-forcing bench` finds, as values."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .clock import Spent


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One loop, timed in turn with the others. Parts: denoise, commit; text, for loops that embed it in every pass."""

    name: str
    rounds: tuple[Spent, ...]
    frames: int
    """Pixel frames of a chunk."""
    weights_bytes: int
    predicted_bytes: int | None
    """Most bytes on the device beside the weights; None for ports."""
    measured_bytes: int
    difference: float
    """Of the chunk's x0 to that of the first loop, relative to its norm."""

    @property
    def frames_per_second(self) -> float:
        return self.frames / statistics.median(spent.seconds for spent in self.rounds)


@dataclass(frozen=True, kw_only=True)
class Film:
    """A video of one setup, twice: its parts one after the other, then as `generate` makes it, on two threads."""

    name: str
    text_seconds: float
    """Embedding of the prompt, once a segment."""
    chunks: tuple[Spent, ...]
    """Those after the warm-up, one after the other. Parts: denoise, commit, decode, encode."""
    overlapped: tuple[float, ...]
    """Seconds of the same chunks on two threads: decoding and encoding of one run beside denoising of the next."""
    end_seconds: float
    """From the last chunk to the finished file, on two threads."""
    frames: int
    """Pixel frames of a chunk."""

    @property
    def frames_per_second(self) -> float:
        """End to end, on two threads."""
        return self.frames / statistics.median(self.overlapped)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One setup at two lengths of a video, timed in turn."""

    name: str
    early: tuple[Spent, ...]
    late: tuple[Spent, ...]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A video under one setup beside the same one under the first setup."""

    name: str
    difference: tuple[float, ...]
    """Of the latents of each chunk, relative to their norm under the first setup."""
    motion: tuple[float, ...]
    """Mean absolute difference of consecutive pixel frames from one chunk to the next, % of the full range."""
    reference_motion: tuple[float, ...]
    """The same under the first setup."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that was measured at one size."""

    size: tuple[int, int]
    """Width and height in pixels."""
    speed: tuple[Speed, ...]
    films: tuple[Film, ...]
    growth: tuple[Growth, ...]
    drift: tuple[Drift, ...]
    not_run: dict[str, str]
    """Loops that this machine cannot run, each with the reason."""


def ratios(ones: Sequence[Spent], others: Sequence[Spent], without: str = "") -> tuple[float, float]:
    """Median over the rounds of one loop's time as a share of another's in the same round: wall clock, CPU seconds.

    A part can be left out, as the text for networks cut to a few layers: it takes the same time in all of them.
    """
    pairs = zip(ones, others, strict=True)
    shares = [[a / max(1e-9, b) for a, b in zip(one.without(without), other.without(without))] for one, other in pairs]
    wall, cpu = map(statistics.median, zip(*shares))
    return wall, cpu


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return ((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm()).item()


def median_of(spents: Iterable[Spent], part: str) -> float:
    """Median seconds of one part."""
    return statistics.median(spent.wall.get(part, 0.0) for spent in spents)
