"""`context-forcing convert`, and the options that say how a student file is to be read."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..model.checkpoints.student import StudentSource

Weights = Annotated[
    str,
    typer.Option("--weights", help="Which set a training checkpoint gives: auto, generator or generator_ema."),
]
Card = Annotated[
    str,
    typer.Option("--card", help="The published student it is: self-forcing, longlive, ... auto: what is in the file."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a field of its card: steps=1000,500, shift=3, memory.slow=0. Repeatable."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="A LoRA to merge, FILE or FILE:strength. Repeatable."),
]


def student_source(
    path: Path | None, weights: str, card: str, settings: list[str] | None, loras: list[str] | None
) -> "StudentSource":
    """A student file and these options."""
    from ..model.checkpoints.lora import parse_lora
    from ..model.checkpoints.student import StudentSource

    overrides = tuple(part for text in settings or () for part in re.split(r"\s+(?=[\w.]+=)", text))
    merged = tuple(parse_lora(text) for text in loras or ())
    return StudentSource(path, weights=weights, card=card, overrides=overrides, loras=merged)


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A student as published: .safetensors, .pt, parts, a folder of diffusers or Wan."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The student to write, .safetensors, with its card.")
    ] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Only say what it is, or why it cannot be used.")] = False,
    weights: Weights = "auto",
    card: Card = "auto",
    settings: Settings = None,
    lora: Loras = None,
    dtype: Annotated[str, typer.Option(help="keep, bf16, fp16 or fp32.")] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Turn any published Wan 2.1 student into one file with a card, or say what a file is."""
    from ..model.checkpoints import convert as made

    if inspect == (output is not None):
        raise ValueError("output: give the file to write with -o, or --inspect to only look")
    chosen = student_source(source, weights, card, settings, lora)
    if inspect:
        rows = made.inspect(chosen)
        table = Table(box=None, show_header=False, pad_edge=False)
        for what, says in rows:
            table.add_row(what, Text(says, style="bold red" if what == "refused" else "", overflow="fold"))
        Console().print(table)
        if rows[-1][0] == "refused":
            raise typer.Exit(2)
        return
    student = made.convert(chosen, output, dtype, force)
    if student.note:
        Console(stderr=True).print(Text(student.note), soft_wrap=True)
    Console().print(Text(f"{output}: {student.card.name}, {output.stat().st_size / 1e9:.2f} GB"), soft_wrap=True)
