"""Logs of a run: a progress bar, one JSON line per step, TensorBoard."""

import json
import sys
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..memory.files import atomic_path

try:
    import resource
except ImportError:  # Windows
    resource = None

MACHINE_METRICS = ("seconds", "tokens_per_second", "peak_gb")
"""Metrics that depend on the machine."""
WINDOW = 50
"""Number of steps that the progress bar averages over."""


def peak_bytes() -> int:
    """Peak memory of this process: of the GPU if it uses one, else of the machine; 0 if unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """Writes `log.jsonl`, `samples/` and `tensorboard/` in the folder of a run; nothing unless `enabled`."""

    def __init__(self, folder: Path, stage: str, num_steps: int, start: int = 0, enabled: bool = True):
        self.folder, self.stage, self.num_steps, self.start = folder, stage, num_steps, start
        self.enabled = enabled
        self.recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def __enter__(self) -> "RunLog":
        self.last_time = time.monotonic()
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "log.jsonl"
            kept = self._lines_before_start(path) if self.start else []
            with atomic_path(path) as part:  # A process that is killed here loses no line.
                part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self.file = open(path, "a", encoding="utf-8")
            self.bar = tqdm(total=self.num_steps, initial=self.start, desc=self.stage, unit="step", mininterval=2)
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start)
        return self

    def __exit__(self, *exc) -> None:
        if self.enabled:
            self.board.close()
            self.file.close()
            self.bar.close()

    def _lines_before_start(self, path: Path) -> list[str]:
        """Lines of earlier steps: a killed run may have logged steps after its last checkpoint, and half a line."""
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] < self.start:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        return kept

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. `tokens`, of all processes together, is logged as a rate."""
        if not self.enabled:
            return
        values, now = dict(metrics), time.monotonic()
        values["seconds"], self.last_time = now - self.last_time, now
        if tokens := values.pop("tokens", 0):
            values["tokens_per_second"] = tokens / values["seconds"]
        values["peak_gb"] = peak_bytes() / 1e9
        self._write(step, values)
        for name, value in values.items():
            self.recent[name].append(value)
        means = {name: sum(self.recent[name]) / len(self.recent[name]) for name in values}
        shown = {name: f"{mean:.4g}" for name, mean in means.items() if name not in MACHINE_METRICS}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def log_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log validation metrics."""
        if self.enabled:
            self._write(step, metrics, "validation/")
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.bar.write(f"{self.stage} {step + 1}: {text}")

    def _write(self, step: int, metrics: Mapping[str, float], prefix: str = "") -> None:
        for name, value in metrics.items():
            self.board.add_scalar(prefix + name, value, step)
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def log_image(self, step: int, image: Image.Image) -> None:
        """Write a sample image as PNG and to TensorBoard."""
        if self.enabled:
            folder = self.folder / "samples"
            folder.mkdir(exist_ok=True)
            image.save(folder / f"step-{step + 1:08d}.png")
            self.board.add_image("sample", np.asarray(image.convert("RGB")), step, dataformats="HWC")
