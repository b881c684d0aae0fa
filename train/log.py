"""What a run says of itself: a progress line for a person, a JSON line per step for a machine."""

import json
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows does not say
    resource = None

OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_gb")
"""Figures that tell of the machine, not of what was learnt."""
WINDOW = 50
"""Steps over which the progress line averages."""


def peak_bytes() -> int:
    """Most memory this process has held: of the GPU if it uses one, else of the machine; 0 where that is not known."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """Progress of one run; `log.jsonl` in its folder grows by a line per step."""

    def __init__(self, folder: Path, stage: str, num_steps: int, start: int = 0, quiet: bool = False):
        self.folder, self.stage, self.num_steps, self.start = folder, stage, num_steps, start
        self.quiet = quiet
        """Write nothing: another process does."""
        self.recent: dict[str, deque] = {}

    def __enter__(self) -> "RunLog":
        self.clock = time.monotonic()
        if self.quiet:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        kept = self._before(path) if self.start else []
        self.file = open(path, "w", encoding="utf-8")
        self.file.writelines(line + "\n" for line in kept)
        self.bar = tqdm(total=self.num_steps, initial=self.start, desc=self.stage, unit="step", mininterval=2)
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start)
        return self

    def __exit__(self, *exc) -> None:
        if self.quiet:
            return
        self.board.close()
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
        """Note one step's figures; `tokens`, those of its samples over all processes, as a rate."""
        if self.quiet:
            return
        now = time.monotonic()
        values["seconds"], self.clock = now - self.clock, now
        if tokens := values.pop("tokens", 0):
            values["tokens_per_second"] = tokens / values["seconds"]
        values["peak_gb"] = peak_bytes() / 1e9
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        self.bar.set_postfix(
            {name: f"{self.mean(name):.4g}" for name in values if name not in OF_THE_MACHINE}, refresh=False
        )
        self.bar.update()

    def note(self, step: int, **values: float) -> None:
        """Figures that are taken now and then, for example a validation."""
        if self.quiet:
            return
        for name, value in values.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.bar.write(
            f"{self.stage} {step + 1}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def picture(self, step: int, picture: Image.Image) -> None:
        """A filmstrip, as a PNG in the run's folder and on the board."""
        if self.quiet:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step + 1:08d}.png")
        self.board.add_image("sample", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def mean(self, name: str) -> float:
        """Mean over the recent steps."""
        values = self.recent.get(name, ())
        return sum(values) / max(1, len(values))
