"""A gate: a run of distillation ends when its student forgets (docs/method.md, Recall through distillation)."""

import math

import torch
from torch import Tensor

from ...model.network import Network
from ..config import NetworkConfig
from ..data.batches import open_batches
from ..data.clips import ShownBy
from ..parallel import ParallelState
from ..trained_network import TrainedNetwork
from .anchor import AnchorConfig
from .forced_loss import mean_recall_error, take

GATE_CLIPS = 2
"""Clips that are measured, in units of `anchor.batch`."""


class RecallGate:
    """Measures the error of recall of a student's exported weights, and keeps the last weights that passed.

    Raises ValueError for an encoded set without videos (open_clips), and for clips in which nothing is recalled.
    """

    def __init__(self, config: NetworkConfig, anchor: AnchorConfig, limit: float, parallel: ParallelState):
        self.config, self.anchor, self.limit, self.parallel = config, anchor, limit, parallel
        batches = open_batches(config, anchor.chunks, 0.0, anchor.pacing, anchor.long_trips)
        size = GATE_CLIPS * anchor.batch
        self.clips = clips = take(batches.validation(size), range(size), parallel.device)
        if not ((clips.shown_by == ShownBy.MEMORY) | (clips.shown_by == ShownBy.UNKNOWN)).any():
            raise ValueError(
                f"anchor.chunks: {anchor.chunks}, so short that no clip of the gate returns to a place; give 12, or"
                " gate_every=0"
            )
        self.start = math.nan
        """The error of the student that the run began with."""
        self.failed = False
        self.kept: dict[str, Tensor] = {}
        """This rank's shards of the last weights that passed; empty before the first."""

    def measure(self, network: Network, trained: TrainedNetwork) -> dict[str, float]:
        """`recall_error` of the weights that an export would have."""
        with trained.averaged():
            return mean_recall_error(network, self.anchor, self.config.memory, self.clips, self.parallel)

    def begin(self, network: Network, trained: TrainedNetwork) -> None:
        """Measure the student that the run begins with, unless that is done."""
        if math.isnan(self.start):
            self.start, self.kept = error_of(self.measure(network, trained)), trained.exported()

    def check(self, network: Network, trained: TrainedNetwork) -> dict[str, float]:
        """Measure the student; returns the errors as metrics. A student that forgot gets the kept weights: `failed`."""
        errors = self.measure(network, trained)
        if error_of(errors) <= self.limit * self.start:
            self.kept = trained.exported()
        else:
            self.failed = True
            trained.set_exported(self.kept)
        return {f"recall_{name}": value for name, value in errors.items()}

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, of this rank."""
        if math.isnan(self.start):
            return {}
        return {"start": torch.tensor(self.start), "failed": torch.tensor(self.failed), **self.kept}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a checkpoint. A run that began without a gate has no state."""
        if state:
            state = dict(state)
            self.start, self.failed = state.pop("start").item(), bool(state.pop("failed"))
            self.kept = state


def error_of(errors: dict[str, float]) -> float:
    """The error of columns that only sink or slow frames show; of all columns if that is unknown."""
    return errors["memory"] if "memory" in errors else errors["all"]
