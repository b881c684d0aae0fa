"""Stage `teacher`: a network learns to continue a video from remembered frames (docs/method.md, Teacher)."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...memory.memory import Memory, empty_memory
from ...model.config import StudentCard
from ...model.flow import add_noise, shift_sigma
from ...model.sampler import seeded_generator
from ..config import NetworkConfig, OptimConfig, check_range
from ..data.clips import open_clips
from ..parallel import ParallelState
from ..stage import Stage
from .recycling import ErrorBuffer, RecyclingConfig
from .score import flow_given_context
from .student import Student

POLICIES = ("novel", "clean", "uniform", "fifo")
"""Contexts come from all policies, so that one teacher serves students of each."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(NetworkConfig):
    """Stage `teacher`: a context teacher (docs/method.md, Teacher)."""

    init: str = ""
    """The network to start from, bidirectional or causal, in Wan's layout; empty for new weights."""
    num_chunks: int = 27
    """Chunks of a clip."""
    target_chunks: int = 7
    plain_share: float = 0.1
    """Share of the iterations without a context. They keep the ability of plain generation."""
    text_dropout: float = 0.1
    recycling: RecyclingConfig = field(default_factory=RecyclingConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.9, 0.999), clip=1.0, ema=0.999))
    out: str = "runs/teacher"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "target_chunks", least=1, most=self.num_chunks - 1)


class TeacherStage(Stage):
    """One network, its clips and its prediction errors."""

    exported = "teacher"

    def __init__(self, config: TeacherConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        self.network = self.load_network(config.init, "teacher", config.optim)
        self.clips = open_clips(config, config.num_chunks)
        self.errors = ErrorBuffer(config.recycling)

    def step(self, step: int) -> dict[str, float]:
        """One update."""
        config, samples, device = self.config, self.parallel.samples(self.config.batch), self.parallel.device
        # The same number for all samples and ranks: all ranks must run the same passes.
        context_chunks = self._context_chunks(step)
        total, remembered = 0.0, 0
        for number in samples:
            generator = seeded_generator(config.seed, 0, step, number)
            latents, text = (tensor.to(device) for tensor in self.clips.sample(step * config.batch + number))
            if torch.rand((), generator=generator) < config.text_dropout:
                text = self.clips.empty.to(text)
            memory = self.commit_context(latents, text, context_chunks, generator)
            loss, error, sigma, clean = self.loss(memory, latents, text, generator)
            (loss / len(samples)).backward()
            keep = not clean or torch.rand((), generator=generator) < config.recycling.learn_clean_share
            if keep and error.isfinite().all():
                self.errors.add(sigma, error[0], config.memory.chunk, generator)
            total += loss.item() / len(samples)
            remembered += len(memory.slots.all) / len(samples)
        total = self.parallel.mean(total)
        metrics = {"loss": total, **self.trained["teacher"].update(total, self.lr_factor(step))}
        frames = config.batch * (context_chunks + config.target_chunks) * config.memory.chunk
        return {**metrics, "remembered": remembered, "tokens": frames * config.frame_tokens}

    def _context_chunks(self, step: int) -> int:
        generator = seeded_generator(self.config.seed, 1, step)
        if torch.rand((), generator=generator) < self.config.plain_share:
            return 0
        most = self.config.num_chunks - self.config.target_chunks
        return int(torch.randint(1, most + 1, (), generator=generator))

    def commit_context(self, latents: Tensor, text: Tensor, num_chunks: int, generator: torch.Generator) -> Memory:
        """A memory of the first chunks of a clip, with a random policy and this network's keys."""
        policy = POLICIES[int(torch.randint(len(POLICIES), (), generator=generator))]
        _, channels, _, height, width = latents.shape
        memory = empty_memory(dataclasses.replace(self.config.memory, policy=policy), (channels, height, width))
        return Student(self.network, text).encode_clip(memory, latents[:, :, : num_chunks * memory.config.chunk])

    def loss(
        self, memory: Memory, latents: Tensor, text: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, float, bool]:
        """Flow error of the target; error of x0, its noise level, and whether the context was clean."""
        config, device = self.config, latents.device
        first, chunk = memory.num_frames, config.memory.chunk
        target = latents[:, :, first : first + config.target_chunks * chunk]
        context, clean = self.add_errors(memory.latents_of(memory.slots.all).to(device), generator)
        sigma = float(shift_sigma(torch.rand((), generator=generator), config.shift))
        noise = torch.randn(target.shape, generator=generator).to(device)
        texts_of = lambda frames: text if len(text) == 1 else text[[frame // chunk for frame in frames]]
        target_text = texts_of(range(first, first + target.shape[2], chunk))
        x = add_noise(target, noise, sigma)
        flow = flow_given_context(self.network, context, texts_of(memory.slots.all), x, sigma, target_text)
        difference = flow - (noise - target)
        return difference.square().mean(), -sigma * difference.detach(), sigma, clean

    def add_errors(self, context: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Remembered frames [1, C, M, H, W] with recycled errors, and whether none were added.

        The first frame stays clean in half of the cases.
        """
        settings = self.config.recycling
        clean = bool(torch.rand((), generator=generator) < settings.clean_share)
        error = self.errors.draw(context.shape[2], generator) if context.shape[2] else None
        if error is None or clean or torch.rand((), generator=generator) >= settings.share:
            return context, True
        error = error.to(context.device)
        if torch.rand((), generator=generator) < 0.5:
            error[:, :1] = 0
        return context + error, False

    def extra_state(self) -> dict[str, Tensor]:
        return self.errors.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.errors.load_state(state)

    def card(self) -> StudentCard:
        steps = tuple(1000 * (1 - k / 20) for k in range(20))  # those of an undistilled model
        name, data = f"{self.config.preset} context teacher", self.clips.describe()
        return StudentCard(name=name, stage="teacher", steps=steps, solver="euler", data=data)
