"""Many jobs on many workers: one after the other in each, tried again if a worker dies."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from .job import Death, Job, Outcome

log = logging.getLogger("context_forcing")

WAITING, RUNNING, MADE, FAILED = "waiting", "running", "made", "failed"
POLL_SECONDS = 1.0
AHEAD = 4
"""Jobs in order that are begun, for each place, before the first of them has ended and is taken."""
AnyJob = TypeVar("AnyJob", bound=Job)


class Workers(Protocol):
    """Workers in `count` places. A place that has no worker gets one with its next job."""

    count: int
    device: str
    """What they compute on, cuda or cpu."""

    def give(self, place: int, job: Job) -> None:
        """Begin a job in a place where none is being done."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, Outcome | Death]]:
        """What ended in which place, after at most so many seconds. One that died has left its place."""
        ...

    def close(self) -> None:
        """End all workers; what jobs keep on the disk stays."""
        ...


@dataclass(kw_only=True)
class Progress(Generic[AnyJob]):
    """How far one job is."""

    job: AnyJob
    state: str = WAITING
    place: int | None = None
    """The worker's, while it runs."""
    attempts: int = 0
    kept: int = 0
    """Steps that are on the disk."""
    problem: str = ""
    outcome: Outcome | Death | None = None
    """Of the last attempt, when it has ended."""
    seconds: float = 0.0
    """Of the last attempt."""
    _began: tuple[float, int] = (0.0, 0)

    @property
    def has_ended(self) -> bool:
        return self.state in (MADE, FAILED)

    @property
    def steps_per_second(self) -> float:
        """Of the last attempt, loading included."""
        return (self.kept - self._began[1]) / max(1e-6, self.seconds)

    @property
    def result(self) -> Any:
        """What came of the job. Raises ValueError if it failed."""
        if not isinstance(self.outcome, Outcome) or self.problem:
            raise ValueError(self.problem if isinstance(self.outcome, Outcome) else f"{self.job.name}: {self.problem}")
        return self.outcome.result

    def begin(self, place: int) -> None:
        """An attempt begins."""
        self.state, self.place, self.attempts, self.outcome = RUNNING, place, self.attempts + 1, None
        self.kept = self.job.num_kept()
        self._began = time.monotonic(), self.kept

    def look(self) -> None:
        """Count the steps that are on the disk."""
        self.kept, self.seconds = max(self.kept, self.job.num_kept()), time.monotonic() - self._began[0]

    def end(self, outcome: Outcome | Death, retries: int) -> None:
        """An attempt ended; its worker is free again, or dead."""
        self.look()
        self.place, self.outcome = None, outcome
        if isinstance(outcome, Outcome):
            self.state, self.problem = FAILED if outcome.problem else MADE, outcome.problem
        elif self.attempts > retries:
            self.state, self.problem = FAILED, f"its worker died {self.attempts} times, the last {outcome.reason}"
        else:
            tries = f"tried again, {self.attempts} of {retries}"
            log.warning("%s: its worker died (%s); %s", self.job.name, outcome.reason, tries)
            self.state = WAITING


class Engine:
    """Gives jobs to workers. At its end as a context it ends the workers, also of an interrupt."""

    def __init__(self, workers: Workers, retries: int = 2):
        """A job whose worker dies is tried `retries` times more."""
        self.workers, self.retries = workers, retries
        self.waiting: deque[Progress] = deque()
        self.running: dict[int, Progress] = {}
        """By place."""
        self.num_ended = self.lost_workers = 0
        self.total = 0
        """Jobs that are given in order."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self, seconds: float | None = None) -> list[Progress]:
        """Fill free places, wait so many seconds at most (default POLL_SECONDS); returns the jobs that ended."""
        for place in range(self.workers.count):
            if self.waiting and place not in self.running:
                progress = self.running[place] = self.waiting.popleft()
                progress.begin(place)
                self.workers.give(place, progress.job)
        ended = []
        for place, outcome in self.workers.wait(POLL_SECONDS if seconds is None else seconds) if self.running else ():
            progress = self.running.pop(place)
            progress.end(outcome, self.retries)
            self.lost_workers += isinstance(outcome, Death)
            if progress.has_ended:
                ended.append(progress)
            else:
                self.waiting.appendleft(progress)
        for progress in self.running.values():
            progress.look()
        self.num_ended += len(ended)
        return ended

    def in_order(self, jobs: Iterable[AnyJob], total: int) -> Iterator[Progress[AnyJob]]:
        """Jobs that ended, in the order in which they are given; `total` is their number, for a table.

        At most AHEAD of them for each place are begun before the first has ended and is taken.
        """
        self.num_ended, self.total = 0, total
        begun: deque[Progress[AnyJob]] = deque()
        jobs = iter(jobs)
        while True:
            while len(begun) < AHEAD * self.workers.count and (job := next(jobs, None)) is not None:
                begun.append(Progress(job=job))
                self.waiting.append(begun[-1])
            if not begun:
                return
            self.step(0 if begun[0].has_ended else None)
            if begun[0].has_ended:
                first = begun.popleft()
                if isinstance(first.outcome, Outcome):
                    for message in first.outcome.messages:
                        log.info("%s: %s", first.job.name, message)
                yield first
