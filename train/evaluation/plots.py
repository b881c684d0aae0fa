"""Plots of evaluation: recall over gaps and drift over long rollouts, each with motion.

Needs matplotlib (extra `train`). Its global state is not used, so other code that plots is not disturbed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ...model.units import latent_seconds
from .judge import QUARTERS
from .summary import BRIDGED, KINDS, LONG, Cell, Summary, row_name

COLOURS = (
    "#0b6fb8", "#d9571a", "#2c8a4b", "#8a4fbf", "#b8860b", "#3b3f46", "#c2378a", "#1b9aa0", "#8c564b", "#5f7d00",
    "#e0a0c0",
)  # fmt: skip
MARKERS = "osD^vPX*<>h"
_INK, _FAINT = "#2a2e35", "#c9ced6"
_DODGE, _SPREAD = 0.015, 0.7
"""Distance of rows at one gap, as a share of the axis, and room of all rows, as a share of that between two gaps."""


def draw_recall(summary: Summary, fps: float, path: Path) -> None:
    """Recall over the time out of view, above the heading accuracy of the same rollouts. No gaps, no file."""
    cells = [cell for cell in summary.cells if cell.kind in KINDS]
    if not cells:
        return
    trips = list(dict.fromkeys((cell.kind, cell.columns) for cell in cells))
    canvas = Canvas(figsize=(max(11, 4.2 * len(trips)), 9.2), layout="constrained")
    axes = canvas.subplots(3, len(trips), sharex=True, sharey="row", squeeze=False)
    panels = (
        ("recall", "recall\n(as last seen)", BRIDGED),
        ("recall_first", "recall\n(as first seen)", BRIDGED),
        ("heading_accuracy", "heading accuracy", None),
    )
    seconds = latent_seconds(1, fps)
    for column, (kind, columns) in enumerate(trips):
        own = [cell for cell in cells if (cell.kind, cell.columns) == (kind, columns)]
        for row, (figure, label, level) in enumerate(panels):
            ax = axes[row, column]
            _style(ax, ylabel=label if column == 0 else "", level=level)
            _lines(ax, own, summary, figure, scale=seconds)
            ax.set_ylim(-0.03, 1.03)
            if level is not None:
                _shuffled(ax, own, scale=seconds)
        axes[0, column].set_title(f"the camera {kind}s {columns} columns away, then returns", fontsize=10, color=_INK)
        axes[-1, column].set_xlabel("seconds out of view")
        axes[-1, column].set_xlim(0, 1.08 * seconds * max(cell.at for cell in cells))
    title = (
        f"Recall over gaps, {_rollouts(cells)} a point, 95 % intervals. Grey: match rate of unrelated rollouts;"
        f" dashed: bridged, {BRIDGED}"
    )
    _save(canvas, axes[0, 0], title, path)


def draw_drift(summary: Summary, fps: float, path: Path) -> None:
    """Long rollouts by quarter: consistency in the upper row, motion in the lower. No long rollouts, no file."""
    cells = [cell for cell in summary.cells if cell.kind == LONG and cell.at <= QUARTERS]
    if not cells:
        return
    canvas = Canvas(figsize=(16, 7.2), layout="constrained")
    axes = canvas.subplots(2, 4, sharex=True)
    panels = (
        ("palette", "palette distance\n(latent units, less is better)", 1.0, None),
        ("palette_any", "palette distance to any heading\n(latent units, less is better)", 1.0, None),
        ("palette_own", "palette distance to own first quarter\n(latent units, less is better)", 1.0, None),
        ("residual", "distance to nearest template\n(sharpness, less is better)", 1.0, None),
        ("reach", "memory reach, seconds\n(age of the oldest frame that is not sink)", latent_seconds(1, fps), None),
        ("heading_accuracy", "heading accuracy\n(share of frames at the expected heading)", 1.0, None),
        ("motion", "camera motion over expected\n(true world: 1)", 1.0, 1.0),
        ("change", "frame difference over true\n(true world: 1, a still picture: 0)", 1.0, 1.0),
    )
    for ax, (figure, title, unit, level) in zip(axes.flat, panels):
        _style(ax, title=title, level=level)
        _lines(ax, cells, summary, figure, unit=unit)
        ax.set_ylim(bottom=0, top=1.03 if figure == "heading_accuracy" else None)
        ax.set_xticks(range(1, QUARTERS + 1))
        ax.set_xlim(0.6, QUARTERS + 0.4)
    for ax in axes[-1]:
        ax.set_xlabel("quarter of the rollout")
    _save(canvas, axes[0, 0], f"Drift over long rollouts, {_rollouts(cells)} a point, 95 % intervals", path)


def _style(ax: Axes, title: str = "", ylabel: str = "", level: float | None = None) -> None:
    """Titles, colours, and a dashed line at `level`."""
    ax.set_title(title, fontsize=10, color=_INK)
    ax.set_ylabel(ylabel, fontsize=9, color=_INK)
    ax.tick_params(colors=_INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_FAINT)
    ax.grid(color=_FAINT, linewidth=0.5, alpha=0.6)
    ax.set_axisbelow(True)
    if level is not None:
        ax.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))


def _lines(
    ax: Axes, cells: Sequence[Cell], summary: Summary, figure: str, *, scale: float = 1.0, unit: float = 1.0
) -> None:
    """One line with intervals per row; a row has the same colour in every panel."""
    names = list(dict.fromkeys(row_name(cell, summary) for cell in summary.cells))
    ats = sorted({0, *(cell.at for cell in cells)})
    width = scale * min(_DODGE * ats[-1], _SPREAD * min(np.diff(ats), default=0) / len(names))
    for i, name in enumerate(names):
        own = [cell for cell in cells if row_name(cell, summary) == name and figure in cell.figures]
        if not own:
            continue
        figures = [cell.figures[figure] for cell in own]
        mean, low, high = unit * np.array([(each.mean, each.low, each.high) for each in figures]).T
        at = scale * np.array([cell.at for cell in own]) + width * (i - (len(names) - 1) / 2)
        ax.errorbar(
            at, mean, yerr=np.maximum(0, [mean - low, high - mean]), label=name, color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.6, elinewidth=1.1, capsize=3,
        )  # fmt: skip


def _shuffled(ax: Axes, cells: Sequence[Cell], scale: float) -> None:
    """The band of match rates of unrelated rollouts, over all rows: the recall without memory."""
    gaps = sorted({cell.at for cell in cells})
    rates = [[cell.shuffled for cell in cells if cell.at == gap and cell.shuffled is not None] for gap in gaps]
    # Constant outside of the measured gaps, so that a single gap gives a band too.
    at, rates = scale * np.array([0, *gaps, 2 * gaps[-1]]), [rates[0], *rates, rates[-1]]
    ax.fill_between(at, list(map(min, rates)), list(map(max, rates)), color=_FAINT, alpha=0.7, linewidth=1)


def _rollouts(cells: Sequence[Cell]) -> str:
    least, most = min(cell.n for cell in cells), max(cell.n for cell in cells)
    return f"{least} rollouts" if least == most else f"{least} to {most} rollouts"


def _save(canvas: Canvas, ax: Axes, title: str, path: Path) -> None:
    """Add the legend of one panel for all, and the title."""
    handles, labels = ax.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    canvas.suptitle(title, fontsize=11, color=_INK)
    canvas.savefig(path, dpi=110)
