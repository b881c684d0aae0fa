"""What a run says of itself: a progress line for a person, a JSON line per step for a machine."""

import json
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

WINDOW = 50
"""Steps over which the progress line averages."""


class RunLog:
    """Progress of one run; `log.jsonl` in its folder grows by a line per step."""

    def __init__(self, folder: Path, stage: str, num_steps: int, start: int = 0):
        self.folder, self.stage, self.num_steps, self.start = folder, stage, num_steps, start
        self.recent: dict[str, deque] = {}

    def __enter__(self) -> "RunLog":
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        kept = self._before(path) if self.start else []
        self.file = open(path, "w", encoding="utf-8")
        self.file.writelines(line + "\n" for line in kept)
        self.bar = tqdm(total=self.num_steps, initial=self.start, desc=self.stage, unit="step", mininterval=2)
        self.clock = time.monotonic()
        return self

    def __exit__(self, *exc) -> None:
        self.file.close()
        self.bar.close()

    def _before(self, path: Path) -> list[str]:
        """Lines of the steps that are not taken again: a killed run may have logged past its last checkpoint."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] < self.start:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):  # the line that a kill cut short
                continue
        return kept

    def step(self, step: int, **values: float) -> None:
        """Note one step's figures."""
        now = time.monotonic()
        values["seconds"], self.clock = now - self.clock, now
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        self.bar.set_postfix({name: f"{self.mean(name):.4g}" for name in values if name != "seconds"}, refresh=False)
        self.bar.update()

    def note(self, step: int, **values: float) -> None:
        """Figures that are taken now and then, for example a validation."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.bar.write(
            f"{self.stage} {step + 1}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def mean(self, name: str) -> float:
        """Mean over the recent steps."""
        values = self.recent.get(name, ())
        return sum(values) / max(1, len(values))
