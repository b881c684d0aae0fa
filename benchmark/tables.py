"""What `context-forcing bench` prints and writes."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from ..memory.fields import counted
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
    memories = [subject.empty_memory(setup, size) for size in plan.sizes]
    config = memories[0].config
    tokens = [math.prod(network.grid(memory.latent_size)) for memory in memories]
    sizes = (f"{_size(size)}, {count} tokens a latent frame" for size, count in zip(plan.sizes, tokens))
    text = subject.pipeline(setup).text_encoder.encode(PROMPT)
    timed = f"{counted(plan.chunks, 'chunk')} of every loop, in turn"
    layers, width = counted(network.num_layers, "layer"), network.num_heads * network.head_dim
    return {
        "revision": git_revision(),
        "machine": machine_of(subject.device),
        "libraries": ", ".join(dict.fromkeys(part for each in plan.setups for part in _libraries(each))),
        "student": f"{subject.name}: {layers}, width {width}",
        "size": f"{'; '.join(sizes)}; chunk {config.chunk}",
        "window": f"{config.num_slots}: {config.sink} sink, {config.slow} slow, {config.fast} fast ({config.policy})",
        "steps": f"{len(subject.card.sigmas)} and the commit pass; text of {text.shape[1]} rows",
        "device": f"{subject.device.type} {name_of_dtype(network.dtype)}",
        "attention": setup.attention,
        "kv_placement": setup.kv_placement,
        "compile": setup.compile,
        "timed": f"{timed}, after a first one and {plan.warmup} that are not counted",
    }


def _libraries(setup: Setup) -> list[str]:
    return libraries(setup.attention).split(", ")


def tables_of(subject: Subject, plan: Plan, results: Sequence[Result]) -> Iterator[Table]:
    """Everything as tables, those of what was not measured left out."""
    table = Table(title="context-forcing bench", show_header=False)
    for name, value in header(subject, plan).items():
        table.add_row(name, value)
    for result in results:
        for name, reason in result.not_run.items():
            table.add_row(f"not run at {_size(result.size)}: {name}", reason)
    if rss := peak_rss():
        table.add_row("peak RAM", f"{rss / 1e9:.2f} GB of this process, all loops together")
    yield table
    for result in results:
        at = _size(result.size)
        yield _speed_table(result.speed, at)
        if result.films:
            yield _film_table(result.films, at)
        if result.growth:
            yield _growth_table(result.growth, at)
        if result.drift:
            yield _drift_table(result.drift, at)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _speed_table(speed: Sequence[Speed], at: str) -> Table:
    title = f"{at}, in turn; the ratio is {speed[0].name} to each, median of the rounds (wall clock, CPU seconds)"
    seconds = ("loop", "text s", "denoise s", "commit s", "frames/s")
    compared = ("ratio", "CPU", "without text", "CPU", "difference")
    memory = ("weights GB", "peak GB predicted", "measured", "predicted/measured")
    table = Table(*seconds, *compared, *memory, title=title)
    for loop in speed:
        shares = (*ratios(speed[0].rounds, loop.rounds), *ratios(speed[0].rounds, loop.rounds, without="text"))
        predicted = loop.predicted_bytes
        table.add_row(
            loop.name,
            _seconds(median_of(loop.rounds, "text")),
            _seconds(median_of(loop.rounds, "denoise")),
            _seconds(median_of(loop.rounds, "commit")),
            f"{loop.frames_per_second:.3g}",
            *(f"{share:.3f}" for share in shares),
            f"{loop.difference:.1e}",
            _gigabytes(loop.weights_bytes),
            "-" if predicted is None else _gigabytes(predicted),
            _gigabytes(loop.measured_bytes),
            "-" if predicted is None else f"{predicted / loop.measured_bytes:.3f}",
        )
    return table


def _film_table(films: Sequence[Film], at: str) -> Table:
    title = f"{at}, a film end to end: median seconds of a chunk by parts, and on two threads as generate runs it"
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


def _growth_table(growth: Sequence[Growth], at: str) -> Table:
    columns = ("setup", f"after {EARLY} chunks s", f"after {LATE} s", "ratio", "ratio CPU")
    table = Table(*columns, title=f"{at}, the same chunk after a short and a long video, in turn")
    for each in growth:
        wall, cpu = ratios(each.late, each.early)
        early, late = (statistics.median(spent.seconds for spent in spents) for spents in (each.early, each.late))
        table.add_row(each.name, _seconds(early), _seconds(late), f"{wall:.3f}", f"{cpu:.3f}")
    return table


def _drift_table(drifts: Sequence[Drift], at: str) -> Table:
    title = f"{at}, drift: difference of the latents to the first setup, and motion (% change frame to frame) of both"
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


def write_json(path: Path, subject: Subject, plan: Plan, results: Sequence[Result]) -> None:
    """Every round of every loop, and what they give. Raises ValueError if the file cannot be written."""
    content = {
        **header(subject, plan),
        "setups": [dataclasses.asdict(setup) for setup in plan.setups],
        "peak_rss_bytes": peak_rss(),
        "sizes": [_result(result) for result in results],
    }
    try:
        with atomic_path(path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json: {path} cannot be written ({error.strerror or error})") from None


def _result(result: Result) -> dict:
    first = result.speed[0].rounds
    of = lambda kind, rounds, others, **how: dict(zip((kind, f"{kind}_cpu"), ratios(rounds, others, **how)))
    speed = [
        _plain(loop) | of("ratio", first, loop.rounds) | of("ratio_without_text", first, loop.rounds, without="text")
        for loop in result.speed
    ]
    return {
        "size": _size(result.size),
        "not_run": result.not_run,
        "speed": speed,
        "films": [_plain(film) for film in result.films],
        "growth": [_plain(each) | of("ratio", each.late, each.early) for each in result.growth],
        "drift": [_plain(drift) for drift in result.drift],
    }


def _plain(measured: Speed | Film | Growth | Drift) -> dict:
    """The fields of a measurement, with its frames per second if it has some."""
    fields = dataclasses.asdict(measured)
    speed = {"frames_per_second": measured.frames_per_second} if isinstance(measured, (Speed, Film)) else {}
    return fields | speed


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}"
