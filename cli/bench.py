"""`context-forcing bench`."""

import re
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from .console import console, say
from .options import Card, Decoder, Loras, ModelsDir, Settings, Student, TextEncoder, Vae, Weights

SIZE = "Random weights instead of a student: demo, wan2.1-1.3b, wan2.1-14b."
FRAME = "Width and height in pixels, 832x480; several as 832x480,416x240. Default: the student's."
OPTIONS = """Options to compare, "attention=sdpa,flash dtype=bf16,fp32": every combination, in turn. Of attention,
dtype, kv_placement, kv_dtype, compile, offload, memory, policy, commit_attends. Repeatable."""
PORTS = "Time ports of ComfyUI's ar_video and of Self-Forcing's loop beside ours."
FILM = "Also decode and encode a video, end to end."
GROWTH = "Compare the chunk after 12 chunks with the one after 300."
DRIFT = "Compare a video under every setup with the first one's: latents, and motion."


def bench(
    student: Student = "demo",
    size: Annotated[str | None, Option(help=SIZE)] = None,
    layers: Annotated[int | None, Option(help="Layers of --size; default: all.")] = None,
    frame: Annotated[str | None, Option(help=FRAME)] = None,
    options: Annotated[list[str] | None, Option(help=OPTIONS)] = None,
    chunks: Annotated[int, Option(min=1, help="Timed chunks of every loop.")] = 5,
    warmup: Annotated[int, Option(min=1, help="Chunks before them that are not counted.")] = 2,
    ports: Annotated[bool, Option(help=PORTS)] = True,
    film: Annotated[bool, Option(help=FILM)] = True,
    growth: Annotated[bool, Option("--growth", help=GROWTH)] = False,
    drift: Annotated[bool, Option("--drift", help=DRIFT)] = False,
    seconds: Annotated[float, Option(min=1, help="Length of the videos of --drift.")] = 60.0,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of noise and random weights.")] = 0,
    json: Annotated[Path | None, Option(help="File for every figure.")] = None,
    vae: Vae = None,
    decoder: Decoder = None,
    text_encoder: TextEncoder = None,
    models_dir: ModelsDir = None,
    weights: Weights = "auto",
    card: Card = "auto",
    settings: Settings = None,
    lora: Loras = None,
    device: Annotated[str, Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Measure speed and memory of a student, or of random weights of a published size."""
    from ..benchmark.measure import Plan, measure
    from ..benchmark.subject import parse_setups, random_subject, student_subject
    from ..benchmark.tables import tables_of, write_json
    from ..memory.files import check_writable
    from ..model.checkpoints.locate import locate_student
    from ..model.checkpoints.student import StudentSource
    from ..model.device import pick_device

    setups = tuple(parse_setups(options or []))
    where = pick_device(device)[0]
    if json is not None:
        check_writable("--json", json)
    if layers is not None and size is None:
        raise ValueError("--layers: a student has all of its layers; give --size too, or leave it out")
    if size is None:
        source = StudentSource.parse(locate_student(student, models_dir), weights, card, settings or (), lora or ())
        subject = student_subject(
            source, where, text_encoder=text_encoder, vae=vae, decoder=decoder, models_dir=models_dir
        )
    else:
        subject = random_subject(size, layers, where, seed)
    sizes = _sizes(frame) if frame else (subject.card.size,)
    plan = Plan(
        setups=setups, sizes=sizes, chunks=chunks, warmup=warmup, ports=ports, film=film, growth=growth, drift=drift,
        seconds=seconds, seed=seed,
    )  # fmt: skip
    results = measure(subject, plan, say)
    if json is not None:
        write_json(json, subject, plan, results)
    for table in tables_of(subject, plan, results):
        Console(width=max(200, console.width)).print(table, highlight=False)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`832x480,416x240` -> ((832, 480), (416, 240)). Raises ValueError."""
    matches = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", part) for part in text.split(",")]
    if not all(matches):
        raise ValueError(f"--frame: {text!r} is not WIDTHxHEIGHT in pixels, for example 832x480 or 832x480,416x240")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)
