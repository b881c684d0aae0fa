"""Wan 2.1's VAE, run as a stream (docs/method.md, Codecs). Parameter names are those of Wan2.1_VAE.pth.

Convolutions are causal in time. `Past` holds the last input frames of each layer and is carried from piece to piece. A
piece is one latent frame: one pixel frame for the first, four for each later one. So a video does not depend, to the
bit, on how it is cut into chunks, and memory use does not depend on its length.

Shapes: B batch, C channels, T frames, h w rows and columns at the resolution of the layer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.containers import read_json
from ..checkpoints.locate import read_tensors, subfolder
from ..checkpoints.student import build
from ..units import LATENT_CHANNELS
from .base import VAE, WAN_MEAN, WAN_STD, check_pixels
from .tiny import why_no_tiny_decoder

Past = dict[nn.Module, Tensor | None]
"""The last input frames of each layer."""

MULTIPLES = (1, 2, 4, 4)
"""Widths of the levels, in units of the first."""
NUM_BLOCKS = 2
"""Residual blocks in a level of the encoder; the decoder has one more."""
PREFIX = "model."
"""A prefix of all names in some files."""
HALVES_TIME = (False, True, True)
"""Whether a downsampling step also halves the frame rate."""


class CausalConv3d(nn.Conv3d):
    """A convolution over each frame and the `kernel - 1` frames before it; zeros before the first."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]):
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        num_before = self.kernel_size[0] - 1
        if num_before:
            before = past.get(self)
            if before is None:
                before = x.new_zeros(*x.shape[:2], num_before, *x.shape[3:])
            x = torch.cat([before, x], dim=2)
            past[self] = x[:, :, -num_before:].clone()
        return super().forward(x)


class RMSNorm(nn.Module):
    """Unit root mean square over channels; `spatial` axes follow them."""

    def __init__(self, dim: int, spatial: int = 3):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    """Two causal convolutions and a skip connection."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x, past)
        return skip + run(self.residual, x, past)


class AttentionBlock(nn.Module):
    """Attention of a single head within each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, spatial=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def _frames(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b (s C) h w -> s b 1 (h w) C", s=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "b 1 (h w) C -> b C h w", h=x.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + each_frame(self._frames, x)


class Downsample(nn.Module):
    """Halves rows and columns, and with `in_time` frames; the first frame of a video stays one frame."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before, past[self] = past.get(self), x[:, :, -1:].clone()
        return x if before is None else self.time_conv(torch.cat([before, x], dim=2))


class Upsample(nn.Module):
    """Doubles rows and columns, halves channels; with `in_time` doubles all frames but the first of a video."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None:
            if self in past:
                x = rearrange(self.time_conv(x, past), "B (k C) T h w -> B C (T k) h w", k=2)
            past[self] = None  # the convolution of the second frame does not see the first
        return each_frame(self.resample, x)


STREAMED = (CausalConv3d, ResidualBlock, Downsample, Upsample)


def run(layers: Iterable[nn.Module], x: Tensor, past: Past) -> Tensor:
    """Run layers in sequence, streamed ones with their past."""
    for layer in layers:
        x = layer(x, past) if isinstance(layer, STREAMED) else layer(x)
    return x


def each_frame(function, x_BCThw: Tensor) -> Tensor:
    """Apply a function of images [b, C, h, w] to the frames of a video."""
    y = function(rearrange(x_BCThw, "B C T h w -> (B T) C h w"))
    return rearrange(y, "(B T) C h w -> B C T h w", T=x_BCThw.shape[2])


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, (3, 3, 3)))


class Encoder(nn.Module):
    """Pixels of one latent frame -> mean and log variance [B, 2 * 16, 1, h, w]."""

    def __init__(self, dim: int):
        super().__init__()
        widths = [dim * multiple for multiple in (1, *MULTIPLES)]
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        layers = []
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(NUM_BLOCKS)]
            layers += [Downsample(out_dim, in_time) for in_time in HALVES_TIME[level : level + 1]]
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * LATENT_CHANNELS)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, past)


class Decoder(nn.Module):
    """One latent frame -> its pixels, [B, 3, 1 or 4, H, W]."""

    def __init__(self, dim: int):
        super().__init__()
        widths = [dim * multiple for multiple in (*MULTIPLES, MULTIPLES[-1])][::-1]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        layers, steps = [], HALVES_TIME[::-1]
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            in_dim = in_dim // 2 if level else in_dim  # the Upsample before halved it
            layers += [ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(NUM_BLOCKS + 1)]
            layers += [Upsample(out_dim, in_time) for in_time in steps[level : level + 1]]
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(widths[-1], 3)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], x, past)


