"""The claim's table: what scripts/claim_measure.sh measured, all seeds together.

    python scripts/claim_table.py [FOLDER]          default: runs/claim

A row is an arm under a policy: three students, each on scenes of its own; differences are to the first row, paired.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from context_forcing.train.evaluation.evaluate import RESULTS
from context_forcing.train.evaluation.summary import Record, sum_up, tables

FPS = 16


def main(folder: Path) -> None:
    records = []
    for path in sorted(folder.glob(f"measured-*/{RESULTS}")):
        for raw in json.loads(path.read_text(encoding="utf-8"))["records"]:
            record = Record.from_dict(raw)
            arm = re.sub(r"-\d+/.*|/.*", "", record.student)
            records.append(dataclasses.replace(record, student=arm))
    if not records:
        sys.exit(f"{folder}: nothing was measured there; run scripts/claim_measure.sh first")
    for table in tables(sum_up(records), FPS):
        Console(width=240).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/claim"))
