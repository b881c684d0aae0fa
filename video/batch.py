"""Many videos on many workers: one after the other in each, tried again if a worker dies."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..memory.files import lock_name
from .jobs import VideoJob
from .journal import journal_path, num_kept, remove_journal
from .mp4 import hold_output, part_name
from .workers import Death, Outcome, Workers

log = logging.getLogger("context_forcing")

WAITING, RUNNING, MADE, THERE, FAILED = "waiting", "running", "made", "was there", "failed"
POLL_SECONDS = 1.0


@dataclass(kw_only=True)
class Progress:
    """How far one video is."""

    job: VideoJob
    state: str = WAITING
    place: int | None = None
    """The worker's, while it runs."""
    attempts: int = 0
    kept: int = 0
    """Chunks that are made."""
    problem: str = ""
    num_frames: int = 0
    seconds: float = 0.0
    """Of the last attempt."""
    _began: tuple[float, int] = field(default=(0.0, 0))

    def begin(self, place: int) -> None:
        """An attempt begins."""
        self.state, self.place, self.attempts = RUNNING, place, self.attempts + 1
        self.kept = num_kept(self.job.output)
        self._began = time.monotonic(), self.kept

    def look(self) -> None:
        """Count the chunks that the journal has."""
        self.kept, self.seconds = max(self.kept, num_kept(self.job.output)), time.monotonic() - self._began[0]

    @property
    def frames_per_second(self) -> float:
        """Of the last attempt, loading included."""
        return (self.kept - self._began[1]) * self.job.chunk_frames / max(1e-6, self.seconds)

    def end(self, outcome: Outcome) -> None:
        """Its worker is free again."""
        self.look()
        self.state, self.problem, self.num_frames = (
            FAILED if outcome.problem else MADE,
            outcome.problem,
            outcome.num_frames,
        )
        self.place = None
        if self.state == MADE:
            self.kept = self.job.num_chunks


@dataclass(kw_only=True)
class Batch:
    """The videos of a jobs file, and how far they are."""

    videos: list[Progress]
    lost_workers: int = 0

    @classmethod
    def of(cls, jobs: Sequence[VideoJob]) -> "Batch":
        """Videos that are there are not made again; what a killed process left beside them is deleted."""
        videos = [Progress(job=job, kept=num_kept(job.output)) for job in jobs]
        for video in videos:
            if video.job.is_made:
                video.state, video.kept = THERE, video.job.num_chunks
                _tidy(video.job.output)
        return cls(videos=videos)

    def count(self, state: str) -> int:
        """Videos in a state."""
        return sum(video.state == state for video in self.videos)

    def run(self, workers: Workers, retries: int = 2, on_change: Callable[[], None] = lambda: None) -> None:
        """Make all videos that wait. A video whose worker dies is tried `retries` times more, from its journal.

        `on_change` is called about once a second. Raises ValueError if a folder of the outputs cannot be made. Workers
        are closed at the end, also of an interrupt.
        """
        try:
            waiting = deque(video for video in self.videos if video.state == WAITING)
            for video in waiting:
                _make_folder(video.job.output.parent)
            running: dict[int, Progress] = {}
            while waiting or running:
                for place in range(workers.count):
                    if waiting and place not in running:
                        running[place] = waiting.popleft()
                        running[place].begin(place)
                        workers.give(place, running[place].job.request)
                for place, outcome in workers.wait(POLL_SECONDS):
                    video = running.pop(place)
                    if isinstance(outcome, Outcome):
                        _log(video, outcome)
                        video.end(outcome)
                    elif self._is_tried_again(video, outcome, retries):
                        waiting.appendleft(video)
                for video in running.values():
                    video.look()
                on_change()
        finally:
            workers.close()

    def _is_tried_again(self, video: Progress, death: Death, retries: int) -> bool:
        self.lost_workers += 1
        video.look()
        video.place = None
        if video.attempts > retries:
            video.state = FAILED
            video.problem = (
                f"its worker died {video.attempts} times, the last {death.reason}; {video.kept} chunks are kept"
            )
            return False
        log.warning(
            "%s: its worker died (%s); tried again, %d of %d", video.job.output, death.reason, video.attempts, retries
        )
        video.state = WAITING
        return True


def _log(video: Progress, outcome: Outcome) -> None:
    for message in outcome.messages:
        log.info("%s: %s", video.job.output.name, message)
    if outcome.problem:
        log.error("%s: %s", video.job.output, outcome.problem)


def _tidy(output: Path) -> None:
    """Delete what a killed process left beside a whole video, unless another process has it or it cannot be deleted."""
    journal = journal_path(output)
    if any(path.exists() for path in (journal, lock_name(output), part_name(output))):
        with contextlib.suppress(ValueError, OSError), hold_output(output):
            remove_journal(journal)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be made ({error.strerror})") from None
