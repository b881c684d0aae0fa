"""What the commands print to."""

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def say(message: str) -> None:
    """Print a message as it is; the terminal wraps its lines."""
    console.print(escape(message), highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """A bar for tasks with a field `note`."""
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(TextColumn("{task.description}"), *columns, console=console)
