"""`context-forcing evaluate`."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from .console import console, on_interrupt
from .options import Device, Dtype
from .workers import Count, Ray, Retries, open_engine

OUTPUT = "Folder for JSON, plots and filmstrips; results that are there are kept."
COMPARE = "Another student on the same scenes and noise, FILE or FILE=policy,policy. Repeatable."
GAPS = "Chunks (0.75 s) that the camera spends elsewhere before it returns; empty: none."
COLUMNS = "Columns from the landmarks to elsewhere; multiples of 3 from 9 to 33."
POLICIES = """novel, cover, recall, clean, fifo, uniform, released, none (no slow memory), oracle, rag, tether;
settings after colons, as in recall:slow=6. See docs/command_line.md."""
VIDEO = "Measure this video by --clip and --dino; no option above applies. Repeatable."


def evaluate(
    output: Annotated[Path, Option("--output", "-o", help=OUTPUT)],
    student: Annotated[str, Option(help="`demo`, or a student file.")] = "demo",
    compare: Annotated[list[str] | None, Option(help=COMPARE)] = None,
    policies: Annotated[str, Option(help=POLICIES)] = "recall,novel,none",
    rollouts: Annotated[int, Option(min=2, help="Scenes per seed.")] = 12,
    gaps: Annotated[str, Option(help=GAPS)] = "8",
    columns: Annotated[str, Option(help=COLUMNS)] = "9,18,27",
    minutes: Annotated[float, Option(min=0, help="Length of long rollouts, which measure drift; 0: none.")] = 0,
    long_rollouts: Annotated[int, Option(min=2, help="Long rollouts per seed.")] = 4,
    seed: Annotated[str, Option(help="Seeds of scenes and noise, comma-separated.")] = "0",
    workers: Count = None,
    ray: Ray = None,
    retries: Retries = 2,
    video: Annotated[list[Path] | None, Option(help=VIDEO)] = None,
    clip: Annotated[Path | None, Option(help="Folder of a CLIP model in the layout of transformers.")] = None,
    dino: Annotated[Path | None, Option(help="Folder of a DINOv2 model in the layout of transformers.")] = None,
    every: Annotated[float, Option(help="Seconds between the frames of a video that are compared.")] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure students on the demo world (recall over gaps, drift), or videos (consistency over time)."""
    from ..memory.files import hold_folder

    if video or clip or dino:
        from ..train.evaluation.consistency import evaluate_videos

        with hold_folder("output", output):
            tables = evaluate_videos(video or [], clip, dino, every, device, dtype, output)
    else:
        from ..train.evaluation.evaluate import Plan, evaluate, parse_students, whole_numbers

        plan = Plan(
            students=parse_students(student, compare or [], policies),
            gaps=whole_numbers("gaps", gaps),
            columns=whole_numbers("columns", columns),
            rollouts=rollouts,
            seeds=whole_numbers("seed", seed),
            minutes=minutes,
            long_rollouts=long_rollouts,
        )
        kept = lambda: f"{output}: not finished; finished scenes are kept, the same command continues"
        with on_interrupt(kept), hold_folder("output", output), open_engine(workers, ray, retries, device) as engine:
            tables = evaluate(plan, device, dtype, output, engine)
    for table in tables:
        Console(width=max(240, console.width)).print(table, highlight=False)
