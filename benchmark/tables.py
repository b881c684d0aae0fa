"""What `context-forcing bench` prints and writes."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from ..memory.files import atomic_path
from ..model.device import name_of_dtype
from ..video.provenance import git_revision, libraries, machine_of
from .clock import peak_rss
from .measure import EARLY, LATE, Plan
from .results import Drift, Film, Growth, Result, Speed, median_of, ratios
from .subject import PROMPT, Setup, Subject

PARTS = ("denoise", "commit", "decode", "encode")


def header(subject: Subject, plan: Plan) -> dict[str, str]:
    """What was measured, on what, and how."""
    setup = plan.setups[0]
    network = subject.pipeline(setup).network
    memory = subject.empty_memory(setup, plan.size)
    config = memory.config
    rows, columns = network.grid(memory.latent_size)
    text = subject.pipeline(setup).text_encoder.encode(PROMPT)
    warmup = f"{plan.chunks} chunks of every loop, in turn, after a first one and {plan.warmup} that are not counted"
    return {
        "revision": git_revision(),
        "machine": machine_of(subject.device),
        "libraries": ", ".join(dict.fromkeys(part for each in plan.setups for part in _libraries(each))),
        "student": f"{subject.name}: {network.num_layers} layers, width {network.num_heads * network.head_dim}",
        "size": f"{plan.size[0]}x{plan.size[1]}, {rows * columns} tokens a latent frame, chunk {config.chunk}",
        "window": f"{config.num_slots}: {config.sink} sink, {config.slow} slow, {config.fast} fast ({config.policy})",
        "steps": f"{len(subject.card.sigmas)} and the commit pass; text of {text.shape[1]} rows",
        "device": f"{subject.device.type} {name_of_dtype(network.dtype)}",
        "attention": setup.attention,
        "kv_placement": setup.kv_placement,
        "compile": setup.compile,
        "timed": warmup,
    }


def _libraries(setup: Setup) -> list[str]:
    return libraries(setup.attention).split(", ")


def tables_of(subject: Subject, plan: Plan, result: Result) -> Iterator[Table]:
    """Everything as tables, those of what was not measured left out."""
    table = Table(title="context-forcing bench", show_header=False)
    for name, value in header(subject, plan).items():
        table.add_row(name, value)
    for name, reason in result.not_run.items():
        table.add_row(f"not run: {name}", reason)
    if rss := peak_rss():
        table.add_row("peak RAM", f"{rss / 1e9:.2f} GB of this process, all loops together")
    yield table
    yield _speed_table(result.speed)
    if result.films:
        yield _film_table(result.films)
    if result.growth:
        yield _growth_table(result.growth)
    if result.drift:
        yield _drift_table(result.drift)


def _speed_table(speed: Sequence[Speed]) -> Table:
    title = (
        f"in turn; the ratio is {speed[0].name} to each without text, median of the rounds (wall clock, CPU seconds)"
    )
    columns = ("loop", "text s", "denoise s", "commit s", "frames/s", "ratio", "ratio CPU", "difference")
    table = Table(*columns, "weights GB", "peak GB predicted", "measured", "predicted/measured", title=title)
    for loop in speed:
        wall, cpu = ratios(speed[0].rounds, loop.rounds)
        predicted = loop.predicted_bytes
        table.add_row(
            loop.name,
            _seconds(median_of(loop.rounds, "text")),
            _seconds(median_of(loop.rounds, "denoise")),
            _seconds(median_of(loop.rounds, "commit")),
            f"{loop.frames_per_second:.3g}",
            f"{wall:.3f}",
            f"{cpu:.3f}",
            f"{loop.difference:.1e}",
            _gigabytes(loop.weights_bytes),
            "-" if predicted is None else _gigabytes(predicted),
            _gigabytes(loop.measured_bytes),
            "-" if predicted is None else f"{predicted / loop.measured_bytes:.3f}",
        )
    return table


def _film_table(films: Sequence[Film]) -> Table:
    title = "a film end to end: median seconds of a chunk by parts, and on two threads as generate runs it"
    columns = (
        "setup",
        "text s (once)",
        *(f"{part} s" for part in PARTS),
        "on two threads s",
        "frames/s",
        "end s (once)",
    )
    table = Table(*columns, title=title)
    for film in films:
        parts = (_seconds(median_of(film.chunks, part)) for part in PARTS)
        both, end = _seconds(statistics.median(film.overlapped)), _seconds(film.end_seconds)
        table.add_row(film.name, _seconds(film.text_seconds), *parts, both, f"{film.frames_per_second:.3g}", end)
    return table


def _growth_table(growth: Sequence[Growth]) -> Table:
    columns = ("setup", f"after {EARLY} chunks s", f"after {LATE} s", "ratio", "ratio CPU")
    table = Table(*columns, title="the same chunk after a short and a long video, in turn")
    for each in growth:
        wall, cpu = ratios(each.late, each.early)
        early, late = (statistics.median(spent.seconds for spent in spents) for spents in (each.early, each.late))
        table.add_row(each.name, _seconds(early), _seconds(late), f"{wall:.3f}", f"{cpu:.3f}")
    return table


def _drift_table(drifts: Sequence[Drift]) -> Table:
    title = "drift: difference of the latents to the first setup, and motion (% change frame to frame) of both"
    table = Table("setup", "chunk 1", "first quarter", "last quarter", "motion", "motion of the first", title=title)
    for drift in drifts:
        quarter = max(1, len(drift.difference) // 4)
        table.add_row(
            drift.name,
            f"{drift.difference[0]:.1e}",
            f"{statistics.mean(drift.difference[:quarter]):.1e}",
            f"{statistics.mean(drift.difference[-quarter:]):.1e}",
            f"{statistics.mean(drift.motion):.3f}",
            f"{statistics.mean(drift.reference_motion):.3f}",
        )
    return table


def write_json(path: Path, subject: Subject, plan: Plan, result: Result) -> None:
    """Every round of every loop, and what they give. Raises ValueError if the file cannot be written."""
    speed = [
        _plain(loop) | dict(zip(("ratio", "ratio_cpu"), ratios(result.speed[0].rounds, loop.rounds)))
        for loop in result.speed
    ]
    growth = [_plain(each) | dict(zip(("ratio", "ratio_cpu"), ratios(each.late, each.early))) for each in result.growth]
    content = {
        **header(subject, plan),
        "setups": [dataclasses.asdict(setup) for setup in plan.setups],
        "not_run": result.not_run,
        "peak_rss_bytes": peak_rss(),
        "speed": speed,
        "films": [_plain(film) for film in result.films],
        "growth": growth,
        "drift": [_plain(drift) for drift in result.drift],
    }
    try:
        with atomic_path(path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json: {path} cannot be written ({error.strerror or error})") from None


def _plain(measured: Speed | Film | Growth | Drift) -> dict:
    """The fields of a measurement, with its frames per second if it has some."""
    fields = dataclasses.asdict(measured)
    speed = {"frames_per_second": measured.frames_per_second} if isinstance(measured, (Speed, Film)) else {}
    return fields | speed


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}"
