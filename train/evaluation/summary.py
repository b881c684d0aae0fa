"""Evaluation records summed up: means with intervals, paired differences, effective context, and tables of them.

Intervals are 95 % bootstrap intervals over rollouts. All students are measured on the same scenes and noise, so the
difference of two students is the mean of differences of single rollouts, with the interval of those.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from rich.table import Table

from ...memory.fields import checked_fields
from ...model.units import latent_seconds
from ..world.sprites import NUM_CLASSES
from .judge import QUARTERS, LongTrial, Trial

KINDS = ("dwell", "wander")
LONG = "long"
FIGURES = (
    "recall",
    "recall_first",
    "recall_whole",
    "share_whole",
    "psnr",
    "residual",
    "heading_accuracy",
    "motion",
    "change",
)
LONG_FIGURES = (
    "palette",
    "palette_any",
    "palette_own",
    "style",
    "residual",
    "reach",
    "heading_accuracy",
    "motion",
    "change",
)
GROWTH = QUARTERS + 1
"""In the place of a quarter: the last quarter minus the first."""
BRIDGED = 0.8
"""Recall from which on a gap counts as bridged."""
BOOTSTRAP = 2000


@dataclass(frozen=True, kw_only=True)
class Record:
    """The figures of one rollout, and what it was generated from."""

    student: str
    policy: str
    seed: int
    scene: int
    kind: str
    """dwell, wander or long."""
    columns: int
    """Columns from the targets to where the gap is spent; 0 for a long rollout."""
    gap_frames: int
    """Latent frames during which the targets are out of view; 0 for a long rollout."""
    trial: Trial | LongTrial

    @classmethod
    def from_dict(cls, raw: Mapping) -> "Record":
        """The inverse of `dataclasses.asdict`, after JSON. Raises ValueError for unknown or missing fields."""
        fields = checked_fields(cls, raw, "records")
        trial = LongTrial if fields["kind"] == LONG else Trial
        return cls(**{**fields, "trial": trial(**checked_fields(trial, fields["trial"], "records.trial"))})

    def figures(self, at: int) -> dict[str, float | None]:
        """Figures of the rollout; of a long one those of quarter `at`, from 1, or their GROWTH.

        None: there is nothing to measure.
        """
        if self.kind == LONG and at == GROWTH:
            return _minus(self.figures(QUARTERS), self.figures(1))
        if self.kind == LONG:
            return {name: getattr(self.trial, name)[at - 1] for name in LONG_FIGURES}
        return {name: getattr(self.trial, name) for name in FIGURES}


@dataclass(frozen=True)
class Figure:
    """A mean over rollouts with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    """Rollouts that have the figure."""

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True, kw_only=True)
class _Rollouts:
    student: str
    policy: str
    kind: str
    columns: int
    """Columns of the trip; 0 for long rollouts."""
    at: int
    """The gap in latent frames; of long rollouts the quarter, from 1, or GROWTH."""
    n: int
    figures: dict[str, Figure]
    """Without those that fewer than two rollouts have."""


@dataclass(frozen=True, kw_only=True)
class Cell(_Rollouts):
    """The rollouts of one student and policy under one script."""

    shuffled: float | None
    """Match rate of targets with those of other rollouts: the recall of a collapsed model. None for long rollouts."""


@dataclass(frozen=True, kw_only=True)
class Difference(_Rollouts):
    """A cell minus the cell of another student or policy, over the rollouts that both have."""

    against: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class EffectiveContext:
    """The largest bridged gap of one student and policy under one script, for trips of one length."""

    student: str
    policy: str
    kind: str
    columns: int
    figure: str
    """recall or recall_first."""
    frames: int
    """Largest measured gap that is bridged like every smaller one; 0 if the smallest is not bridged."""
    is_bound: bool
    """The largest measured gap is bridged: the true length may be longer."""
    again: int | None
    """Largest bridged gap beyond one that is not bridged. It does not count."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All figures of a set of records."""

    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    effective_context: tuple[EffectiveContext, ...]


def bootstrap(values: Sequence[float]) -> Figure:
    """Mean over rollouts and its interval. Figures with equally many rollouts share their draws."""
    array = np.asarray(values, dtype=float)
    low, high = np.percentile(array[_draws(len(array))].mean(1), [2.5, 97.5])
    return Figure(float(array.mean()), float(low), float(high), len(array))


@lru_cache(maxsize=8)
def _draws(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(BOOTSTRAP, n))


def _bootstrap_all(rollouts: Sequence[Mapping[str, float | None]]) -> dict[str, Figure]:
    values = {name: [value for each in rollouts if (value := each[name]) is not None] for name in rollouts[0]}
    return {name: bootstrap(own) for name, own in values.items() if len(own) > 1}


