"""The loss of teacher forcing over the Slow-Fast layout (docs/method.md, Training), and the error of recall.

Shapes: B batch, C latent channels, T latent frames, H W latent rows and columns, K chunks.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...memory.config import MemoryConfig
from ...model.flow import add_noise, x0_from_flow
from ...model.network import Network
from ..config import check_range
from ..data.batches import Batch
from ..data.clips import ShownBy
from ..parallel import ParallelState
from .forcing import TeacherForcing, interleave, noisy_part

VALIDATION_SIGMA = 0.95
"""The target is almost pure noise, so that a low error requires the memory."""


@dataclass(frozen=True, kw_only=True)
class ForcingConfig:
    """Clips of teacher forcing and their loss."""

    context_noise: float = 0.3
    """Highest noise level of remembered frames, which keep timestep 0. It keeps long rollouts from drifting."""
    context_noise_share: float = 0.7
    recall_weight: float = 5.0
    """Loss weight of columns that only sink or slow frames show (demo world only)."""
    unseen_weight: float = 2.0
    """Loss weight of columns that no remembered frame shows (demo world only)."""
    pacing: float = 0.5
    """Share of clips whose camera moves back and forth, so that more has to be recalled (demo world only)."""
    long_trips: float = 0.0
    """Share of clips whose camera goes straight out by up to 30 columns and back (demo world only)."""
    clips_per_pass: int = 0
    """Clips that a process computes in one pass; 0 is all its clips of the step."""
    text_dropout: float = 0.05

    def __post_init__(self):
        check_range(self, "recall_weight", above=0)
        check_range(self, "unseen_weight", "clips_per_pass", least=0)
        check_range(self, "pacing", "long_trips", "text_dropout", "context_noise_share", least=0, most=1)


@dataclass(frozen=True)
class LossNoise:
    """The random part of a loss, drawn for the whole batch, so that it does not depend on the number of ranks."""

    sigma_BT: Tensor
    noise: Tensor
    context: Tensor
    """Clean frames with a little noise but timestep 0: a student's own memory is imperfect."""

    @classmethod
    def draw(cls, config: ForcingConfig, batch: Batch, sigma_BK: Tensor, generator: torch.Generator) -> "LossNoise":
        """The noise levels of the chunks, noise for every frame, and a context."""
        latents = batch.latents
        size, _, num_frames = latents.shape[:3]
        sigma_BT = sigma_BK.repeat_interleave(batch.chunk, dim=1)
        noise = torch.randn(latents.shape, generator=generator)
        level = config.context_noise * torch.rand(size, 1, num_frames, 1, 1, generator=generator)
        level = level * (torch.rand(size, 1, 1, 1, 1, generator=generator) < config.context_noise_share)
        return cls(sigma_BT, noise, add_noise(latents, torch.randn(latents.shape, generator=generator), level))


Tensors = TypeVar("Tensors", Batch, LossNoise)


def take(tensors: Tensors, clips: range, device: torch.device) -> Tensors:
    """Some clips of a dataclass of tensors [B, ...], on a device."""
    fields = dataclasses.fields(tensors)
    return type(tensors)(*(getattr(tensors, field.name)[clips].to(device) for field in fields))


def teacher_forced_flow(network: Network, batch: Batch, context: Tensor, noisy: Tensor, sigma_BT: Tensor) -> Tensor:
    """Predicted flow of noisy clips [B, C, T, H, W]; every chunk sees its memory of the clean context."""
    _, channels, _, height, width = context.shape
    num_chunks = batch.slots.shape[1]
    chunk = context.shape[2] // num_chunks
    attend = TeacherForcing(batch.slots, chunk, network.grid((channels, height, width)), network.head_dim)
    sigma_KSn = torch.stack([torch.zeros_like(sigma_BT), sigma_BT], dim=1).unflatten(-1, (num_chunks, chunk))
    text = network.embed_text(batch.text.flatten(0, 1), batch.text.shape[1])
    flow = network.flow(interleave(context, noisy, chunk), sigma_KSn.transpose(1, 2).flatten(1), text, attend)
    return noisy_part(flow, chunk)


def column_weights(config: ForcingConfig, batch: Batch) -> Tensor:
    """Loss weight of each column, [B, T, columns].

    Fast frames show most columns, which are easy to learn. The other columns get larger weights.
    """
    weights = {ShownBy.MEMORY: config.recall_weight, ShownBy.NOTHING: config.unseen_weight}
    return torch.tensor([weights.get(place, 1.0) for place in ShownBy], device=batch.shown_by.device)[batch.shown_by]


