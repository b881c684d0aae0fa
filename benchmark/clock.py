"""Seconds of the parts of a chunk, and the most memory that a function holds."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Switch = Callable[[str | None], str | None]
"""PartClock.switch, or `no_clock` where nothing is timed."""


def no_clock(part: str | None) -> str | None:
    """Times nothing."""
    return part


@dataclass
class PartClock:
    """Adds up the seconds of named parts that follow each other. On CUDA each part waits for the device to finish."""

    device: torch.device
    wall: dict[str, float] = field(default_factory=dict)
    """Seconds that passed, by part."""
    cpu: dict[str, float] = field(default_factory=dict)
    """Seconds that the threads of this process computed, by part. Other programs do not add to them."""
    part: str | None = None
    """The part that is running; None: nothing is counted."""
    began: tuple[float, float] = (0.0, 0.0)

    def switch(self, part: str | None) -> str | None:
        """End the running part, and begin another. Returns the part that ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, ended = (time.perf_counter(), time.process_time()), self.part
        if ended is not None:
            for seconds, since, at in zip((self.wall, self.cpu), self.began, now):
                seconds[ended] = seconds.get(ended, 0.0) + at - since
        self.part, self.began = part, now
        return ended

    def take(self) -> "Spent":
        """The seconds so far; the clock stops and begins again at zero."""
        self.switch(None)
        spent = Spent(wall=self.wall, cpu=self.cpu)
        self.wall, self.cpu = {}, {}
        return spent


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds by part."""

    wall: dict[str, float]
    cpu: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of all parts."""
        return sum(self.wall.values())

    def without(self, part: str) -> tuple[float, float]:
        """Seconds and CPU seconds of all parts but one."""
        wall, cpu = (sum(spent.values()) - spent.get(part, 0.0) for spent in (self.wall, self.cpu))
        return wall, cpu


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """Most bytes held at once on a device of what `function` allocates."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler and profiler.profiler.kineto_results
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_rss() -> int | None:
    """Most bytes of RAM that this process has had so far; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