def _minus(one: Mapping[str, float | None], two: Mapping[str, float | None]) -> dict[str, float | None]:
    """Differences of the figures that both rollouts have."""
    both = {name: (one[name], two[name]) for name in one}
    return {name: None if a is None or b is None else a - b for name, (a, b) in both.items()}


def sum_up(records: Sequence[Record]) -> Summary:
    """Cells of at least two rollouts, ordered by script, trip, gap or quarter, student and policy.

    Differences are to the first student under its first policy; those of another student also to the first student
    under the same policy.
    """
    groups: dict[tuple[str, str, str, int, int], list[Record]] = {}
    for record in records:
        for at in range(1, GROWTH + 1) if record.kind == LONG else [record.gap_frames]:
            key = (record.student, record.policy, record.kind, record.columns, at)
            groups.setdefault(key, []).append(record)
    keys = sorted(groups, key=lambda key: ((*KINDS, LONG).index(key[2]), *key[3:]))
    rows = list(dict.fromkeys((record.student, record.policy) for record in records))
    cells, differences = [], []
    for key in keys:
        student, policy, kind, columns, at = key
        own: dict[str, Any] = dict(student=student, policy=policy, kind=kind, columns=columns, at=at)
        group = groups[key]
        figures = {(record.seed, record.scene): record.figures(at) for record in group}
        if len(group) > 1:
            trials = [record.trial for record in group if isinstance(record.trial, Trial)]
            means = _bootstrap_all([record.figures(at) for record in group])
            cells.append(Cell(**own, n=len(group), figures=means, shuffled=shuffled_rate(trials) if trials else None))
        for against in dict.fromkeys([rows[0], (rows[0][0], policy)]):
            against_group = groups.get((*against, kind, columns, at), ())
            others = {(record.seed, record.scene): record.figures(at) for record in against_group}
            pairs = [(figures[scene], others[scene]) for scene in figures if scene in others]
            if against != (student, policy) and len(pairs) > 1:
                minus = [_minus(one, two) for one, two in pairs]
                differences.append(Difference(**own, against=against, n=len(pairs), figures=_bootstrap_all(minus)))
    effective = [
        effective_context(*row, *trip, figure, cells)
        for trip in dict.fromkeys((cell.kind, cell.columns) for cell in cells if cell.kind != LONG)
        for row, figure in itertools.product(rows, ("recall", "recall_first"))
        if any((cell.student, cell.policy, cell.kind, cell.columns) == (*row, *trip) for cell in cells)
    ]
    return Summary(cells=tuple(cells), differences=tuple(differences), effective_context=tuple(effective))


def effective_context(
    student: str, policy: str, kind: str, columns: int, figure: str, cells: Iterable[Cell]
) -> EffectiveContext:
    """The gaps from the smallest up to the first that is not bridged, all of trips of `columns`."""
    row = (student, policy, kind, columns)
    own = [cell for cell in cells if (cell.student, cell.policy, cell.kind, cell.columns) == row]
    bridged = {cell.at: cell.figures[figure].mean >= BRIDGED for cell in sorted(own, key=lambda cell: cell.at)}
    counted = list(itertools.takewhile(lambda gap: bridged[gap], bridged))
    return EffectiveContext(
        student=student,
        policy=policy,
        kind=kind,
        columns=columns,
        figure=figure,
        frames=max(counted, default=0),
        is_bound=len(counted) == len(bridged),
        again=max((gap for gap in bridged if bridged[gap] and gap not in counted), default=None),
    )


def shuffled_rate(trials: Sequence[Trial]) -> float:
    """Match rate of remembered targets with the returned ones of other rollouts, over all ordered pairs of rollouts."""
    matches = pairs = 0
    for place in range(max(len(trial.remembered) for trial in trials)):
        both = [(t.remembered[place], t.returned[place]) for t in trials if len(t.remembered) > place]
        before, after = (np.bincount(classes, minlength=NUM_CLASSES) for classes in zip(*both))
        matches += int(before @ after) - sum(a == b for a, b in both)
        pairs += len(both) * (len(both) - 1)
    return matches / pairs


def row_name(each: Cell | EffectiveContext, summary: Summary) -> str:
    """The policy; with several students, the student and the policy."""
    several = len({cell.student for cell in summary.cells}) > 1
    return f"{each.student}, {each.policy}" if several else each.policy


