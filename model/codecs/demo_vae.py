"""The codec of the demo world, with the interface of Wan's VAE (docs/demo_student.md, Codec).

The encoder is fixed: a 4 x 4 DCT of art pixels (2 x 2 pixels each) of the last frame of each group of four, with 8 luma
and 4 + 4 chroma coefficients. The decoder is learned: from one latent frame and the one before it, it draws the four
pixel frames between them.

Shapes: B batch, C latent channels, t latent frames, T pixel frames, H W pixels, h w latents.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.containers import read_safetensors
from ..checkpoints.student import ASSETS, check_tensors
from .base import VAE, check_pixels, denormalise, normalise

DEMO_CODEC = ASSETS / "demo_codec.safetensors"
ART_PIXEL = 2
"""Pixels per side of an art pixel: the demo world is drawn at half size and doubled."""
BLOCK = 4
NUM_LUMA, NUM_CHROMA = 8, 4


def dct_transform() -> Tensor:
    """[16, 48]: an art-pixel block (row, column, RGB) in [-1, 1] -> its YCbCr coefficients that are kept."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    dct = torch.cos(math.pi / BLOCK * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / BLOCK)
    dct[0] /= math.sqrt(2)
    ycbcr = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
    )
    order = sorted(
        ((u, v) for u in range(BLOCK) for v in range(BLOCK)),
        key=lambda uv: (uv[0] + uv[1], uv[0] if (uv[0] + uv[1]) % 2 else uv[1]),
    )
    rows = [
        torch.einsum("r,c,p->rcp", dct[u], dct[v], ycbcr[plane]).flatten()
        for plane, count in enumerate((NUM_LUMA, NUM_CHROMA, NUM_CHROMA))
        for u, v in order[:count]
    ]
    return torch.stack(rows)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions on the latent grid and a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class DemoCodec(VAE):
    """encode [B, 3, T, H, W] in [-1, 1] -> [B, 16, t, h, w] in VAE space; decode is its causal inverse."""

    transform: Tensor
    inverse: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, width: int = 96, num_blocks: int = 3):
        super().__init__()
        transform = dct_transform()
        self.register_buffer("transform", transform.float(), persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(transform).float(), persistent=False)
        self.register_buffer("mean", torch.zeros(len(transform)))
        self.register_buffer("scale", torch.ones(len(transform)))
        block_size = 3 * BLOCK * BLOCK
        self.stem = nn.Conv2d(2 * len(transform), width, 3, padding=1)
        self.body = nn.Sequential(*[ResidualBlock(width) for _ in range(num_blocks)])
        self.draw = nn.Conv2d(width, 4 * block_size, 3, padding=1)

    def encode_art(self, art_BtHWC: Tensor) -> Tensor:
        """Art pixels [B, t, H/2, W/2, 3] in [-1, 1], one frame a latent frame -> latents [B, 16, t, h, w]."""
        blocks = rearrange(art_BtHWC, "B t (h r) (w c) p -> B t h w (r c p)", r=BLOCK, c=BLOCK)
        return ((blocks @ self.transform.T - self.mean) / self.scale).movedim(-1, 1)

    def draw_frames(self, before_BChw: Tensor, latent_BChw: Tensor) -> Tensor:
        """The four art-pixel frames [B, 4, H/2, W/2, 3] that end with a normalised latent frame."""
        both = torch.stack([before_BChw, latent_BChw], dim=1).movedim(2, -1)
        coarse = (both * self.scale + self.mean) @ self.inverse.T
        step = torch.arange(1, 5, device=coarse.device, dtype=coarse.dtype).view(-1, 1, 1, 1) / 4
        coarse = coarse[:, :1] + (coarse[:, 1:] - coarse[:, :1]) * step
        fine = self.draw(F.silu(self.body(self.stem(torch.cat([before_BChw, latent_BChw], dim=1)))))
        frames = coarse + rearrange(fine, "B (k d) h w -> B k h w d", k=4)
        return rearrange(frames, "B k h w (r c p) -> B k (h r) (w c) p", r=BLOCK, c=BLOCK, p=3)

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """Raises ValueError unless T = 1 + 4k and H, W are multiples of 8."""
        check_pixels(pixels_BCTHW)
        art = F.avg_pool3d(pixels_BCTHW[:, :, ::4], (1, ART_PIXEL, ART_PIXEL))
        return denormalise(self.encode_art(art.movedim(1, -1)))

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive chunks of one video; only the last latent frame is carried."""
        before = None
        for raw_BCthw in raw_chunks:
            drawn = []
            # One by one: a convolution over several rounds differently, and a video must not depend on its chunks.
            for latent in normalise(raw_BCthw).unbind(2):
                frames = self.draw_frames(latent if before is None else before, latent)
                drawn.append(frames if before is not None else frames[:, 3:])
                before = latent
            frames = torch.cat(drawn, dim=1).movedim(-1, 1)
            yield frames.clamp(-1, 1).repeat_interleave(ART_PIXEL, -1).repeat_interleave(ART_PIXEL, -2)


def load_demo_codec(path: str | Path | None = None) -> DemoCodec:
    """The demo codec from a file; None is the built-in one."""
    path = Path(path or DEMO_CODEC)
    state, _ = read_safetensors(path)
    if "stem.weight" not in state or "mean" not in state:
        raise ValueError(f"{path}: not a demo codec; give a file that `train vae` wrote")
    width = state["stem.weight"].shape[0]
    num_blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    codec = DemoCodec(width, num_blocks)
    check_tensors(codec, state, path)
    codec.load_state_dict(state, strict=True)
    return codec.eval().requires_grad_(False)
