"""Judged rollouts summed up: figures with intervals, paired differences, effective context length; tables of them.

Intervals are 95 % bootstrap over rollouts. Every student is given the same scenes and noise, so that a difference
between two is taken rollout by rollout, and its interval is that of the paired differences.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from rich.table import Table

from ..world.sprites import NUM_CLASSES
from .judge import QUARTERS, LongTrial, Trial

KINDS = ("dwell", "wander")
LONG = "long"
FIGURES = ("recall", "recall_first", "psnr", "residual", "heading_accuracy", "motion", "change")
LONG_FIGURES = ("palette", "residual", "reach", "heading_accuracy", "motion", "change")
HELD = 0.8
"""Recall from which a gap counts as bridged."""
BOOTSTRAP = 2000


@dataclass(frozen=True, kw_only=True)
class Record:
    """One judged film and how it came about."""

    student: str
    policy: str
    seed: int
    scene: int
    kind: str
    """dwell, wander or long."""
    gap_frames: int
    """Latent frames that the targets are out of view; 0 for a long rollout."""
    trial: Trial | LongTrial

    @classmethod
    def from_dict(cls, raw: Mapping) -> "Record":
        """The inverse of `dataclasses.asdict` after JSON."""
        judged = LongTrial if raw["kind"] == LONG else Trial
        trial = {name: tuple(value) if isinstance(value, list) else value for name, value in raw["trial"].items()}
        return cls(**{**raw, "trial": judged(**trial)})


@dataclass(frozen=True)
class Figure:
    """A mean over rollouts with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The rollouts of one student and policy under one script."""

    student: str
    policy: str
    kind: str
    at: int
    """The gap in latent frames; for long rollouts the quarter, from 1."""
    n: int
    figures: dict[str, Figure]
    shuffled: float | None
    """Match rate of targets with those of other rollouts: what a collapsed model would score. None for long ones."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A cell less the cell of another student or policy, over the rollouts that both have."""

    student: str
    policy: str
    against: tuple[str, str]
    kind: str
    at: int
    n: int
    figures: dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class EffectiveContext:
    """The largest gap bridged, recall >= HELD, by one student and policy under one script."""

    student: str
    policy: str
    kind: str
    figure: str
    """recall or recall_first."""
    frames: int
    """Largest measured gap such that it and every smaller one is bridged; 0 if the smallest is not."""
    is_bound: bool
    """The largest gap measured is bridged: the true length may be longer."""
    again: int | None
    """Largest gap bridged beyond one that is not; it does not count."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All there is to say about a set of records."""

    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    effective_context: tuple[EffectiveContext, ...]


def bootstrap(values: Sequence[float]) -> Figure:
    """Mean over rollouts and its interval; the draws are the same for every figure of as many rollouts."""
    values = np.asarray(values, dtype=float)
    low, high = np.percentile(values[_draws(len(values))].mean(1), [2.5, 97.5])
    return Figure(float(values.mean()), float(low), float(high))


@lru_cache(maxsize=8)
def _draws(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(BOOTSTRAP, n))


def sum_up(records: Sequence[Record]) -> Summary:
    """Cells of at least two rollouts, ordered by script, gap or quarter, student and policy.

    The first student under its first policy is what every other row is held against; rows of another student also
    against the first student under the same policy.
    """
    grouped: dict[tuple, list[Record]] = {}
    for record in records:
        for at in range(1, QUARTERS + 1) if record.kind == LONG else [record.gap_frames]:
            grouped.setdefault((record.student, record.policy, record.kind, at), []).append(record)
    groups = {key: grouped[key] for key in sorted(grouped, key=lambda key: ((*KINDS, LONG).index(key[2]), key[3]))}
    cells = [_cell(key, together) for key, together in groups.items() if len(together) > 1]
    rows = list(dict.fromkeys((record.student, record.policy) for record in records))
    differences = []
    for (student, policy, kind, at), together in groups.items():
        for against in dict.fromkeys([rows[0], (rows[0][0], policy)]):
            others = groups.get((*against, kind, at))
            if others and against != (student, policy) and (against == rows[0] or student != rows[0][0]):
                found = _difference((student, policy, kind, at), together, against, others)
                differences += [found] if found else []
    effective = [
        effective_context(student, policy, kind, figure, cells)
        for kind, (student, policy), figure in itertools.product(KINDS, rows, ("recall", "recall_first"))
        if any((cell.student, cell.policy, cell.kind) == (student, policy, kind) for cell in cells)
    ]
    return Summary(cells=tuple(cells), differences=tuple(differences), effective_context=tuple(effective))


