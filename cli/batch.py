"""`context-forcing batch`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from .console import console, say
from .options import Device

if TYPE_CHECKING:
    from ..video.batch import Batch, Progress

JOBS = "YAML: `output`, a pattern; `stories`; optional `students`, `seeds` and `options` of generate for all videos."
WORKERS = "Videos that are made at the same time. Default: one for each GPU; one on the CPU, with --ray one for each."
RAY = "Make them on a Ray cluster: auto, HOST:PORT, or local, which starts one here."
RETRIES = "How often a video is tried again whose worker died."
STYLES = {"failed": "bold red", "running": "bold", "waiting": "dim", "was there": "dim"}


def batch(
    jobs: Annotated[Path, Argument(help=JOBS)],
    workers: Annotated[int | None, Option(min=1, help=WORKERS)] = None,
    ray: Annotated[str | None, Option(help=RAY)] = None,
    retries: Annotated[int, Option(min=0, max=100, help=RETRIES)] = 2,
    device: Device = "auto",
) -> None:
    """Generate many videos (stories x students x seeds). The same command continues what was stopped."""
    from ..video.batch import FAILED, MADE, THERE, WAITING, Batch
    from ..video.jobs import read_jobs
    from ..video.ray_workers import RayWorkers
    from ..video.workers import LocalWorkers

    batch = Batch.of(read_jobs(jobs, device))
    began = time.monotonic()
    if batch.count(WAITING):
        places = LocalWorkers(workers, device) if ray is None else RayWorkers(ray, workers, device)
        table = lambda: _table(batch, unfinished=True)
        with Live(console=console, get_renderable=table, refresh_per_second=1, transient=True):
            batch.run(places, retries)
    Console().print(_table(batch))
    counts = (f"{batch.count(state)} {state}" for state in (MADE, THERE, FAILED))
    say(f"{len(batch.videos)} videos: {', '.join(counts)}; {batch.lost_workers} workers lost;"
        f" {time.monotonic() - began:.1f} s")  # fmt: skip
    if batch.count(FAILED):
        raise Exit(1)


def _table(batch: "Batch", unfinished: bool = False) -> Table:
    """All videos; with `unfinished` those that run or failed. The last row is the sum."""
    table = Table(box=None, pad_edge=False)
    for name in ("video", "state", "chunks", "frames/s", "worker", "note"):
        table.add_column(name, justify="right" if name in ("chunks", "frames/s", "worker") else "left", overflow="fold")
    for video in batch.videos:
        if not unfinished or video.state in ("running", "failed"):
            table.add_row(*_row(video), style=STYLES.get(video.state, ""))
    made, chunks = sum(v.kept for v in batch.videos), sum(v.job.num_chunks for v in batch.videos)
    finished = sum(v.state in ("made", "was there") for v in batch.videos)
    table.add_row(f"{len(batch.videos)} videos", f"{finished} finished", f"{made}/{chunks}", "", "", "", style="bold")
    return table


def _row(video: "Progress") -> list[str | Text]:
    speed = f"{video.frames_per_second:.1f}" if video.attempts and video.seconds else ""
    place = "" if video.place is None else str(video.place + 1)
    tries = f"attempt {video.attempts}" if video.attempts > 1 else ""
    return [
        Text(str(video.job.output)), video.state, f"{video.kept}/{video.job.num_chunks}", speed, place,
        Text(video.problem or tries),
    ]  # fmt: skip
