"""Stage `pretrain`: a causal student by teacher-forced flow matching over the Slow-Fast layout (demo_world.md 3)."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...model.codecs.demo_vae import load_demo_codec
from ...model.config import StudentCard
from ...model.flow import TIMESTEPS, add_noise, shift_sigma, x0_from_flow
from ...model.network import Network
from ...model.units import FRAMES_PER_LATENT
from ..config import PretrainConfig
from ..data.clips import FAST, MEMORY, UNSEEN, Batch, make_batch
from ..parallel import ParallelState
from ..stage import Stage, load_network
from ..trained_network import TrainedNetwork
from ..world.geometry import VIEW_COLUMNS
from .forcing import TeacherForcing, interleave, noisy_part

VALIDATION_SIGMA = 0.95
"""Noise level at which hardly anything but the memory can tell what stood there."""


def teacher_forced_flow(
    network: Network, batch: Batch, context: Tensor, noisy: Tensor, sigma_BT: Tensor, chunk: int
) -> Tensor:
    """Predicted flow of the noisy clip [B, C, T, H, W], every chunk seeing its own memory of the clean one."""
    num_chunks, latent_size = batch.slots.shape[1], (context.shape[1], *context.shape[3:])
    attend = TeacherForcing(batch.slots, chunk, network.grid(latent_size), network.head_dim)
    sigma_KSn = torch.stack([torch.zeros_like(sigma_BT), sigma_BT], dim=1).unflatten(-1, (num_chunks, chunk))
    text = network.embed_text(batch.text, num_chunks)
    flow = network.flow(interleave(context, noisy, chunk), sigma_KSn.transpose(1, 2).flatten(1), text, attend)
    return noisy_part(flow, chunk)


@dataclass(frozen=True)
class Draws:
    """The random part of a loss, for a whole batch: the same whoever computes which of its clips."""

    sigma_BT: Tensor
    noise: Tensor
    context: Tensor
    """Clean frames with a little noise, labelled clean: a student's own memory is never perfect."""

    @classmethod
    def of(cls, config: PretrainConfig, batch: Batch, generator: torch.Generator) -> "Draws":
        """One noise level a chunk, warped; noise; a context."""
        latents = batch.latents
        size, _, num_frames = latents.shape[:3]
        u = torch.rand(size, batch.slots.shape[1], generator=generator)
        sigma_BT = shift_sigma(u, config.shift).repeat_interleave(config.memory.chunk, dim=1)
        noise = torch.randn(latents.shape, generator=generator)
        level = config.context_noise * torch.rand(size, 1, num_frames, 1, 1, generator=generator)
        level = level * (torch.rand(size, 1, 1, 1, 1, generator=generator) < config.context_noise_share)
        return cls(sigma_BT, noise, add_noise(latents, torch.randn(latents.shape, generator=generator), level))

    def select(self, clips: range) -> "Draws":
        """Those of some clips."""
        return Draws(self.sigma_BT[clips], self.noise[clips], self.context[clips])

    def to(self, device: torch.device) -> "Draws":
        """On a device."""
        return Draws(self.sigma_BT.to(device), self.noise.to(device), self.context.to(device))


def column_weights(config: PretrainConfig, batch: Batch) -> Tensor:
    """How much each token column counts, [B, T, VIEW_COLUMNS].

    What the last frames show is three columns in four and soon learnt. The columns that have to be looked up in sink
    or slow frames weigh `recall_weight`, those that have to be made up `unseen_weight`.
    """
    return torch.tensor([1.0, config.recall_weight, config.unseen_weight], device=batch.where.device)[batch.where]


def training_loss(network: Network, config: PretrainConfig, batch: Batch, draws: Draws) -> Tensor:
    """Squared error of the flow, weighted by column and summed; divide by the sum of `column_weights`."""
    chunk, latents = config.memory.chunk, batch.latents
    noisy = add_noise(latents, draws.noise, draws.sigma_BT[:, None, :, None, None])
    flow = teacher_forced_flow(network, batch, draws.context, noisy, draws.sigma_BT, chunk)
    error_BTC = by_column((flow - (draws.noise - latents)).square().mean((1, 3)))
    return (error_BTC * column_weights(config, batch)).sum()


def by_column(error_BTW: Tensor) -> Tensor:
    """Mean over the latents of each token column, [B, T, VIEW_COLUMNS]."""
    return error_BTW.unflatten(-1, (VIEW_COLUMNS, -1)).mean(-1)


