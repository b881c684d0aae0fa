"""The `context-forcing` command."""

import logging
import sys

try:
    import typer
    from rich.logging import RichHandler
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"context-forcing: {error.name} is not installed; pip install 'context-forcing[headless]'"
    ) from None

from .console import console
from .convert import convert
from .doctor import doctor
from .encode import encode
from .evaluate import evaluate
from .generate import generate
from .report import report
from .train import train

app = typer.Typer(
    help="Generate long videos that stay consistent: prompts chained over one Slow-Fast memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, report, train, encode, evaluate, convert, doctor):
    app.command()(command)


@app.callback()
def _root() -> None:
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command. An error that a user can cause is one line; the exit code is 2."""
    try:
        app()
    except (ValueError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