class WanVAE(VAE):
    """Runs in the dtype of its weights."""

    def __init__(self, dim: int = 96):
        super().__init__()
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(dim)

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """The means of the latents. Raises ValueError unless T = 1 + 4k and H, W are multiples of 8."""
        check_pixels(pixels_BCTHW)
        past: Past = {}
        pixels = pixels_BCTHW.to(self.conv1.weight.dtype)
        pieces = [pixels[:, :, :1], *(pixels[:, :, i : i + 4] for i in range(1, pixels.shape[2], 4))]
        latents = [self.conv1(self.encoder(piece, past), past).chunk(2, dim=1)[0] for piece in pieces]
        return torch.cat(latents, dim=2).float()

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive chunks of one video; yields the pixels of each latent frame."""
        past: Past = {}
        for raw in raw_chunks:
            for latent in raw.to(self.conv2.weight.dtype).split(1, dim=2):
                yield self.decoder(self.conv2(latent, past), past).float().clamp(-1, 1)


def load_wan_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> WanVAE:
    """The VAE from Wan2.1_VAE.pth, wan_2.1_vae.safetensors, or a folder in diffusers' layout. Raises ValueError."""
    path = subfolder(Path(path), "vae")
    state = {key.removeprefix(PREFIX): value for key, value in read_tensors(path).items()}
    if path.is_dir():
        _check_statistics(read_json(path / "config.json"), path)
        state = {from_diffusers(key): value for key, value in state.items()}
    if reason := why_no_wan_vae(state):
        raise ValueError(f"{path}: {reason}; give Wan2.1_VAE.pth, wan_2.1_vae.safetensors or a diffusers folder vae")
    state = {key: value.to(dtype) for key, value in state.items()}
    return build(lambda: WanVAE(len(state["encoder.conv1.weight"])), state, path)


def why_no_wan_vae(state: Mapping[str, Tensor]) -> str:
    """Why tensors are not those of Wan 2.1's VAE in Wan's layout, by names and channels; empty if they may be."""
    shapes = {key.removeprefix(PREFIX): value.shape for key, value in state.items()}
    for key in ("encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight"):
        if key not in shapes:
            if not why_no_tiny_decoder(state):
                return "a tiny decoder, which is for --decoder"
            return f"not a Wan VAE, {key} is missing (its first tensor is {next(iter(state), 'nothing')})"
    channels = shapes["conv2.weight"][0]
    if channels != LATENT_CHANNELS:
        return f"a VAE with {channels} latent channels, for example of Wan 2.2; Wan 2.1 has {LATENT_CHANNELS}"
    return ""


def _check_statistics(config: dict, path: Path) -> None:
    """Raises ValueError for a VAE whose latents have other statistics than Wan 2.1's, for example Wan 2.2's."""
    for name, expected in (("latents_mean", WAN_MEAN), ("latents_std", WAN_STD)):
        values = config.get(name, expected)
        if len(values) != len(expected) or any(abs(x - y) > 1e-3 for x, y in zip(values, expected)):
            raise ValueError(f"{path}: {name} is not that of Wan 2.1's VAE; give Wan 2.1's")


FROM_DIFFUSERS = (
    (r"(\d\.)norm1\.", r"\1residual.0."), (r"(\d\.)conv1\.", r"\1residual.2."),
    (r"(\d\.)norm2\.", r"\1residual.3."), (r"(\d\.)conv2\.", r"\1residual.6."),
    (r"(\d\.)conv_shortcut\.", r"\1shortcut."), (r"conv_in\.", "conv1."), (r"norm_out\.", "head.0."),
    (r"conv_out\.", "head.2."), (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
    (r"mid_block\.resnets\.0\.", "middle.0."), (r"mid_block\.attentions\.0\.", "middle.1."),
    (r"mid_block\.resnets\.1\.", "middle.2."), (r"^encoder\.down_blocks\.", "encoder.downsamples."),
)  # fmt: skip


def from_diffusers(key: str) -> str:
    """The name in Wan's layout of a tensor of diffusers' AutoencoderKLWan; an unknown name is unchanged."""
    for pattern, name in FROM_DIFFUSERS:
        key = re.sub(pattern, name, key)
    if up := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", key):
        place = int(up[1]) * (NUM_BLOCKS + 2) + (int(up[3]) if up[2] == "resnets" else NUM_BLOCKS + 1)
        key = f"decoder.upsamples.{place}.{key[up.end() :]}"
    return key


def decode_wan_stream(vae: Any, raw_chunks: Iterable[Tensor], num_caches: int) -> Iterator[Tensor]:
    """Decode consecutive chunks with ComfyUI's module tree of Wan's VAE; its feature cache is carried between chunks.

    That decoder caches two frames of its last input and no older ones. So after the first latent frame its input must
    be two frames at a time; an odd frame waits for the next chunk, or is the last.
    """
    cache = [None] * num_caches
    frames = (frame for raw in raw_chunks for frame in raw.split(1, dim=2))
    group = list(islice(frames, 1))
    while group:
        pixels = vae.decoder(vae.conv2(torch.cat(group, dim=2)), feat_cache=cache, feat_idx=[0])
        yield torch.cat(pixels, dim=2) if isinstance(pixels, (list, tuple)) else pixels
        group = list(islice(frames, 2))
