"""Stage `vae`: the demo codec's statistics, then its decoder (docs/method.md, Codecs)."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ...memory.files import atomic_path
from ...model.codecs.demo_vae import NUM_CHROMA, NUM_LUMA, DemoCodec
from ...model.config import CARD_KEY
from ...model.sampler import seeded_generator
from ...model.units import FRAMES_PER_LATENT
from ..config import LoopConfig, OptimConfig, check_range
from ..parallel import ParallelState
from ..stage import Stage
from ..trained_network import TrainedNetwork
from ..world.camera import view
from ..world.geometry import RING_COLUMNS, TOKEN
from ..world.scene import Scene, panorama
from ..world.scripts import random_style

STATISTICS_CLIPS = 400
STYLE_CHANGES = 0.1
"""Share of samples in which weather, ground or time changes with the latent frame."""
AC_SCALE = 2.0
"""Divisor of the alternating coefficients, which are less visible than the means."""


@dataclass(frozen=True, kw_only=True)
class VaeConfig(LoopConfig):
    """Stage `vae`: the demo codec's statistics and its decoder."""

    width: int = 96
    num_blocks: int = 3
    latent_noise: float = 0.05
    """Standard deviation of the noise on the latents. It makes the decoder robust to small errors of a student."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, betas=(0.9, 0.999)))
    out: str = "runs/vae"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "width", "num_blocks", above=0)
        if self.sequence > 1:
            raise ValueError(f"sequence: {self.sequence}; this stage trains in one process, give 1")


def random_steps(size: int, *seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs of successive latent frames of the demo world, in art pixels in [-1, 1].

    The last pixel frame of both, [B, 2, H, W, 3], and all four pixel frames of the second, [B, 4, H, W, 3].
    """
    rng, clips = np.random.default_rng(seed), []
    for _ in range(size):
        scene, style = Scene.sample(rng), random_style(rng)
        after = panorama(scene, style)
        before = panorama(scene, random_style(rng)) if rng.random() < STYLE_CHANGES else after
        offset, move = int(rng.integers(RING_COLUMNS)) * TOKEN, int(rng.integers(-1, 2))
        step = move * TOKEN // FRAMES_PER_LATENT
        clips.append([view(before, offset)] + [view(after, offset + step * (k + 1)) for k in range(FRAMES_PER_LATENT)])
    clip = torch.from_numpy(np.array(clips)).float() / 127.5 - 1
    return clip[:, [0, -1]], clip[:, 1:]


def fit_statistics(codec: DemoCodec, seed: int) -> None:
    """Set mean and scale of every coefficient from random scenes."""
    _, frames = random_steps(STATISTICS_CLIPS, seed, 0)
    coefficients = codec.encode_art(frames[:, -1:]).flatten(2).transpose(1, 2).flatten(0, 1)
    scale = coefficients.std(0) * AC_SCALE
    scale[[0, NUM_LUMA, NUM_LUMA + NUM_CHROMA]] /= AC_SCALE
    codec.get_buffer("mean").copy_(coefficients.mean(0))
    codec.get_buffer("scale").copy_(scale)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between frames in [-1, 1]."""
    return (10 * torch.log10(4 / F.mse_loss(a, b))).item()


class VaeStage(Stage):
    """Trains the decoder in one process; the encoder is fixed."""

    def __init__(self, config: VaeConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        if parallel.world_size > 1:
            raise ValueError(f"vae: {parallel.world_size} processes are not supported; start it without torchrun")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.codec = DemoCodec(config.width, config.num_blocks)
        fit_statistics(self.codec, config.data_seed)
        self.codec.to(parallel.device)
        self.trained = {"codec": TrainedNetwork(self.codec, config.optim, parallel)}

    def step(self, step: int) -> dict[str, float]:
        """One update on random steps."""
        config, device = self.config, self.parallel.device
        pair, frames = (pixels.to(device) for pixels in random_steps(config.batch, config.data_seed, 1, step))
        latents = self.codec.encode_art(pair)
        noise = torch.randn(latents.shape, generator=seeded_generator(config.seed, step)).to(device)
        decoded = self._decode(latents + config.latent_noise * noise)
        loss = F.l1_loss(decoded, frames)
        loss.backward()
        metrics = {"loss": loss.item(), "psnr": psnr(decoded.detach(), frames)}
        return {**metrics, **self.trained["codec"].update(loss.item(), self.lr_factor(step))}

    def _decode(self, latents_BCthw: Tensor) -> Tensor:
        return self.codec.draw_frames(latents_BCthw[:, :, 0], latents_BCthw[:, :, 1])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in decibels on frames that are not trained on."""
        pair, frames = random_steps(64, self.config.data_seed, 2)
        decoded = self._decode(self.codec.encode_art(pair.to(self.parallel.device)))
        return {"psnr": round(psnr(decoded.cpu(), frames), 2)}

    def export(self, folder: Path, step: int, seconds: float, revision: str) -> Path:
        """The codec with its card."""
        path = folder / "demo_codec.safetensors"
        card = {
            "kind": "demo codec", "revision": revision, "config": dataclasses.asdict(self.config), "train_steps": step,
            "train_seconds": round(seconds), **self.validate(),
        }  # fmt: skip
        weights = {name: value.contiguous() for name, value in self.trained["codec"].weights().items()}
        with atomic_path(path) as part:
            save_file(weights, part, {CARD_KEY: json.dumps(card)})
        return path
