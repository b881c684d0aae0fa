"""Stage `pretrain`: a causal student by teacher forcing over the Slow-Fast layout (docs/method.md, Training)."""

from dataclasses import dataclass, field

import torch

from ...model.config import StudentCard
from ...model.flow import TIMESTEPS, shift_sigma
from ..config import NetworkConfig, OptimConfig, check_range
from ..data.batches import Batch, open_batches
from ..parallel import ParallelState
from ..stage import Stage
from .forced_loss import ForcingConfig, LossNoise, add_gradients, mean_recall_error


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ForcingConfig, NetworkConfig):
    """Stage `pretrain`: teacher forcing over the Slow-Fast layout (docs/method.md, Training).

    The demo world has true views. Clips of an encoded set have none: every column has weight 1, and layouts follow from
    the latents.
    """

    init: str = ""
    """The network to start from, bidirectional or causal, in any layout; empty for new weights."""
    num_chunks: int = 12
    sample_steps: int = 8
    """Number of denoising steps on the student card."""
    openings: int = 24
    """Clips of one chunk in addition to the `batch` long ones. They train the start of a video."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(kind="muon", lr=2e-3, betas=(0.9, 0.98), clip=1.0))
    out: str = "runs/pretrain"

    def __post_init__(self):
        NetworkConfig.__post_init__(self)
        ForcingConfig.__post_init__(self)
        check_range(self, "num_chunks", "sample_steps", "unseen_weight", above=0)
        check_range(self, "openings", least=0)


class PretrainStage(Stage):
    """A causal student and its clips."""

    def __init__(self, config: PretrainConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        parallel.samples(config.openings, "openings")  # raises for a number that does not divide
        self.batches = open_batches(config, config.num_chunks, config.text_dropout, config.pacing, config.long_trips)
        self.validation = self.batches.validation(4 * config.batch)
        self.network = self.load_network(config.init, "student", config.optim)

    def step(self, step: int) -> dict[str, float]:
        """One update on long clips and on openings."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss = self._backward(self.batches.long(step, config.batch), generator)
        if config.openings:
            self._backward(self.batches.openings(step, config.openings), generator)
        frames = (config.batch * config.num_chunks + config.openings) * config.memory.chunk
        metrics = {"loss": loss, **self.trained["student"].update(loss, self.lr_factor(step))}
        return {**metrics, "tokens": frames * config.frame_tokens}

    def _backward(self, batch: Batch, generator: torch.Generator) -> float:
        """Add the gradients of this rank's clips; returns the loss of the whole batch."""
        config = self.config
        sigma_BK = shift_sigma(torch.rand(batch.slots.shape[:2], generator=generator), config.shift)
        noise = LossNoise.draw(config, batch, sigma_BK, generator)
        return add_gradients(self.network, config, batch, noise, self.parallel)

    def validate(self) -> dict[str, float]:
        """Mean errors of the validation clips (recall_error)."""
        return mean_recall_error(self.network, self.config, self.config.memory, self.validation, self.parallel)

    def card(self) -> StudentCard:
        config = self.config
        steps = tuple(TIMESTEPS * (1 - k / config.sample_steps) for k in range(config.sample_steps))
        name = f"{config.preset} student, teacher forced"
        return StudentCard(name=name, stage="pretrain", steps=steps, solver="euler", data=self.batches.clips.describe())
