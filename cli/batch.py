"""`context-forcing batch`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from typer import Argument, Exit, Option

from ..memory.fields import counted
from .console import on_interrupt, say
from .options import Device
from .workers import live, open_workers, progress_table

if TYPE_CHECKING:
    from ..video.batch import Batch

JOBS = "YAML: `output`, a pattern; `stories`; optional `students`, `seeds` and `options` of generate for all videos."
WORKERS = "Videos that are made at the same time. Default: one for each GPU; one on the CPU, with --ray one for each."
RAY = "Make them on a Ray cluster: auto, HOST:PORT, or local, which starts one here."
RETRIES = "How often a video is tried again whose worker died."


def batch(
    jobs: Annotated[Path, Argument(help=JOBS)],
    workers: Annotated[int | None, Option(min=1, help=WORKERS)] = None,
    ray: Annotated[str | None, Option(help=RAY)] = None,
    retries: Annotated[int, Option(min=0, max=100, help=RETRIES)] = 2,
    device: Device = "auto",
) -> None:
    """Generate many videos (stories x students x seeds). The same command continues what was stopped."""
    from ..video.batch import THERE, Batch
    from ..video.jobs import read_jobs
    from ..workers.engine import FAILED, MADE, WAITING

    batch = Batch.of(read_jobs(jobs, device))
    began = time.monotonic()
    if batch.count(WAITING):
        places = open_workers(workers, ray, device)
        kept = lambda: f"{jobs}: not finished; finished chunks are kept, the same command continues"
        with on_interrupt(kept), live(lambda: _table(batch, unfinished=True)):
            batch.run(places, retries)
    Console().print(_table(batch))
    there = f"{batch.count(THERE)} {'was' if batch.count(THERE) == 1 else 'were'} there"
    say(f"{counted(len(batch.videos), 'video')}: {batch.count(MADE)} made, {there}, {batch.count(FAILED)} failed;"
        f" {counted(batch.lost_workers, 'worker')} lost; {time.monotonic() - began:.1f} s")  # fmt: skip
    if batch.count(FAILED):
        raise Exit(1)


def _table(batch: "Batch", unfinished: bool = False) -> Table:
    """All videos; with `unfinished` those that run or failed. The last row is the sum."""
    rows = [video for video in batch.videos if not unfinished or video.state in ("running", "failed")]
    made, chunks = sum(v.kept for v in batch.videos), sum(v.job.num_chunks for v in batch.videos)
    finished = sum(v.state in ("made", "was there") for v in batch.videos)
    total = (f"{len(batch.videos)} videos", f"{finished} finished", f"{made}/{chunks}")
    columns = {
        "chunks": lambda video: f"{video.kept}/{video.job.num_chunks}",
        "frames/s": lambda video: (
            f"{video.steps_per_second * video.job.chunk_frames:.1f}" if video.attempts and video.seconds else ""
        ),
    }
    return progress_table(rows, "video", total, columns)
