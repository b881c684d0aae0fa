"""Stage `pretrain`: a causal student by teacher-forced flow matching over the Slow-Fast layout (demo_world.md 3)."""

import dataclasses
import functools
import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from ..model.causal import causal_forward, embed_text
from ..model.checkpoint import check_tensors, load_demo_codec, load_student, save_student
from ..model.config import PRESETS, VAE_STRIDE, StudentCard
from ..model.flow import TIMESTEPS, add_noise, warp, x0_from_flow
from ..model.wan import WanModel
from .checkpoint import check_fresh, load_checkpoint, save_checkpoint
from .config import PretrainConfig
from .data import FAST, MEMORY, UNSEEN, Batch, make_batch
from .forcing import TeacherForcing, interleave, noisy_part
from .log import RunLog
from .optim import build_optimizers
from .vae import git_revision
from .world import ART_SCALE, VIEW_COLUMNS, VIEW_HEIGHT, VIEW_WIDTH

log = logging.getLogger("context_forcing")

VALIDATION_SIGMA = 0.95
"""Noise level at which hardly anything but the memory can tell what stood there."""


def teacher_forced_flow(
    net: WanModel, batch: Batch, context: Tensor, noisy: Tensor, sigma_BT: Tensor, chunk: int
) -> Tensor:
    """Predicted flow of the noisy clip [B, C, T, H, W], every chunk seeing its own memory of the clean one."""
    num_chunks = batch.slots.shape[1]
    grid = (context.shape[3] // net.patch_size[1], context.shape[4] // net.patch_size[2])
    head_dim = net.blocks[0].self_attn.head_dim
    attend = TeacherForcing(batch.slots, chunk, grid, head_dim)
    frames = interleave(context, noisy, chunk)
    sigma_KSn = torch.stack([torch.zeros_like(sigma_BT), sigma_BT], dim=1).unflatten(-1, (num_chunks, chunk))
    timestep = TIMESTEPS * sigma_KSn.transpose(1, 2).flatten(1)
    text = embed_text(net, batch.text, num_groups=num_chunks)
    return noisy_part(causal_forward(net, frames, timestep, text, attend), chunk)


def noised_context(config: PretrainConfig, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Clean frames with a little noise, labelled clean: a student's own memory is never perfect."""
    batch, _, num_frames = latents.shape[:3]
    sigma = config.context_noise * torch.rand(batch, 1, num_frames, 1, 1, generator=generator)
    sigma = sigma * (torch.rand(batch, 1, 1, 1, 1, generator=generator) < config.context_noise_share)
    return add_noise(latents, torch.randn(latents.shape, generator=generator), sigma)


def training_loss(net: WanModel, config: PretrainConfig, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error of the flow; one noise level a chunk, warped.

    What the last frames show is three columns in four and soon learnt. The columns that have to be looked up in sink
    or slow frames weigh `recall_weight`, those that have to be made up `unseen_weight`.
    """
    chunk = config.memory.chunk
    latents = batch.latents
    u = torch.rand(latents.shape[0], batch.slots.shape[1], generator=generator)
    sigma_BT = warp(u, config.shift).repeat_interleave(chunk, dim=1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = add_noise(latents, noise, sigma_BT[:, None, :, None, None])
    context = noised_context(config, latents, generator)
    flow = teacher_forced_flow(net, batch, context, noisy, sigma_BT, chunk)
    error_BTC = by_column((flow - (noise - latents)).square().mean((1, 3)))
    weight = torch.tensor([1.0, config.recall_weight, config.unseen_weight])[batch.where]
    return (error_BTC * weight).sum() / weight.sum()


def by_column(error_BTW: Tensor) -> Tensor:
    """Mean over the latents of each token column, [B, T, VIEW_COLUMNS]."""
    return error_BTW.unflatten(-1, (VIEW_COLUMNS, -1)).mean(-1)


def recent_only(batch: Batch, num_fast: int, chunk: int) -> Batch:
    """The same clips remembered without sink and slow frames."""
    first = torch.arange(batch.slots.shape[1])[:, None] * chunk
    recent = batch.slots >= (first - num_fast).clamp(min=0)
    # Packed to the front: a frame's place in the memory is its position.
    order = recent.int().sort(dim=-1, descending=True, stable=True).indices
    slots = torch.where(recent, batch.slots, -1).gather(-1, order)
    return dataclasses.replace(batch, slots=slots)


@torch.no_grad()
def recall_error(net: WanModel, config: PretrainConfig, batch: Batch) -> dict[str, float]:
    """x0 error from almost pure noise, by where a column can be known from; `blind` is `memory` without the memory.

    When `memory` falls under `blind` the student has learnt to look things up (demo_world.md 3): the earliest sign
    that it works.
    """
    chunk, latents = config.memory.chunk, batch.latents
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((latents.shape[0], latents.shape[2]), VALIDATION_SIGMA)
    noisy = add_noise(latents, noise, VALIDATION_SIGMA)

    def errors(seen: Batch) -> Tensor:
        flow = teacher_forced_flow(net, seen, latents, noisy, sigma, chunk)
        return by_column((x0_from_flow(noisy, flow, VALIDATION_SIGMA) - latents).square().mean((1, 3)))

    columns, blind = errors(batch), errors(recent_only(batch, config.memory.fast - chunk, chunk))
    places = {"fast": FAST, "memory": MEMORY, "unseen": UNSEEN}
    found = {name: columns[batch.where == place].mean().item() for name, place in places.items()}
    return {**found, "blind": blind[batch.where == MEMORY].mean().item()}


def train_pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train a student from scratch; returns its file."""
    out = Path(config.out)
    path = out / "student.safetensors"
    codec = load_demo_codec(None if config.codec == "assets" else config.codec)
    net = WanModel(PRESETS[config.preset])
    net.reset_parameters(torch.Generator().manual_seed(config.seed))
    begun_from = None
    if config.init:
        first, begun_from = load_student(config.init)
        check_tensors(net, first.state_dict(), config.init)
        net.load_state_dict(first.state_dict())
    optimizers = build_optimizers(net, "muon", config.lr, (0.9, 0.98), 0.01)
    make = functools.partial(make_batch, codec, config.memory, num_chunks=config.num_chunks)
    validation = make(seed=(config.data_seed, 0), size=4 * config.batch)
    start, seconds, revision = 0, 0.0, git_revision()
    if resume:
        state = load_checkpoint(out, dataclasses.asdict(config))
        net.load_state_dict(state["net"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
        if state["revision"] != revision:
            revision = f"{state['revision']}, from step {start} {revision}"
    else:
        check_fresh(out)
    began = time.monotonic() - seconds

    with RunLog(out, "pretrain", config.steps, start) as run:
        for step in range(start, config.steps):
            batch = make(
                seed=(config.data_seed, 1, step),
                size=config.batch,
                text_dropout=config.text_dropout,
                pacing=config.pacing,
            )
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            loss = training_loss(net, config, batch, generator)
            loss.backward()
            if config.openings:
                opening = make(
                    seed=(config.data_seed, 2, step),
                    size=config.openings,
                    num_chunks=1,
                    text_dropout=config.text_dropout,
                )
                training_loss(net, config, opening, generator).backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
            rate = min(1.0, (step + 1) / 50, (config.steps - step) / (config.decay * config.steps))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * rate
                optimizer.step()
                optimizer.zero_grad()
            run.step(step, loss=loss.item(), grad_norm=norm.item())
            if (step + 1) % config.validate_every == 0:
                run.note(step, **recall_error(net, config, validation))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                seconds = time.monotonic() - began
                save_checkpoint(
                    out,
                    {
                        "net": net.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "step": step + 1,
                        "seconds": seconds,
                        "revision": revision,
                        "config": dataclasses.asdict(config),
                    },
                )
                save_student(path, net, student_card(config, step + 1, seconds, revision, begun_from))
    if start >= config.steps:
        save_student(path, net, student_card(config, start, seconds, revision, begun_from))
    return path


def student_card(
    config: PretrainConfig, step: int, seconds: float, revision: str, begun_from: StudentCard | None
) -> StudentCard:
    """What the student was trained with, for its file; what it began from is counted in."""
    if begun_from:
        revision = f"{begun_from.revision}; then {revision}"
        step, seconds = step + begun_from.train_steps, seconds + begun_from.train_seconds
    return StudentCard(
        name=f"{config.preset} student, teacher forced",
        base=config.preset,
        stage="pretrain",
        steps=tuple(TIMESTEPS * (1 - k / config.sample_steps) for k in range(config.sample_steps)),
        shift=config.shift,
        solver="euler",
        memory=config.memory,
        fps=16,
        size=(VIEW_WIDTH * ART_SCALE, VIEW_HEIGHT * ART_SCALE),
        revision=revision,
        data=f"demo world, drawn on the fly; clips of {config.num_chunks * config.memory.chunk} latent frames,"
        f" {VAE_STRIDE[0]} pixel frames each",
        data_seed=config.data_seed,
        train_steps=step,
        train_seconds=round(seconds),
    )
