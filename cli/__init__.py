"""The `context-forcing` command."""

import atexit
import logging
import signal
import sys
from typing import NoReturn

try:
    import typer
    from rich.logging import RichHandler
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"context-forcing: {error.name} is not installed; pip install 'context-forcing[headless]'"
    ) from None

from ..memory.fields import brief
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
        _fail(str(error), 2 if isinstance(error, ValueError) else 1)
    except (MemoryError, RuntimeError) as error:
        from ..model.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail(f"out of memory ({brief(error)}); close other programs, or choose a smaller size, model or batch", 2)
    finally:
        # The work has ended: an interrupt while Python ends changes nothing.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _fail(message: str, code: int) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(code)
