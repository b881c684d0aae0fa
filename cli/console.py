"""What the commands print to."""

import contextlib
import os
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def is_main() -> bool:
    """Whether this is the first of the processes that `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a message as it is; the terminal wraps its lines."""
    console.print(escape(message), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def on_interrupt(message: Callable[[], str]) -> Iterator[None]:
    """Say what is kept and how to go on, if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        say(message())
        raise


def progress_bar() -> Progress:
    """A bar for tasks with a field `note`."""
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(TextColumn("{task.description}"), *columns, console=console)