def recent_only(batch: Batch, num_fast: int, chunk: int) -> Batch:
    """The same clips remembered without sink and slow frames."""
    first = torch.arange(batch.slots.shape[1], device=batch.slots.device)[:, None] * chunk
    recent = batch.slots >= (first - num_fast).clamp(min=0)
    # Packed to the front: a frame's place in the memory is its position.
    order = recent.int().sort(dim=-1, descending=True, stable=True).indices
    slots = torch.where(recent, batch.slots, -1).gather(-1, order)
    return dataclasses.replace(batch, slots=slots)


@torch.no_grad()
def recall_error(network: Network, config: PretrainConfig, batch: Batch) -> dict[str, float]:
    """x0 error from almost pure noise, by where a column can be known from; `blind` is `memory` without the memory.

    When `memory` falls under `blind` the student has learnt to look things up (demo_world.md 3): the earliest sign
    that it works.
    """
    chunk, latents = config.memory.chunk, batch.latents
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    sigma = torch.full((latents.shape[0], latents.shape[2]), VALIDATION_SIGMA, device=latents.device)
    noisy = add_noise(latents, noise, VALIDATION_SIGMA)

    def errors(seen: Batch) -> Tensor:
        flow = teacher_forced_flow(network, seen, latents, noisy, sigma, chunk)
        return by_column((x0_from_flow(noisy, flow, VALIDATION_SIGMA) - latents).square().mean((1, 3)))

    columns, blind = errors(batch), errors(recent_only(batch, config.memory.fast - chunk, chunk))
    places = {"fast": FAST, "memory": MEMORY, "unseen": UNSEEN}
    found = {name: columns[batch.where == place].mean().item() for name, place in places.items()}
    return {**found, "blind": blind[batch.where == MEMORY].mean().item()}


class PretrainStage(Stage):
    """A causal student and clips of the demo world."""

    def __init__(self, config: PretrainConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        self.network, self.init_card = load_network(config.init, config, parallel, config.lora)
        self.trained = {"student": TrainedNetwork(self.network.net, config.optim, parallel)}
        codec = load_demo_codec(config.codec_path)
        self.make = functools.partial(make_batch, codec, config.memory, num_chunks=config.num_chunks)
        self.validation = self.make(seed=(config.data_seed, 0), size=4 * config.batch).to(parallel.device)

    def step(self, step: int) -> dict[str, float]:
        """One update on long clips, and on openings beside them."""
        config, draw = self.config, dict(text_dropout=self.config.text_dropout)
        batch = self.make(seed=(config.data_seed, 1, step), size=config.batch, pacing=config.pacing, **draw)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        total = self._learn(batch, generator)
        if config.openings:
            opening = self.make(seed=(config.data_seed, 2, step), size=config.openings, num_chunks=1, **draw)
            self._learn(opening, generator)
        frames = (config.batch * config.num_chunks + config.openings) * config.memory.chunk
        figures = {"loss": total, **self.trained["student"].update(total, self.lr_factor(step))}
        return {**figures, "tokens": frames * config.frame_tokens}

    def _learn(self, batch: Batch, generator: torch.Generator) -> float:
        """Gradients of this rank's clips of a batch; returns the loss over all of it."""
        mine = self.parallel.samples(len(batch.clips))
        draws = Draws.of(self.config, batch, generator)
        weights = column_weights(self.config, batch).sum()
        part, drawn = batch.select(mine), draws.select(mine)
        device = self.parallel.device
        loss = training_loss(self.network, self.config, part.to(device), drawn.to(device))
        # Gradients are averaged over ranks; what each adds is its share of the whole batch's mean.
        (loss * self.parallel.world_size / weights).backward()
        return self.parallel.mean(loss.item() * self.parallel.world_size / weights.item())

    def validate(self) -> dict[str, float]:
        return recall_error(self.network, self.config, self.validation)

    def export(self, folder: Path, step: int, seconds: float, revision: str) -> Path:
        """The student with its card."""
        config = self.config
        card = StudentCard(
            name=f"{config.preset} student, teacher forced", base=config.preset, stage="pretrain",
            steps=tuple(TIMESTEPS * (1 - k / config.sample_steps) for k in range(config.sample_steps)),
            shift=config.shift, solver="euler", memory=config.memory, size=tuple(config.size),
            data=f"demo world, drawn on the fly; clips of {config.num_chunks * config.memory.chunk} latent frames,"
            f" {FRAMES_PER_LATENT} pixel frames each",
        )  # fmt: skip
        return self.save(folder / "student.safetensors", "student", card, step, seconds, revision)