def training_loss(network: Network, config: ForcingConfig, batch: Batch, noise: LossNoise) -> Tensor:
    """Weighted sum of squared flow errors; to be divided by the sum of `column_weights`."""
    noisy = add_noise(batch.latents, noise.noise, noise.sigma_BT[:, None, :, None, None])
    flow = teacher_forced_flow(network, batch, noise.context, noisy, noise.sigma_BT)
    error_BTC = by_column(flow - (noise.noise - batch.latents), batch)
    return (error_BTC * column_weights(config, batch)).sum()


def passes(config: ForcingConfig, size: int, parallel: ParallelState) -> Iterator[range]:
    """This replica's clips of `size` clips, in pieces of `clips_per_pass`."""
    clips = parallel.samples(size)
    each = config.clips_per_pass or max(1, len(clips))
    yield from (clips[first : first + each] for first in range(0, len(clips), each))


def add_gradients(
    network: Network,
    config: ForcingConfig,
    batch: Batch,
    noise: LossNoise,
    parallel: ParallelState,
    weight: float = 1.0,
) -> float:
    """Add `weight` times the gradients of this replica's clips; returns the loss of the whole batch, not weighted."""
    weights, total = column_weights(config, batch).sum(), 0.0
    for clips in passes(config, len(batch.latents), parallel):
        part = take(batch, clips, parallel.device)
        loss = training_loss(network, config, part, take(noise, clips, parallel.device))
        # Gradients are averaged over replicas, and each has a part of the batch's mean.
        (weight * loss * parallel.num_replicas / weights).backward()
        total += loss.item()
    return parallel.mean(total * parallel.num_replicas / weights.item())


def by_column(error_BCTHW: Tensor, batch: Batch) -> Tensor:
    """Mean square over the latents of each column, [B, T, columns]."""
    return error_BCTHW.square().mean((1, 3)).unflatten(-1, (batch.shown_by.shape[-1], -1)).mean(-1)


def fast_only(batch: Batch, num_fast: int) -> Batch:
    """The same clips without sink and slow frames."""
    first = torch.arange(batch.slots.shape[1], device=batch.slots.device)[:, None] * batch.chunk
    fast = batch.slots >= (first - num_fast).clamp(min=0)
    # Packed to the front: the position of a frame is its place in `slots`.
    order = fast.int().sort(dim=-1, descending=True, stable=True).indices
    return dataclasses.replace(batch, slots=torch.where(fast, batch.slots, -1).gather(-1, order))


@torch.no_grad()
def recall_error(network: Network, config: MemoryConfig, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
    """Squared errors of x0 from almost pure noise, of each column by `ShownBy`; `all` if that is unknown.

    `blind` is `memory`, or `all`, without sink and slow frames. `memory` below `blind` is the earliest sign that the
    student recalls from memory.
    """
    latents = batch.latents
    sigma_BT = torch.full((latents.shape[0], latents.shape[2]), VALIDATION_SIGMA, device=latents.device)
    noisy = add_noise(latents, noise, VALIDATION_SIGMA)

    def errors(batch: Batch) -> Tensor:
        flow = teacher_forced_flow(network, batch, latents, noisy, sigma_BT)
        return by_column(x0_from_flow(noisy, flow, VALIDATION_SIGMA) - latents, batch)

    columns, blind = errors(batch), errors(fast_only(batch, config.fast - config.chunk))
    if (batch.shown_by == ShownBy.UNKNOWN).all():
        return {"all": columns.flatten(), "blind": blind.flatten()}
    names = {"fast": ShownBy.FAST, "memory": ShownBy.MEMORY, "unseen": ShownBy.NOTHING}
    by_place = {name: columns[batch.shown_by == place] for name, place in names.items()}
    return {**by_place, "blind": blind[batch.shown_by == ShownBy.MEMORY]}


def mean_recall_error(
    network: Network, config: ForcingConfig, memory: MemoryConfig, batch: Batch, parallel: ParallelState
) -> dict[str, float]:
    """Means of `recall_error` over the clips of a batch, all ranks; the noise is the same in every call."""
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    errors: dict[str, list[Tensor]] = {}
    for clips in passes(config, len(batch.latents), parallel):
        part = take(batch, clips, parallel.device)
        for name, values in recall_error(network, memory, part, noise[clips].to(parallel.device)).items():
            errors.setdefault(name, []).append(values)
    means = {}
    for name, values in errors.items():
        total, count = (parallel.mean(sum(part)) for part in zip(*((v.sum().item(), len(v)) for v in values)))
        if count:
            means[name] = total / count
    return means
