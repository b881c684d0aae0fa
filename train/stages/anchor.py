"""The anchor of distillation: the loss of pretraining on true clips, beside distribution matching (docs/method.md).

Distribution matching scores what the student makes. It pulls a student that forgot a place towards any place that
looks true. The anchor shows the student which place it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.flow import shift_sigma
from ...model.network import Network
from ...model.sampler import seeded_generator
from ..config import NetworkConfig, check_range
from ..data.batches import open_batches
from ..parallel import ParallelState
from .forced_loss import ForcingConfig, LossNoise, add_gradients


@dataclass(frozen=True, kw_only=True)
class AnchorConfig(ForcingConfig):
    """The teacher-forced loss of the student on true clips."""

    weight: float = 0.0
    """Weight of the loss. With 0 there is no anchor, and a set of prompts is enough."""
    chunks: int = 12
    """Chunks of a clip."""
    batch: int = 4
    """Clips of a student update over all processes."""
    own_sigmas: float = 1.0
    """Share of noise levels that are the student's own steps. The others are from the whole range. A distilled student
    computes at its own steps only."""
    unseen_weight: float = 0.0
    """Loss weight of columns that no remembered frame shows (demo world only). A squared error would make them the mean
    of what is possible; distribution matching decides them."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "weight", least=0)
        check_range(self, "chunks", least=2)
        check_range(self, "batch", least=1)
        check_range(self, "own_sigmas", least=0, most=1)


class Anchor:
    """True clips and their loss. Raises ValueError for an encoded set without videos (open_clips)."""

    def __init__(self, config: NetworkConfig, anchor: AnchorConfig, sigmas: Sequence[float], parallel: ParallelState):
        self.config, self.anchor, self.parallel = config, anchor, parallel
        self.sigmas = torch.tensor(sigmas)
        self.batches = open_batches(config, anchor.chunks, anchor.text_dropout, anchor.pacing, anchor.long_trips)

    def add_gradients(self, network: Network, step: int) -> float:
        """Add the weighted gradients of an iteration's clips to a network; returns the loss without the weight."""
        batch = self.batches.long(step, self.anchor.batch)
        generator = seeded_generator(self.config.seed, 2, step)
        noise = LossNoise.draw(self.anchor, batch, self.draw_sigmas(generator), generator)
        return add_gradients(network, self.anchor, batch, noise, self.parallel, self.anchor.weight)

    def draw_sigmas(self, generator: torch.Generator) -> Tensor:
        """One noise level per chunk, [B, K]."""
        u, own = torch.rand(self.anchor.batch, self.anchor.chunks, generator=generator), self.anchor.own_sigmas
        if not own:
            return shift_sigma(u, self.config.shift)
        step = (u / own * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        rest = shift_sigma(((u - own) / max(1 - own, 1e-6)).clamp(0, 1), self.config.shift)
        return torch.where(u < own, self.sigmas[step], rest)