def effective_context(student: str, policy: str, kind: str, figure: str, cells: Iterable[Cell]) -> EffectiveContext:
    """Read off the gaps from the smallest up to the first that is not bridged."""
    mine = [cell for cell in cells if (cell.student, cell.policy, cell.kind) == (student, policy, kind)]
    bridged = {cell.at: cell.figures[figure].mean >= HELD for cell in sorted(mine, key=lambda cell: cell.at)}
    held = list(itertools.takewhile(bridged.get, bridged))
    beyond = [gap for gap in bridged if bridged[gap] and gap not in held]
    return EffectiveContext(
        student=student, policy=policy, kind=kind, figure=figure, frames=max(held, default=0),
        is_bound=len(held) == len(bridged), again=max(beyond, default=None),
    )  # fmt: skip


def _values(record: Record, at: int) -> dict[str, float]:
    if record.kind == LONG:
        return {name: getattr(record.trial, name)[at - 1] for name in LONG_FIGURES}
    return {name: getattr(record.trial, name) for name in FIGURES}


def _cell(key: tuple, records: Sequence[Record]) -> Cell:
    student, policy, kind, at = key
    values = [_values(record, at) for record in records]
    return Cell(
        student=student, policy=policy, kind=kind, at=at, n=len(records),
        figures={name: bootstrap([each[name] for each in values]) for name in values[0]},
        shuffled=None if kind == LONG else shuffled_rate([record.trial for record in records]),
    )  # fmt: skip


def shuffled_rate(trials: Sequence[Trial]) -> float:
    """Match rate of remembered targets with the returned ones of other rollouts, over all ordered pairs of rollouts."""
    matches = pairs = 0
    for place in range(max(len(trial.remembered) for trial in trials)):
        both = [(t.remembered[place], t.returned[place]) for t in trials if len(t.remembered) > place]
        before, after = (np.bincount(classes, minlength=NUM_CLASSES) for classes in zip(*both))
        matches += int(before @ after) - sum(a == b for a, b in both)
        pairs += len(both) * (len(both) - 1)
    return matches / pairs


def _difference(
    key: tuple, records: Sequence[Record], against: tuple[str, str], others: Sequence[Record]
) -> Difference | None:
    student, policy, kind, at = key
    theirs = {(record.seed, record.scene): _values(record, at) for record in others}
    pairs = [
        (_values(record, at), theirs[record.seed, record.scene])
        for record in records
        if (record.seed, record.scene) in theirs
    ]
    if len(pairs) < 2:
        return None
    return Difference(
        student=student, policy=policy, against=against, kind=kind, at=at, n=len(pairs),
        figures={name: bootstrap([one[name] - two[name] for one, two in pairs]) for name in pairs[0][0]},
    )  # fmt: skip


def row_name(each: Cell | EffectiveContext, summary: Summary) -> str:
    """The policy, after the student where there are several."""
    several = len({cell.student for cell in summary.cells}) > 1
    return f"{each.student}, {each.policy}" if several else each.policy


def tables(summary: Summary, fps: float) -> list[Table]:
    """Consistency beside motion, for a person: recall, effective context, drift; those that there are figures for."""
    recall = [cell for cell in summary.cells if cell.kind != LONG]
    drift = [cell for cell in summary.cells if cell.kind == LONG]
    found = [_recall_table(recall, summary, fps), _effective_table(summary, fps)] if recall else []
    return found + ([_drift_table(drift, summary, fps)] if drift else [])


