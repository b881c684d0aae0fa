"""Evaluation of students on the demo world: recall over gaps and drift over long rollouts.

The figures are defined in docs/demo_student.md, Metrics.

All students are measured on the same scenes, camera paths and noise. Finished rollouts are written at once, and the
same command resumes an interrupted evaluation.
"""

import dataclasses
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from rich.table import Table

from ...memory.fields import quoted
from ...memory.files import atomic_path
from ...model.checkpoints.containers import read_json
from ...model.checkpoints.locate import BUILT_IN
from ...model.units import FRAMES_PER_LATENT, latent_seconds
from ...video.frames import film_strip
from ...video.pipeline import Pipeline
from ...workers.engine import Engine
from ...workers.job import Loaded
from ..world.geometry import CHUNK
from ..world.scripts import TRIP_COLUMNS, Script, benchmark_script, random_script
from .judge import QUARTERS, World, judge, judge_long
from .scenes import End, SceneJob, student_loader
from .summary import KINDS, LONG, Record, sum_up, tables
from .variants import Variant

log = logging.getLogger("context_forcing")

RESULTS = "recall.json"
FORMAT = 5
"""Version of the results file. It changes when the meaning of a figure changes."""
MAX_SEED = 2**48
MAX_GAP, MAX_ROLLOUTS = 10_000, 10_000
"""Chunks of a gap, two hours, and scenes of a seed."""
_TRIP_CHUNKS = 16
"""Longest piece of a long path: the camera neither stays away nor stands still for a whole quarter."""
_MIN_CHUNKS = 8 * QUARTERS


@dataclass(frozen=True, kw_only=True)
class EvaluatedStudent:
    """A student and what it is measured under."""

    name: str
    path: str | None
    """A student file; None for the built-in student."""
    policies: tuple[str, ...]
    """Names of rows, Variant.parse."""

    def __post_init__(self):
        for policy in self.policies:
            Variant.parse(policy)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. The first student is the reference of all differences."""

    students: tuple[EvaluatedStudent, ...]
    gaps: tuple[int, ...] = (8,)
    """Chunks spent elsewhere before the camera returns."""
    columns: tuple[int, ...] = (9, 18, 27)
    """Columns from the targets to where the gap is spent."""
    rollouts: int = 12
    """Scenes per seed."""
    seeds: tuple[int, ...] = (0,)
    minutes: float = 0.0
    """Length of the long rollouts; 0 for none."""
    long_rollouts: int = 4
    """Long rollouts per seed."""

    def __post_init__(self):
        if not self.gaps and not self.minutes:
            raise ValueError("gaps: there is nothing to measure; give at least one gap, or minutes above 0")
        if not self.seeds:
            raise ValueError("seed: none given; give at least one")
        if wrong := [columns for columns in self.columns if columns not in TRIP_COLUMNS]:
            raise ValueError(f"columns: {wrong[0]} is not one of {', '.join(map(str, TRIP_COLUMNS))}")
        if self.gaps and not self.columns:
            raise ValueError("columns: none given; give at least one, or no gaps")
        for name in ("gaps", "columns", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(0 <= value <= MAX_SEED for value in values):
                raise ValueError(f"{name}: {list(values)} must be different whole numbers from 0 to {MAX_SEED}")
        if longest := [gap for gap in self.gaps if gap > MAX_GAP]:
            raise ValueError(f"gaps: {longest[0]} chunks are more than {MAX_GAP}; give less")
        if max(self.rollouts, self.long_rollouts) > MAX_ROLLOUTS:
            raise ValueError(f"rollouts, long_rollouts: at most {MAX_ROLLOUTS} scenes; give more seeds for others")
        if self.rollouts < 2:
            raise ValueError(f"rollouts: {self.rollouts} must be 2 or more; an interval needs several scenes")
        if not 0 <= self.minutes <= 24 * 60 or (self.minutes and self.long_rollouts < 2):
            raise ValueError(
                f"minutes: {self.minutes:g} must be from 0 to 1440, and long_rollouts: {self.long_rollouts} 2 or more"
            )


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """`8,24` -> (8, 24); `name` is the option in error messages."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if wrong := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise ValueError(f"{name}: {quoted(wrong[0])} is not a whole number")
    return tuple(map(int, parts))


def parse_students(student: str, compare: Sequence[str], policies: str) -> tuple[EvaluatedStudent, ...]:
    """Students from `FILE_OR_demo` or, in `compare`, `FILE_OR_demo=policy,policy`; `policies` are the default.

    The name of a student is that of its file, with as many parent folders as make it unique. Raises ValueError for a
    student that is listed twice with the same policy.
    """
    parts = [(student, "", ""), *(given.partition("=") for given in compare)]
    paths = list(dict.fromkeys(path for path, _, _ in parts))
    students = tuple(
        EvaluatedStudent(
            name=_short_name(path, paths),
            path=None if path == BUILT_IN else path,
            policies=tuple(policy.strip() for policy in (own or policies).split(",")),
        )
        for path, _, own in parts
    )
    rows = [(student.name, policy) for student in students for policy in student.policies]
    if repeated := [row for row in rows if rows.count(row) > 1]:
        raise ValueError(
            f"compare: {repeated[0][0]} with policy {quoted(repeated[0][1])} is listed twice; list it once"
        )
    return students


