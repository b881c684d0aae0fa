"""Many videos on many workers: one after the other in each, tried again if a worker dies."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..memory.files import lock_name
from ..workers.engine import MADE, WAITING, Engine, Progress, Workers
from ..workers.job import Outcome
from .jobs import VideoJob
from .journal import journal_path, remove_journal
from .mp4 import hold_output, part_name

log = logging.getLogger("context_forcing")

THERE = "was there"


@dataclass(kw_only=True)
class Batch:
    """The videos of a jobs file, and how far they are."""

    videos: list[Progress[VideoJob]]
    lost_workers: int = 0

    @classmethod
    def of(cls, jobs: Sequence[VideoJob]) -> "Batch":
        """Videos that are there are not made again; what a killed process left beside them is deleted."""
        videos = [Progress(job=job, kept=job.num_kept()) for job in jobs]
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
        with Engine(workers, retries) as engine:
            waiting = [video for video in self.videos if video.state == WAITING]
            for video in waiting:
                _make_folder(video.job.output.parent)
            engine.waiting.extend(waiting)
            while engine.is_busy:
                for video in engine.step():
                    _settle(video)
                self.lost_workers = engine.lost_workers
                on_change()


def _settle(video: Progress) -> None:
    """What a video that ended still needs: its messages, and what is kept of it."""
    if isinstance(video.outcome, Outcome):
        for message in video.outcome.messages:
            log.info("%s: %s", video.job.output.name, message)
        if video.problem:
            log.error("%s: %s", video.job.output, video.problem)
    else:
        video.problem += f"; {video.kept} chunks are kept"
    if video.state == MADE:
        video.kept = video.job.num_chunks


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