def _seconds(frames: float, fps: float) -> str:
    return f"{4 * frames / fps:.2f}"


def _against_first(cell: Cell, summary: Summary) -> Difference | None:
    mine = (cell.student, cell.policy, cell.kind, cell.at)
    found = (each for each in summary.differences if (each.student, each.policy, each.kind, each.at) == mine)
    return next(found, None)


def _recall_table(cells: Sequence[Cell], summary: Summary, fps: float) -> Table:
    table = Table(title=f"recall@gap (chance of a blind guess 1/{NUM_CLASSES}); difference: to the first row, paired")
    for column in ("script", "gap, frames", "gap, s", "who", "recall [95 %]", "difference [95 %]",
                   "as first seen [95 %]", "shuffled", "heading", "motion", "change", "residual", "PSNR",
                   "n"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("script", "who") else "right", no_wrap=True)
    for (kind, gap), together in itertools.groupby(cells, key=lambda cell: (cell.kind, cell.at)):
        about = (kind, str(gap), _seconds(gap, fps))
        for cell in together:
            by, difference = cell.figures, _against_first(cell, summary)
            table.add_row(
                *about, row_name(cell, summary), str(by["recall"]),
                _signed(difference.figures["recall"]) if difference else "", str(by["recall_first"]),
                f"{cell.shuffled:.2f}", f"{by['heading_accuracy'].mean:.2f}", f"{by['motion'].mean:.2f}",
                f"{by['change'].mean:.2f}", f"{by['residual'].mean:.3f}", f"{by['psnr'].mean:.1f}", str(cell.n),
            )  # fmt: skip
            about = ("", "", "")
        table.add_section()
    return table


def _signed(figure: Figure) -> str:
    return f"{figure.mean:+.2f} [{figure.low:+.2f}, {figure.high:+.2f}]"


def _effective_table(summary: Summary, fps: float) -> Table:
    table = Table(title=f"effective context, s: largest gap up to which recall stays at {HELD} or more")
    for column in ("script", "who", "as last seen", "as first seen"):
        table.add_column(column, no_wrap=True)
    rows: dict[tuple, list[EffectiveContext]] = {}
    for each in summary.effective_context:
        rows.setdefault((each.kind, row_name(each, summary)), []).append(each)
    for (kind, who), both in rows.items():
        table.add_row(kind, who, *[_effective(each, fps) for each in both])
    return table


def _effective(each: EffectiveContext, fps: float) -> str:
    text = ("at least " if each.is_bound else "") + _seconds(each.frames, fps) if each.frames else "less than measured"
    return text + (f" (again at {_seconds(each.again, fps)}, not counted)" if each.again is not None else "")


def _drift_table(cells: Sequence[Cell], summary: Summary, fps: float) -> Table:
    table = Table(title="long rollouts by quarter; difference: to the first row, paired")
    for column in ("quarter", "who", "palette [95 %]", "difference [95 %]", "residual [95 %]", "reach, s",
                   "heading [95 %]", "motion [95 %]", "change [95 %]", "n"):  # fmt: skip
        table.add_column(column, justify="left" if column == "who" else "right", no_wrap=True)
    for quarter, together in itertools.groupby(cells, key=lambda cell: cell.at):
        about = str(quarter)
        for cell in together:
            by, difference = cell.figures, _against_first(cell, summary)
            residual = by["residual"]
            table.add_row(
                about, row_name(cell, summary), str(by["palette"]),
                _signed(difference.figures["palette"]) if difference else "",
                f"{residual.mean:.3f} [{residual.low:.3f}, {residual.high:.3f}]", f"{4 * by['reach'].mean / fps:.1f}",
                str(by["heading_accuracy"]), str(by["motion"]), str(by["change"]), str(cell.n),
            )  # fmt: skip
            about = ""
        table.add_section()
    return table