def _short_name(path: str, paths: Sequence[str]) -> str:
    if path == BUILT_IN:
        return path
    parts = Path(path).with_suffix("").absolute().parts
    others = [Path(other).with_suffix("").absolute().parts for other in paths if other not in (path, BUILT_IN)]
    for length in range(1, len(parts) + 1):
        name = "/".join(parts[-length:])
        if name != BUILT_IN and all(other[-length:] != parts[-length:] for other in others):
            return name
    raise ValueError(f"compare: {path} is listed twice under different paths; list each student under one path")


class Results:
    """recall.json: a header with what was measured, the record of every rollout, and their summary."""

    def __init__(self, folder: Path, header: dict):
        """Read the records in the folder. Raises ValueError for results of another command or version."""
        self.path, self.header = folder / RESULTS, json.loads(json.dumps(header))
        self.records: list[Record] = []
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        try:
            raw = read_json(self.path)
            before = raw.get("header")
            if not isinstance(before, dict):
                raise ValueError(f"{self.path} was written by another version")
            if before.get("format") != FORMAT:
                raise ValueError(f"{self.path} has format {before.get('format')}, this version writes {FORMAT}")
            if differ := [name for name in self.header if before.get(name) != self.header[name]]:
                raise ValueError(f"{self.path} was made with other {', '.join(differ)}")
            self.records = [Record.from_dict(record) for record in raw.get("records", [])]
        except ValueError as error:
            raise ValueError(f"output: {error}; give another folder, or delete the file") from None

    def add(self, records: Sequence[Record]) -> None:
        """Add records and write the whole file."""
        self.records += records
        content = {
            "header": self.header,
            "summary": asdict(sum_up(self.records)),
            "records": [asdict(record) for record in self.records],
        }
        with atomic_path(self.path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def evaluate(plan: Plan, device: str, dtype: str, out: Path, engine: Engine | None = None) -> list[Table]:
    """Measure students; writes recall.json, plots and one film strip per cell into `out`, and returns tables.

    A second run in the same folder resumes the first. With more rollouts or seeds it adds to the results. With an
    `engine` its workers generate, the results are the same, and this process judges on the same kind of device.
    """
    device = device if engine is None else engine.workers.device
    if engine is not None and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--ray: the workers have GPUs, this machine, which judges, has none; start it where one is")
    loaded = Loaded()
    load = student_loader(loaded, device, dtype)
    pipelines = {student.name: load(_file(student, engine)) for student in plan.students}
    plan = _usable(plan, pipelines)
    first = pipelines[plan.students[0].name]
    scripts = {mirror: _scripts(plan, mirror) for mirror in (False, True)}
    paths = long_paths(plan, first.card.fps)
    results = Results(out, _header(plan, pipelines))
    world = World(first)
    done = {(each.student, each.policy, each.seed, each.scene, each.kind == LONG) for each in results.records}
    jobs = [
        SceneJob(
            student=student.name, file=_file(student, engine), policy=policy, seed=seed, scene=scene, is_long=is_long,
            moves={(LONG, 0, 0): tuple(paths[seed, scene])} if is_long
            else {path: script.moves for path, script in scripts[scene % 2 == 1].items()},
            device=device, dtype=dtype,
        )
        for student, policy, seed, scene, is_long in _runs(plan)
        if (student.name, policy, seed, scene, is_long) not in done
    ]  # fmt: skip
    for job, ends in _ended(jobs, loaded, engine):
        records = [_record(world, job, end, scripts[job.scene % 2 == 1].get(end.path)) for end in ends]
        for record, end in zip(records, ends) if (job.seed, job.scene) == (plan.seeds[0], 0) else ():
            script = (record.kind,) if job.is_long else (record.kind, record.columns, record.gap_frames)
            parts = [job.student] * (len(plan.students) > 1) + [*map(str, script), job.policy]
            name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
            chunks = torch.tensor(end.latents_CTHW)[None].split(CHUNK, dim=2)
            film_strip(world.codec, chunks, scale=1).save(out / f"{name}.png")
        results.add(records)
    return _report(results, plan, first.card.fps, out)


def _file(student: EvaluatedStudent, engine: Engine | None) -> str | None:
    """The student's file; workers may have another working directory."""
    return student.path if student.path is None or engine is None else str(Path(student.path).absolute())


def _runs(plan: Plan) -> list[tuple[EvaluatedStudent, str, int, int, bool]]:
    """Student, policy, seed and scene of every run, and whether it is a long rollout, in the order of evaluation."""
    return [
        (student, policy, seed, scene, is_long)
        for seed, is_long in itertools.product(plan.seeds, (False, True))
        for scene in range(plan.long_rollouts if is_long else plan.rollouts)
        for student in (plan.students if (plan.minutes if is_long else plan.gaps) else ())
        for policy in student.policies
    ]


def _ended(jobs: list[SceneJob], loaded: Loaded, engine: Engine | None) -> Iterator[tuple[SceneJob, list[End]]]:
    """Every job with what came of it, in order. Raises ValueError if one fails."""
    if engine is None:
        for job in track(jobs, description="evaluate", transient=True):
            yield job, job.run(loaded)
    else:
        for progress in engine.in_order(jobs, len(jobs)):
            yield progress.job, progress.result


def _scripts(plan: Plan, mirror: bool) -> dict[tuple[str, int, int], Script]:
    """The script of every kind, trip and gap; every second scene is mirrored."""
    return {
        (kind, columns, gap): benchmark_script(kind, gap, mirror, columns)
        for kind, columns, gap in itertools.product(KINDS, plan.columns, plan.gaps)
    }


def _record(world: World, job: SceneJob, end: End, script: Script | None) -> Record:
    """The figures of a rollout; a long one has no script."""
    latents, (kind, columns, _) = torch.tensor(end.latents_CTHW).to(world.device), end.path
    if script is None:
        trial = judge_long(world, latents, job.moves[end.path], job.style, end.reach)
    else:
        trial = judge(world, latents, script, job.style)
    return Record(
        student=job.student, policy=job.policy, seed=job.seed, scene=job.scene, kind=kind, columns=columns,
        gap_frames=0 if script is None else len(script.hidden_frames), trial=trial,
    )  # fmt: skip


def long_paths(plan: Plan, fps: float) -> dict[tuple[int, int], list[int]]:
    """A camera path per (seed, scene): trips away and back in four quarters of whole chunks, at least `minutes` long.

    Raises ValueError for a length without room for four quarters with a trip in each.
    """
    if not plan.minutes:
        return {}
    quarter = math.ceil(plan.minutes * 60 * fps / (FRAMES_PER_LATENT * CHUNK * QUARTERS))
    if quarter * QUARTERS < _MIN_CHUNKS:
        least = latent_seconds(_MIN_CHUNKS * CHUNK, fps) / 60
        raise ValueError(f"minutes: {plan.minutes:g} is too short for four quarters; {least:g} is the least")
    pieces = [len(piece) for piece in np.array_split(np.arange(quarter), -(-quarter // _TRIP_CHUNKS))] * QUARTERS
    paths = {}
    for key in itertools.product(plan.seeds, range(plan.long_rollouts)):
        rng = np.random.default_rng((*key, 1))
        paths[key] = [move for piece in pieces for move in random_script(rng, piece)]
    return paths


def _usable(plan: Plan, pipelines: dict[str, Pipeline]) -> Plan:
    """The plan without the policies that a student cannot use; the log names them.

    Raises ValueError if none is left.
    """
    students = []
    for student in plan.students:
        policies = []
        for policy in student.policies:
            try:
                Variant.parse(policy).empty_memory(pipelines[student.name])
                policies.append(policy)
            except ValueError as error:
                log.warning("%s cannot be measured under policy %s: %s", student.name, policy, error)
        if policies:
            students.append(dataclasses.replace(student, policies=tuple(policies)))
    if not students:
        raise ValueError("policies: the students can use none of them; give others")
    return dataclasses.replace(plan, students=tuple(students))


def _header(plan: Plan, pipelines: dict[str, Pipeline]) -> dict:
    """Everything that the figures depend on. Raises ValueError for students that cannot be measured together."""
    first = pipelines[plan.students[0].name]
    students = []
    for student in plan.students:
        name, pipeline = student.name, pipelines[student.name]
        for policy in student.policies:
            chunk = Variant.parse(policy).empty_memory(pipeline).config.chunk
            if chunk != CHUNK:
                raise ValueError(f"student: {name} generates chunks of {chunk}; the scripts need {CHUNK}")
        if pipeline.card.fps != first.card.fps:
            raise ValueError(
                f"compare: {name} has {pipeline.card.fps} frames per second, {plan.students[0].name} has"
                f" {first.card.fps}; evaluate them separately"
            )
        card = asdict(pipeline.card)
        students.append({"name": name, "weights": pipeline.fingerprint, "policies": student.policies, "card": card})
    return {
        "format": FORMAT,
        "students": students,
        "gaps": plan.gaps,
        "columns": plan.columns,
        "minutes": plan.minutes,
        "device": first.device.type,
        "dtype": str(first.network.dtype),
    }


def _report(results: Results, plan: Plan, fps: float, out: Path) -> list[Table]:
    """Tables and plots of the scenes of the plan. The file may have more scenes, from an earlier run."""
    scenes = {True: plan.long_rollouts, False: plan.rollouts}
    summary = sum_up(
        [each for each in results.records if each.seed in plan.seeds and each.scene < scenes[each.kind == LONG]]
    )
    try:
        from .plots import draw_drift, draw_recall
    except ImportError as error:
        log.warning(
            "no plots: %s is not installed; pip install 'context-forcing[train]' and repeat the command (results are"
            " kept)",
            error.name,
        )
    else:
        draw_recall(summary, fps, out / "recall.png")
        draw_drift(summary, fps, out / "drift.png")
    return tables(summary, fps)
