"""The `context-forcing` command."""

import atexit
import contextlib
import logging
import signal
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn, cast

try:
    import typer
    from rich.logging import RichHandler
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"context-forcing: {error.name} is not installed; pip install 'context-forcing[headless]'"
    ) from None

from ..memory.fields import one_line
from ..memory.files import of_disk
from .batch import batch
from .bench import bench
from .console import console, is_main
from .convert import convert
from .doctor import doctor
from .encode import encode
from .evaluate import evaluate
from .generate import generate
from .report import report
from .train import train

app = typer.Typer(
    help="Generate long videos that stay consistent: prompts chained over one Slow-Fast memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, batch, report, train, encode, evaluate, convert, bench, doctor):
    app.command()(command)


OTHERS_WAIT = 5
"""Seconds in which `torchrun` ends the other processes after an error of the first one, which has then told it."""
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])
"""What typer raises for a command line that it cannot read. It has no name of its own for it."""


def _show_version(is_wanted: bool) -> None:
    if not is_wanted:
        return
    try:
        typer.echo(f"context-forcing {version('context-forcing')}")
    except PackageNotFoundError:
        raise ValueError("--version: context-forcing is not installed; pip install it") from None
    raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    handler = RichHandler(console=console, show_time=False, show_path=False)
    level = logging.INFO if is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command. An error that a user can cause is one line; the exit code is 2.

    SIGTERM ends it as Ctrl-C does, at any moment with exit code 130 and no traceback.
    """
    try:
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            _run()
    except KeyboardInterrupt:  # before typer runs the command, or after
        sys.exit(130)


def _run() -> NoReturn:
    try:
        code = app(["--help"] if len(sys.argv) == 1 else None, standalone_mode=False)
    except UsageError as error:
        _fail(f"{error.format_message().rstrip('.')}; --help lists the options", 2)
    except typer.Abort:  # an interrupt, of older typer
        sys.exit(130)
    except OSError as error:
        _fail(of_disk(error), 2)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error), 2 if isinstance(error, ValueError) else 1)
    except (MemoryError, RuntimeError) as error:
        from ..model.device import is_out_of_memory, out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail(out_of_memory(error), 2)
    finally:
        # The work has ended: an interrupt while Python ends changes nothing.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    if not is_main():
        time.sleep(OTHERS_WAIT)
    console.print(f"[bold red]error:[/] {escape(one_line(message))}", highlight=False, soft_wrap=True)
    sys.exit(code)
