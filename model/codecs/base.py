"""What every text encoder and VAE provides, and Wan 2.1's latent normalisation.

Shapes: B batch, C latent channels, t latent frames, T pixel frames, H W pixels, h w latents, L text tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class TextEncoder(Protocol):
    """Prompts -> text embeddings; `name` tells one encoder from another."""

    @property
    def name(self) -> str: ...

    def encode(self, prompt: str) -> Tensor:
        """[1, L, 4096], L <= 512."""
        ...


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


def normalise(raw_BCtHW: Tensor) -> Tensor:
    """VAE space (what ComfyUI's LATENT holds) -> the space the network works in."""
    return (raw_BCtHW - _channels(WAN_MEAN, raw_BCtHW)) / _channels(WAN_STD, raw_BCtHW)


def denormalise(latents_BCtHW: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return latents_BCtHW * _channels(WAN_STD, latents_BCtHW) + _channels(WAN_MEAN, latents_BCtHW)


class VAE(Protocol):
    """Pixels in [-1, 1] to latents in VAE space and back, causal in time, float32 at this border."""

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """[B, 3, 1 + 4k, H, W] -> [B, 16, 1 + k, H/8, W/8]. Raises ValueError for other shapes."""
        ...

    def decode(self, raw_BCthw: Tensor) -> Tensor:
        """[B, 16, t, h, w] -> [B, 3, 4t - 3, 8h, 8w]."""
        ...

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same of consecutive chunks of one film, in pieces; the cuts between chunks change nothing."""
        ...


def check_pixels(pixels_BCTHW: Tensor) -> None:
    """Raises ValueError unless there are 1 + 4k frames and sides that are multiples of 8."""
    _, _, num_frames, height, width = pixels_BCTHW.shape
    if num_frames % 4 != 1 or height % 8 or width % 8:
        raise ValueError(
            f"pixels: {num_frames} frames of {width} x {height}; the codec takes 1 + 4k frames"
            " and sides that are multiples of 8"
        )


@dataclass(frozen=True, kw_only=True)
class PrecomputedText:
    """Embeddings of certain prompts, made by an encoder that is gone since."""

    name: str
    rows: Mapping[str, Tensor]

    def encode(self, prompt: str) -> Tensor:
        return self.rows[prompt]
