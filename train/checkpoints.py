"""Checkpoints of a run: one folder each (torch.distributed.checkpoint), written completely or not at all."""

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from ..model.checkpoints.containers import read_json
from .config import field_defaults, plain
from .stage import Stage

MAY_CHANGE = (
    "steps",
    "checkpoint_every",
    "sample_every",
    "max_skipped",
    "device",
    "recompute",
    "clips_per_pass",
    "out",
)
"""Settings that a resumed run may change."""
MAY_CHANGE_IN_PARTS = ("lr", "clip", "spike", "clips_per_pass")
"""The same of optimisers and of the anchor."""
NUM_KEPT = 2
"""Number of checkpoints on disk."""


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(run)), None)


class Checkpoints:
    """Writes and reads the checkpoints of one stage."""

    def __init__(self, run: Path, stage: Stage, name: str):
        self.run, self.stage, self.name, self.parallel = run, stage, name, stage.parallel
        self.config = plain(dataclasses.asdict(stage.config))
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def _tensors(self) -> dict[str, dict]:
        return {name: trained.state() for name, trained in self.stage.trained.items()}

    def save(self, step: int, seconds: float, revision: str) -> None:
        """Write the state before iteration `step`, and delete old checkpoints."""
        final = self.run / "checkpoints" / f"step-{step:08d}"
        part = final.with_name(final.name + ".part")
        if self.parallel.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.parallel.barrier()
        save_tensors(self._tensors(), checkpoint_id=part)
        torch.save(self.stage.extra_state(), part / f"rank{self.parallel.rank}.pt")
        self.parallel.barrier()
        if self.parallel.is_main:
            state = {
                "stage": self.name, "step": step, "seconds": seconds, "revision": revision, "config": self.config,
                "world_size": self.parallel.world_size,
                "progress": {name: trained.progress() for name, trained in self.stage.trained.items()},
            }  # fmt: skip
            (part / "run.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for old in list_checkpoints(self.run)[:-NUM_KEPT]:
                shutil.rmtree(old)
        self.parallel.barrier()

    def load(self, extra_state: bool = True) -> dict[str, Any]:
        """Restore the stage from the newest checkpoint; returns its `run.json`. An export needs no extra state.

        Raises ValueError without a checkpoint, or if the settings differ from those of the checkpoint.
        """
        path = newest_checkpoint(self.run)
        if path is None:
            raise ValueError(f"resume: {self.run} has no checkpoint; start without --resume")
        run = read_json(path / "run.json")
        self._check_config(run["config"], path)
        if extra_state:
            self._load_extra_state(run["world_size"], path)
        tensors = self._tensors()
        load_tensors(tensors, checkpoint_id=path)
        for name, trained in self.stage.trained.items():
            trained.load_state(tensors[name], run["progress"][name])
        return run

    def _check_config(self, before: dict[str, Any], path: Path) -> None:
        # Settings that are newer than the checkpoint had their default values.
        before = plain(field_defaults(self.stage.config)) | before
        for name, value in self.config.items():
            if name not in MAY_CHANGE and _fixed(before.get(name)) != _fixed(value):
                raise ValueError(
                    f"{name}: {value} now, {before.get(name)} when {path} was begun; resume with the same value"
                )

    def _load_extra_state(self, world_size: int, path: Path) -> None:
        states = [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
        if world_size == self.parallel.world_size:
            self.stage.load_extra_state(states[self.parallel.rank])
        elif any(states):
            raise ValueError(
                f"resume: {path} was written by {world_size} processes with error buffers or weights of their own;"
                f" start {world_size} processes, not {self.parallel.world_size}"
            )


def _fixed(value: Any) -> Any:
    """A setting without the parts that a resumed run may change."""
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name not in MAY_CHANGE_IN_PARTS}
