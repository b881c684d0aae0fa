"""Students measured on the demo world: recall over gaps, and drift over long rollouts (demo_world.md 4).

Every student is given the same scenes, camera paths and noise. What is finished is written at once, and the same
command goes on from there.
"""

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table

from ...memory.memory import Memory
from ...model.checkpoints.student import StudentSource
from ...model.device import pick_device
from ...video.film_strip import film_strip
from ...video.pipeline import Pipeline
from ..world.geometry import CHUNK
from ..world.prompts import ALL_STYLES
from ..world.scripts import Script, benchmark_script, random_script
from .judge import QUARTERS, World, judge, judge_long
from .rollout import Camera, branches, film_of
from .summary import KINDS, LONG, Record, sum_up, tables

log = logging.getLogger("context_forcing")

BUILT_IN = "demo"
NO_SLOW = "none"
RESULTS = "recall.json"
FORMAT = 2
"""Of the results file; goes up when a figure changes its meaning."""
MAX_SEED = 2**48
_TRIP_CHUNKS = 16
"""Longest piece of a long path, so that the camera never stays away, or put, for a whole quarter."""
_LEAST_CHUNKS = 8 * QUARTERS


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A student to be measured."""

    name: str
    student: str | None
    """A student file, or None for the built-in one."""
    policies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; the first entrant is the one that others are held against."""

    entrants: tuple[Entrant, ...]
    gaps: tuple[int, ...] = (8, 24)
    """Chunks spent elsewhere before the camera returns."""
    rollouts: int = 12
    """Scenes a seed."""
    seeds: tuple[int, ...] = (0,)
    minutes: float = 0.0
    """Length of the long rollouts; 0 is none."""
    long_rollouts: int = 4
    """Long rollouts a seed."""

    def __post_init__(self):
        if not self.gaps and not self.minutes:
            raise ValueError("gaps: there is nothing to measure; give at least one gap, or minutes above 0")
        if not self.seeds:
            raise ValueError("seed: none given; give at least one")
        for name in ("gaps", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(0 <= value <= MAX_SEED for value in values):
                raise ValueError(f"{name}: {list(values)} must be different whole numbers from 0 to {MAX_SEED}")
        if self.rollouts < 2:
            raise ValueError(f"rollouts: {self.rollouts} must be 2 or more; an interval needs several scenes")
        if not 0 <= self.minutes <= 24 * 60 or (self.minutes and self.long_rollouts < 2):
            raise ValueError(
                f"minutes: {self.minutes:g} must be from 0 to 1440, and long_rollouts: {self.long_rollouts} 2 or more"
            )


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """`8,24` -> (8, 24); `name` is what a refusal is about."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise ValueError(f"{name}: {part!r} is not a whole number")
    return tuple(int(part) for part in parts)


def parse_entrants(student: str, compare: Sequence[str], policies: str) -> tuple[Entrant, ...]:
    """`FILE_OR_demo` or `FILE_OR_demo=policy,policy`; without its own, a student takes `policies`.

    A student's name is that of its file, with folders in front as far as needed to tell it from the others.
    """
    split = [given.partition("=") if i else (given, "", "") for i, given in enumerate([student, *compare])]
    wanted = [(path, own or policies) for path, _, own in split]
    paths = list(dict.fromkeys(path for path, _ in wanted))
    entrants = tuple(
        Entrant(
            name=_short_name(path, paths),
            student=None if path == BUILT_IN else path,
            policies=tuple(policy.strip() for policy in names.split(",")),
        )
        for path, names in wanted
    )
    rows = [(entrant.name, policy) for entrant in entrants for policy in entrant.policies]
    if twice := [row for row in rows if rows.count(row) > 1]:
        raise ValueError(f"compare: {twice[0][0]} with policy {twice[0][1]!r} is there twice; name each pair once")
    return entrants


def _short_name(path: str, paths: Sequence[str]) -> str:
    if path == BUILT_IN:
        return path
    tails = {other: Path(other).with_suffix("").absolute().parts for other in paths if other not in (path, BUILT_IN)}
    parts = Path(path).with_suffix("").absolute().parts
    for length in range(1, len(parts) + 1):
        name = "/".join(parts[-length:])
        if name != BUILT_IN and all(tail[-length:] != parts[-length:] for tail in tails.values()):
            return name
    raise ValueError(f"compare: {path} is there twice under different names; name each student one way")


class Results:
    """recall.json: a header that says what was measured, every judged film, and their summary."""

    def __init__(self, folder: Path, header: dict):
        """Go on with what is in the folder. Raises ValueError where another command has left results there."""
        self.path, self.header = folder / RESULTS, header
        self.records: list[Record] = []
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        remedy = "give another folder, or delete the file"
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"output: {self.path} is not JSON ({error}); {remedy}") from None
        if not isinstance(raw, dict) or "header" not in raw or raw["header"].get("format") != FORMAT:
            raise ValueError(f"output: {self.path} was written by another version; {remedy}")
        asked = json.loads(json.dumps(header))
        if differ := [name for name in asked if raw["header"].get(name) != asked[name]]:
            raise ValueError(f"output: {self.path} was made with other {', '.join(differ)}; {remedy}")
        self.records = [Record.from_dict(record) for record in raw["records"]]

    def has(self, **wanted) -> bool:
        """Whether there is a record with these values."""
        return any(all(getattr(each, name) == value for name, value in wanted.items()) for each in self.records)

    def add(self, records: Sequence[Record]) -> None:
        """Keep, and write the whole file anew; it is never seen half written."""
        self.records += records
        part = self.path.with_name(f".{self.path.name}.part")
        content = {
            "header": self.header,
            "summary": asdict(sum_up(self.records)),
            "records": [asdict(record) for record in self.records],
        }
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(part, self.path)


def evaluate(plan: Plan, device: str, dtype: str, out: Path) -> list[Table]:
    """Measure; writes recall.json, plots and one filmstrip a cell into `out`, and returns tables.

    A second run in the same folder goes on where the first stopped; with more rollouts or seeds it adds to it.
    """
    where = pick_device(device, dtype)
    pipelines = {
        entrant.student: Pipeline.load(StudentSource(entrant.student).open(), *where) for entrant in plan.entrants
    }
    first = pipelines[plan.entrants[0].student]
    paths = long_paths(plan, first.card.fps)
    for kind, gap in itertools.product(KINDS, plan.gaps):
        benchmark_script(kind, gap, mirror=False)
    results = Results(out, _header(plan, pipelines))
    world = World(first)
    jobs = [
        (seed, scene, entrant, policy, is_long)
        for seed, is_long in itertools.product(plan.seeds, (False, True))
        for scene in range(plan.long_rollouts if is_long else plan.rollouts)
        for entrant in plan.entrants
        for policy in entrant.policies
        if (plan.minutes if is_long else plan.gaps)
    ]
    for seed, scene, entrant, policy, is_long in track(jobs, description="evaluate", transient=True):
        run = {"student": entrant.name, "policy": policy, "seed": seed, "scene": scene}
        if any(results.has(**run, kind=kind) for kind in ([LONG] if is_long else KINDS)):
            continue
        pipeline = pipelines[entrant.student]
        style = ALL_STYLES[np.random.default_rng((seed, scene)).integers(len(ALL_STYLES))]
        camera = Camera(pipeline, style, seed * 10_000 + scene)
        memory = pipeline.empty_memory(**_settings(policy))
        if is_long:
            made = [_run_long(camera, world, memory, paths[seed, scene], run)]
        else:
            made = _run_gaps(camera, world, memory, plan.gaps, run)
        if (seed, scene) == (plan.seeds[0], 0):
            _save_strips(pipeline, made, out, len(plan.entrants) > 1)
        results.add([record for record, _ in made])
    return _report(results, plan, first.card.fps, out)


def _run_gaps(
    camera: Camera, world: World, memory: Memory, gaps: Sequence[int], run: dict
) -> list[tuple[Record, Memory]]:
    """One scene under every script and gap; half of the scenes are mirrored."""
    scripts = {
        (kind, gap): benchmark_script(kind, gap, mirror=run["scene"] % 2 == 1)
        for kind, gap in itertools.product(KINDS, gaps)
    }
    ends = dict(branches(camera, memory, {key: script.moves for key, script in scripts.items()}))

    def record(script: Script, end: Memory) -> Record:
        trial = judge(world, film_of(end).to(world.device), script, camera.style)
        return Record(**run, kind=script.kind, gap_frames=len(script.hidden_frames), trial=trial)

    return [(record(script, ends[key]), ends[key]) for key, script in scripts.items()]


def _run_long(
    camera: Camera, world: World, memory: Memory, moves: Sequence[int], run: dict
) -> tuple[Record, Memory]:  # fmt: skip
    reach = []
    for move in moves:
        memory = camera.move(memory, move)
        reach.append(reach_frames(memory))
    trial = judge_long(world, film_of(memory).to(world.device), moves, camera.style, reach)
    return Record(**run, kind=LONG, gap_frames=0, trial=trial), memory


def reach_frames(memory: Memory) -> int:
    """Age of the oldest remembered frame that is not sink, in latent frames; 0 if there is none."""
    return memory.num_frames - min((*memory.slots.slow, *memory.slots.fast), default=memory.num_frames)


def long_paths(plan: Plan, fps: float) -> dict[tuple[int, int], list[int]]:
    """A camera path per (seed, scene): trips away and back; whole quarters of chunks, at least `minutes` long.

    Raises ValueError for a length too short to have four quarters with a trip in each.
    """
    if not plan.minutes:
        return {}
    quarter = -int(-plan.minutes * 60 * fps // (4 * CHUNK * QUARTERS))
    if quarter * QUARTERS < _LEAST_CHUNKS:
        least = _LEAST_CHUNKS * 4 * CHUNK / fps / 60
        raise ValueError(f"minutes: {plan.minutes:g} is too short for four quarters; {least:g} is the least")
    pieces = [len(piece) for piece in np.array_split(np.arange(quarter), -(-quarter // _TRIP_CHUNKS))] * QUARTERS
    paths = {}
    for seed, scene in itertools.product(plan.seeds, range(plan.long_rollouts)):
        rng = np.random.default_rng((seed, scene, 1))
        paths[seed, scene] = [move for piece in pieces for move in random_script(rng, piece)]
    return paths


def _settings(policy: str) -> dict:
    return {"slow": 0} if policy == NO_SLOW else {"policy": policy}


def _header(plan: Plan, pipelines: dict[str | None, Pipeline]) -> dict:
    """All that a judged film depends on; raises ValueError for what students must have in common, and have not."""
    students = []
    for entrant in plan.entrants:
        pipeline = pipelines[entrant.student]
        first = pipelines[plan.entrants[0].student]
        for policy in entrant.policies:
            memory = pipeline.empty_memory(**_settings(policy))
            if memory.config.chunk != CHUNK:
                raise ValueError(
                    f"student: {entrant.name} makes {memory.config.chunk} latent frames at a time; the scripts are"
                    f" for chunks of {CHUNK}"
                )
        if pipeline.card.fps != first.card.fps:
            raise ValueError(
                f"compare: {entrant.name} has {pipeline.card.fps} frames a second, {plan.entrants[0].name} has"
                f" {first.card.fps}; measure them apart"
            )
        card = dataclasses.asdict(pipeline.card)
        students.append(
            {"name": entrant.name, "weights": pipeline.fingerprint, "policies": entrant.policies, "card": card}
        )
    return {
        "format": FORMAT,
        "students": students,
        "gaps": plan.gaps,
        "minutes": plan.minutes,
        "device": first.device.type,
        "dtype": str(first.dtype),
    }


def _save_strips(pipeline: Pipeline, made: Sequence[tuple[Record, Memory]], out: Path, several: bool) -> None:
    for record, memory in made:
        parts = [record.student.replace("/", "-")] * several + [record.kind, str(record.gap_frames)]
        film_strip(pipeline.vae, memory.latent_chunks, scale=1).save(out / f"{'-'.join([*parts, record.policy])}.png")


def _report(results: Results, plan: Plan, fps: float, out: Path) -> list[Table]:
    """Tables and plots of the scenes asked for; the file may hold more from an earlier run."""
    asked = [
        record
        for record in results.records
        if record.seed in plan.seeds
        and record.scene < (plan.long_rollouts if record.kind == LONG else plan.rollouts)
    ]  # fmt: skip
    summary = sum_up(asked)
    try:
        from .plots import draw_drift, draw_recall
    except ImportError as error:
        log.warning(
            "no plots: %s is not installed; pip install 'context-forcing[train]' and give the same command again,"
            " the figures are kept", error.name,
        )  # fmt: skip
    else:
        draw_recall(summary, fps, out / "recall.png")
        draw_drift(summary, fps, out / "drift.png")
    return tables(summary, fps)
