"""`context-forcing convert`."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from .console import say
from .options import Card, Loras, Settings, Weights


def convert(
    source: Annotated[Path, Argument(help="Student as published: .safetensors, .pt, shards, diffusers or Wan folder.")],
    output: Annotated[Path | None, Option("--output", "-o", help="Student to write, .safetensors, with card.")] = None,
    inspect: Annotated[bool, Option("--inspect", help="Print what it is, or why it cannot be used.")] = False,
    weights: Weights = "auto",
    card: Card = "auto",
    settings: Settings = None,
    lora: Loras = None,
    dtype: Annotated[str, Option(help="keep, bf16, fp16 or fp32.")] = "keep",
    force: Annotated[bool, Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert any published Wan 2.1 student into one file with a card, or print what a file is."""
    from ..model.checkpoints import convert as conversion
    from ..model.checkpoints.student import StudentSource

    if inspect == (output is not None):
        raise ValueError("output: give -o with the file to write, or --inspect to only look")
    student = StudentSource.parse(source, weights, card, settings or (), lora or ())
    if output is not None:
        written = conversion.convert(student, output, dtype, force)
        if written.note:
            say(written.note)
        size = f"{output.stat().st_size / 1e9:.2f} GB"
        Console().print(Text(f"{output}: {written.card.name}, {size}"), soft_wrap=True)
        return
    rows = conversion.inspect(student)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(name, Text(value, style="bold red" if name == "refused" else "", overflow="fold"))
    Console().print(table)
    if rows[-1][0] == "refused":
        raise Exit(2)
