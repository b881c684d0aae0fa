"""The claim's tables: what scripts/claim_measure.sh measured, all seeds together, dose by dose.

    python scripts/claim_table.py [FOLDER [MEASURED]]          default: runs/claim measured

A row is an arm under a policy after so many updates. Intervals of 95 % are bootstrap over training seeds, then over the
scenes of each seed. Differences are to arm ours under the same policy (windows: under novel), on the same scenes.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from context_forcing.train.evaluation.evaluate import RESULTS
from context_forcing.train.evaluation.judge import Trial
from context_forcing.train.evaluation.summary import BOOTSTRAP, Record, shuffled_rate
from context_forcing.train.evaluation.variants import NO_SLOW

OURS, FIGURES = "ours", ("recall", "recall_whole", "share_whole", "psnr", "residual", "heading_accuracy", "motion")
Values = dict[int, dict[int, float]]
"""A figure by seed and scene."""


def main(folder: Path, measured: str) -> None:
    doses: dict[int, list[Record]] = defaultdict(list)
    for path in sorted(folder.glob(f"{measured}/*-*-*/{RESULTS}")):
        arm, _, dose = path.parent.name.rsplit("-", 2)
        records = map(Record.from_dict, json.loads(path.read_text(encoding="utf-8"))["records"])
        doses[int(dose)] += [dataclasses.replace(record, student=arm) for record in records]
    if not doses:
        sys.exit(f"{folder / measured}: nothing was measured there; run scripts/claim_measure.sh first")
    for dose, records in sorted(doses.items()):
        Console(width=240).print(table(f"{dose} updates", records))
    last = {record.seed: dose for dose, records in sorted(doses.items()) for record in records}
    if len(set(last.values())) > 1:
        pooled = [record for dose, records in doses.items() for record in records if last[record.seed] == dose]
        Console(width=240).print(table("the last measured updates of each seed", pooled))


def table(title: str, records: list[Record]) -> Table:
    """Means of each arm and policy over all scripts and for each of them, with differences to ours.

    `student` of a record is its arm.
    """
    rows = dict.fromkeys((record.student, record.policy) for record in records)
    cells = [None, *dict.fromkeys((record.kind, record.columns) for record in records)]
    columns = ("arm", "memory", "script", "recall", "against ours", "shuffled", *FIGURES[1:], "seeds, scenes")
    result = Table(*columns, title=title)
    for (arm, policy), cell in ((row, cell) for row in rows for cell in cells):
        own = of_row(records, arm, policy, cell)
        reference = values(of_row(records, OURS, "novel" if policy == NO_SLOW else policy, cell), "recall")
        recall = values(own, "recall")
        minus = {
            seed: {scene: value - reference[seed][scene] for scene, value in scenes.items() if scene in reference[seed]}
            for seed, scenes in recall.items()
            if seed in reference
        }
        result.add_row(
            arm, policy, f"{cell[0]} {cell[1]}" if cell else "all", interval(recall, ".2f"),
            interval(minus, "+.2f") if minus and arm != OURS else "", f"{shuffled(own):.2f}",
            *(f"{mean(values(own, figure)):.2f}" for figure in FIGURES[1:]),
            f"{len(recall)}, {sum(map(len, recall.values()))}",
        )  # fmt: skip
    return result


def of_row(records: list[Record], arm: str, policy: str, cell: tuple[str, int] | None) -> list[Record]:
    """The records of an arm under a policy: of one script, or of all."""
    own = [record for record in records if (record.student, record.policy) == (arm, policy)]
    return [record for record in own if cell in (None, (record.kind, record.columns))]


def values(records: list[Record], figure: str) -> Values:
    """A figure by seed and scene, the mean over the scripts. Scenes without the figure are left out."""
    found: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if (value := record.figures(record.gap_frames)[figure]) is not None:
            found[record.seed][record.scene].append(value)
    return {seed: {scene: float(np.mean(own)) for scene, own in scenes.items()} for seed, scenes in found.items()}


def shuffled(records: list[Record]) -> float:
    """Match rate of landmarks of unrelated scenes, of one student and script at a time, the mean of all."""
    groups: dict[tuple[int, str, int], list[Trial]] = defaultdict(list)
    for record in records:
        if isinstance(record.trial, Trial):
            groups[record.seed, record.kind, record.columns].append(record.trial)
    return float(np.mean([shuffled_rate(trials) for trials in groups.values() if len(trials) > 1]))


def mean(by_seed: Values) -> float:
    """The mean over all scenes."""
    return float(np.mean([value for scenes in by_seed.values() for value in scenes.values()])) if by_seed else np.nan


def interval(by_seed: Values, spec: str) -> str:
    """Mean and interval: seeds are drawn first, then scenes of each drawn seed."""
    rng, seeds = np.random.default_rng(0), [np.array(list(scenes.values())) for scenes in by_seed.values()]
    drawn = [
        np.concatenate([rng.choice(seeds[s], len(seeds[s])) for s in rng.integers(len(seeds), size=len(seeds))]).mean()
        for _ in range(BOOTSTRAP)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{mean(by_seed):{spec}} [{low:{spec}}, {high:{spec}}]"


if __name__ == "__main__":
    folder, measured, *_ = [*sys.argv[1:], *("runs/claim", "measured")[len(sys.argv) - 1 :]]
    main(Path(folder), measured)