def tables(summary: Summary, fps: float) -> list[Table]:
    """Tables of recall, effective context and drift, as far as there are figures for them."""
    recall = [cell for cell in summary.cells if cell.kind != LONG]
    drift = [cell for cell in summary.cells if cell.kind == LONG]
    mean = lambda name, spec: lambda cell: f"{cell.figures[name].mean:{spec}}"
    interval = lambda name, spec: lambda cell: f"{cell.figures[name]:{spec}}" if name in cell.figures else ""
    difference = lambda name: lambda cell: _difference_to_first(cell, summary, name)
    shown = []
    if recall:
        groups = {
            "script": lambda cell: cell.kind,
            "columns": lambda cell: cell.columns,
            "gap, frames": lambda cell: cell.at,
            "gap, s": lambda cell: f"{latent_seconds(cell.at, fps):.2f}",
        }
        columns = {
            "recall [95 %]": interval("recall", ".2f"),
            "difference [95 %]": difference("recall"),
            "as first seen [95 %]": interval("recall_first", ".2f"),
            "drawn whole": mean("share_whole", ".2f"),
            "recall of whole [95 %]": interval("recall_whole", ".2f"),
            "n whole": lambda cell: cell.figures["recall_whole"].n if "recall_whole" in cell.figures else "",
            "shuffled": lambda cell: f"{cell.shuffled:.2f}",
            "heading": mean("heading_accuracy", ".2f"),
            "motion": mean("motion", ".2f"),
            "change": mean("change", ".2f"),
            "residual": mean("residual", ".3f"),
            "PSNR": mean("psnr", ".1f"),
        }
        title = f"recall@gap (chance of a blind guess 1/{NUM_CLASSES}); difference: to the first row, paired"
        shown += [_cell_table(title, recall, summary, groups, columns), _effective_table(summary, fps)]
    if drift:
        columns = {
            "palette [95 %]": interval("palette", ".2f"),
            "difference [95 %]": difference("palette"),
            "any heading [95 %]": interval("palette_any", ".2f"),
            "own [95 %]": interval("palette_own", ".2f"),
            "style": mean("style", ".2f"),
            "residual [95 %]": interval("residual", ".3f"),
            "reach, s": lambda cell: f"{latent_seconds(cell.figures['reach'].mean, fps):.1f}",
            "heading [95 %]": interval("heading_accuracy", ".2f"),
            "motion [95 %]": interval("motion", ".2f"),
            "change [95 %]": interval("change", ".2f"),
        }
        title = "long rollouts by quarter; growth: last minus first; difference: to the first row, paired"
        shown.append(_cell_table(title, drift, summary, {"quarter": _quarter}, columns))
    return shown


Column = Callable[[Cell], object]


def _quarter(cell: Cell) -> object:
    return "growth" if cell.at == GROWTH else cell.at


def _cell_table(
    title: str, cells: Sequence[Cell], summary: Summary, groups: Mapping[str, Column], columns: Mapping[str, Column]
) -> Table:
    """A row per cell. `groups` are the columns that are shown once per script, trip and gap, or per quarter."""
    table = Table(title=title)
    columns = {"who": partial(row_name, summary=summary), **columns, "n": lambda cell: cell.n}
    for name in (*groups, *columns):
        table.add_column(name, justify="left" if name in ("script", "who") else "right", no_wrap=True)
    for _, group in itertools.groupby(cells, key=lambda cell: (cell.kind, cell.columns, cell.at)):
        for i, cell in enumerate(group):
            shown = [str(column(cell)) if i == 0 else "" for column in groups.values()]
            table.add_row(*shown, *[str(column(cell)) for column in columns.values()])
        table.add_section()
    return table


def _difference_to_first(cell: Cell, summary: Summary, figure: str) -> str:
    own = lambda each: (each.student, each.policy, each.kind, each.columns, each.at)
    paired = (each for each in summary.differences if own(each) == own(cell))
    return next((f"{each.figures[figure]:+.2f}" for each in paired), "")


def _effective_table(summary: Summary, fps: float) -> Table:
    table = Table(title=f"effective context, s: largest gap up to which recall stays at {BRIDGED} or more")
    for column in ("script", "columns", "who", "as last seen", "as first seen"):
        table.add_column(column, justify="right" if column == "columns" else "left", no_wrap=True)
    seconds = lambda frames: f"{latent_seconds(frames, fps):.2f}"
    rows: dict[tuple, list[str]] = {}
    for each in summary.effective_context:
        text = ("at least " if each.is_bound else "") + seconds(each.frames) if each.frames else "less than measured"
        beyond = f" (again at {seconds(each.again)}, not counted)" if each.again is not None else ""
        rows.setdefault((each.kind, str(each.columns), row_name(each, summary)), []).append(text + beyond)
    for row, both in rows.items():
        table.add_row(*row, *both)
    return table
