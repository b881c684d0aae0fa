"""Stage `vae`: the demo codec's statistics, then its decoder (demo_world.md 2)."""

import dataclasses
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..model.codec import NUM_CHROMA, NUM_LUMA, DemoCodec
from .checkpoint import check_fresh, git_revision, load_checkpoint, save_checkpoint
from .config import VaeConfig
from .log import RunLog
from .world import FRAMES_PER_LATENT, RING_COLUMNS, TOKEN, Scene, panorama, random_style, view

log = logging.getLogger("context_forcing")

STATISTICS_CLIPS = 400
STYLE_CHANGES = 0.1
"""Share of samples in which weather, ground or time changes with the latent frame."""
AC_SCALE = 2.0
"""Alternating coefficients at half the scale of the means: they matter less to the eye."""


def draw_steps(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Art pixels in [-1, 1]: the frame before a latent frame [B, H, W, 3], and its four frames [B, 4, H, W, 3]."""
    clips = []
    for _ in range(size):
        scene, style = Scene.sample(rng), random_style(rng)
        after = panorama(scene, style)
        before = panorama(scene, random_style(rng)) if rng.random() < STYLE_CHANGES else after
        offset, move = int(rng.integers(RING_COLUMNS)) * TOKEN, int(rng.integers(-1, 2))
        step = move * TOKEN // FRAMES_PER_LATENT
        clips.append([view(before, offset)] + [view(after, offset + step * (k + 1)) for k in range(FRAMES_PER_LATENT)])
    clip = torch.from_numpy(np.array(clips)).float() / 127.5 - 1
    return clip[:, 0], clip[:, 1:]


def fit_statistics(codec: DemoCodec, seed: int) -> None:
    """Mean and scale of every coefficient over the world."""
    _, frames = draw_steps(np.random.default_rng((seed, 0)), STATISTICS_CLIPS)
    coefficients = codec.encode_art(frames[:, -1:]).flatten(2).transpose(1, 2).flatten(0, 1)
    codec.mean.copy_(coefficients.mean(0))
    scale = coefficients.std(0) * AC_SCALE
    scale[[0, NUM_LUMA, NUM_LUMA + NUM_CHROMA]] /= AC_SCALE
    codec.scale.copy_(scale)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels between frames in [-1, 1]."""
    return (10 * torch.log10(4 / F.mse_loss(a, b))).item()


@torch.no_grad()
def validate(codec: DemoCodec, seed: int) -> float:
    """PSNR in decibels of drawn frames that were not trained on."""
    before, frames = draw_steps(np.random.default_rng((seed, 2)), 64)
    latents = codec.encode_art(torch.stack([before, frames[:, -1]], dim=1))
    return round(psnr(codec.draw_frames(latents[:, :, 0], latents[:, :, 1]), frames), 2)


def train_vae(config: VaeConfig, resume: bool = False) -> Path:
    """Train the decoder; returns the codec file. The encoder is fixed."""
    out = Path(config.out)
    torch.manual_seed(config.data_seed)
    codec = DemoCodec(config.width, config.num_blocks)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=config.lr, weight_decay=0.01)
    start, seconds, revision = 0, 0.0, git_revision()
    if resume:
        state = load_checkpoint(out, dataclasses.asdict(config))
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        if state["revision"] != revision:
            revision = f"{state['revision']}, from step {start} {revision}"
    else:
        check_fresh(out)
        fit_statistics(codec, config.data_seed)
    began = time.monotonic() - seconds
    with RunLog(out, "vae", config.steps, start) as run:
        for step in range(start, config.steps):
            before, frames = draw_steps(np.random.default_rng((config.data_seed, 1, step)), config.batch)
            latents = codec.encode_art(torch.stack([before, frames[:, -1]], dim=1))
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
            latents = latents + config.latent_noise * noise
            drawn = codec.draw_frames(latents[:, :, 0], latents[:, :, 1])
            loss = F.l1_loss(drawn, frames)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (config.steps - step) / (0.4 * config.steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(step, loss=loss.item(), psnr=psnr(drawn.detach(), frames))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                seconds = time.monotonic() - began
                save_checkpoint(
                    out,
                    {
                        "codec": codec.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                        "seconds": seconds,
                        "revision": revision,
                        "config": dataclasses.asdict(config),
                    },
                )
    path = out / "demo_codec.safetensors"
    card = {
        "kind": "demo codec", "revision": revision, "config": dataclasses.asdict(config),
        "train_seconds": round(seconds), "psnr": validate(codec, config.data_seed),
    }  # fmt: skip
    save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, path, {"context_forcing": json.dumps(card)})
    log.info("codec written to %s", path)
    return path
