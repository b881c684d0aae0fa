"""From pixels to latents and back: what a codec is, Wan's latent normalisation, the demo codec.

The demo codec has the Wan VAE's interface (method.md 1.6, demo_world.md 2): 16 channels, 1/8 in space, 1 + 4k pixel
frames in time, causal. Its encoder is fixed: a 4 x 4 DCT of art pixels (2 x 2 pixels each) of the last frame of
every group of four, 8 luma and 4 + 4 chroma coefficients. Its decoder is learned: from one latent frame and the one
before it, it draws the four pixel frames between.

Shapes: B batch, C latent channels, t latent frames, T pixel frames, H W pixels, h w latents.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

LATENT_CHANNELS = len(WAN_MEAN)

ART_PIXEL = 2
"""The demo world is drawn at half size and doubled."""
BLOCK = 4
NUM_LUMA, NUM_CHROMA = 8, 4


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


def normalise(raw_BCtHW: Tensor) -> Tensor:
    """VAE space (what ComfyUI's LATENT holds) -> the space the network works in."""
    return (raw_BCtHW - _channels(WAN_MEAN, raw_BCtHW)) / _channels(WAN_STD, raw_BCtHW)


def denormalise(latents_BCtHW: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return latents_BCtHW * _channels(WAN_STD, latents_BCtHW) + _channels(WAN_MEAN, latents_BCtHW)


def pixel_frames(latent_frames: int) -> int:
    """Frames of video in a film of latent frames: 1 for the first, 4 for each later one."""
    return 4 * (latent_frames - 1) + 1 if latent_frames else 0


class Codec(Protocol):
    """Pixels in [-1, 1] to latents in VAE space and back, causal in time, float32 at this border."""

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """[B, 3, 1 + 4k, H, W] -> [B, 16, 1 + k, H/8, W/8]. Raises ValueError for other shapes."""

    def decode(self, raw_BCthw: Tensor) -> Tensor:
        """[B, 16, t, h, w] -> [B, 3, 4t - 3, 8h, 8w]."""

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same of consecutive chunks of one film, in pieces; the cuts between chunks change nothing."""


def check_pixels(pixels_BCTHW: Tensor) -> None:
    """Raises ValueError unless there are 1 + 4k frames and sides that are multiples of 8."""
    _, _, num_frames, height, width = pixels_BCTHW.shape
    if num_frames % 4 != 1 or height % 8 or width % 8:
        raise ValueError(
            f"pixels: {num_frames} frames of {width} x {height}; the codec takes 1 + 4k frames"
            " and sides that are multiples of 8"
        )


def dct_transform() -> Tensor:
    """[16, 48] from an art-pixel block (row, column, RGB) in [-1, 1] to its kept YCbCr coefficients."""
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


class DemoCodec(nn.Module):
    """encode [B, 3, T, H, W] in [-1, 1] -> [B, 16, t, h, w] in VAE space; decode is its causal inverse."""

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
        last = pixels_BCTHW[:, :, ::4]
        art = F.avg_pool3d(last, (1, ART_PIXEL, ART_PIXEL))
        return denormalise(self.encode_art(art.movedim(1, -1)))

    def decode(self, raw_BCthw: Tensor) -> Tensor:
        """VAE-space latents -> pixels [B, 3, 4t - 3, H, W]."""
        return torch.cat(list(self.decode_stream([raw_BCthw])), dim=2)

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive chunks of one film; only the last latent frame is carried."""
        before = None
        for raw_BCthw in raw_chunks:
            drawn = []
            # One by one: a convolution over several rounds otherwise, and the film must not depend on its chunks.
            for latent in normalise(raw_BCthw).unbind(2):
                frames = self.draw_frames(latent if before is None else before, latent)
                drawn.append(frames if before is not None else frames[:, 3:])
                before = latent
            frames = torch.cat(drawn, dim=1).movedim(-1, 1)
            yield frames.clamp(-1, 1).repeat_interleave(ART_PIXEL, -1).repeat_interleave(ART_PIXEL, -2)


def decode_wan_stream(vae: nn.Module, raw_chunks: Iterable[Tensor], num_caches: int) -> Iterator[Tensor]:
    """Decode consecutive chunks with a module tree of Wan's VAE, the feature cache carried from chunk to chunk.

    The decoder's cache keeps two frames of the chunk it is given and nothing older, so after the first latent frame
    it must be fed two at a time or more (comfyui.md 5): an odd frame waits for the next chunk, or for the end.
    """
    cache = [None] * num_caches
    waiting, started = None, False

    def feed(raw: Tensor) -> Tensor:
        out = vae.decoder(vae.conv2(raw), feat_cache=cache, feat_idx=[0])
        return torch.cat(out, dim=2) if isinstance(out, (list, tuple)) else out

    for raw in raw_chunks:
        if not started:
            started = True
            yield feed(raw[:, :, :1])
            raw = raw[:, :, 1:]
        waiting = raw if waiting is None else torch.cat([waiting, raw], dim=2)
        whole = waiting.shape[2] - waiting.shape[2] % 2
        for pair in waiting[:, :, :whole].split(2, dim=2) if whole else ():
            yield feed(pair)
        waiting = waiting[:, :, whole:]
    if waiting is not None and waiting.shape[2]:
        yield feed(waiting)
