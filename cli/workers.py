"""Options and tables of commands that give their work to workers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer import Option

from ..memory.fields import counted
from .console import console

if TYPE_CHECKING:
    from ..workers.engine import Engine, Progress, Workers

HERE = "Workers. Default: none, all is done in this process; with --ray one for each GPU or CPU."
Count = Annotated[int | None, Option("--workers", min=1, help=HERE)]
Ray = Annotated[str | None, Option(help="Work on a Ray cluster: auto, HOST:PORT, or local, which starts one here.")]
Retries = Annotated[int, Option(min=0, max=100, help="How often work is tried again whose worker died.")]
STYLES = {"failed": "bold red", "running": "bold", "waiting": "dim", "was there": "dim"}


def open_workers(count: int | None, ray: str | None, device: str) -> "Workers":
    """The workers of the options --workers, --ray and --device. Raises ValueError."""
    from ..workers.local import LocalWorkers
    from ..workers.ray_workers import RayWorkers

    return LocalWorkers(count, device) if ray is None else RayWorkers(ray, count, device)


@contextlib.contextmanager
def open_engine(count: int | None, ray: str | None, retries: int, device: str) -> "Iterator[Engine | None]":
    """Workers, if an option asks for them, under a table of what they do; None: all is done in this process."""
    if count is None and ray is None:
        yield None
        return
    from ..workers.engine import Engine

    with Engine(open_workers(count, ray, device), retries) as engine, live(lambda: _running_table(engine)):
        yield engine


def live(table: Callable[[], Table]) -> Live:
    """A table that is drawn again every second, until the end of the block."""
    return Live(console=console, get_renderable=table, refresh_per_second=1, transient=True)


def progress_table(
    rows: "Iterable[Progress]",
    title: str,
    total: Iterable[str],
    columns: "Mapping[str, Callable[[Progress], str]]",
) -> Table:
    """What is done and where; `columns` are those between state and worker. `total` is the last row, without worker."""
    table = Table(box=None, pad_edge=False)
    for name in (title, "state", *columns, "worker", "note"):
        table.add_column(name, justify="left" if name in (title, "state", "note") else "right", overflow="fold")
    for row in rows:
        place = "" if row.place is None else str(row.place + 1)
        tries = f"attempt {row.attempts}" if row.attempts > 1 else ""
        cells = [column(row) for column in columns.values()]
        note = Text(row.problem or tries)
        table.add_row(Text(row.job.name), row.state, *cells, place, note, style=STYLES.get(row.state, ""))
    table.add_row(*total, style="bold")
    return table


def _running_table(engine: "Engine") -> Table:
    lost = f"{counted(engine.lost_workers, 'worker')} lost" if engine.lost_workers else ""
    total = (f"{engine.total} jobs", f"{engine.num_ended} finished", "", "", "", lost)
    columns = {"kept": lambda row: f"{row.kept or ''}", "seconds": lambda row: f"{row.seconds:.0f}"}
    return progress_table(list(engine.running.values()), "job", total, columns)
