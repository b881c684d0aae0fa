"""The interface of text encoders and VAEs, and the latent normalisation of Wan 2.1.

Shapes: B batch, C latent channels, t latent frames, T pixel frames, H W pixels, h w latents, L text tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..units import FRAMES_PER_LATENT, PIXELS_PER_LATENT

WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class TextEncoder(Protocol):
    """Prompts -> text embeddings."""

    @property
    def name(self) -> str:
        """A name that differs for encoders with other weights."""
        ...

    def encode(self, prompt: str) -> Tensor:
        """[1, L, 4096], L <= 512."""
        ...


@dataclass(frozen=True, kw_only=True)
class PrecomputedText:
    """A text encoder for prompts that were encoded before."""

    name: str
    rows: Mapping[str, Tensor]

    def encode(self, prompt: str) -> Tensor:
        return self.rows[prompt]


class VAE(nn.Module):
    """Pixels in [-1, 1] to latents in VAE space and back, causal in time. Inputs and outputs are float32."""

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """[B, 3, 1 + 4k, H, W] -> [B, 16, 1 + k, H/8, W/8]. Raises ValueError for other shapes."""
        raise NotImplementedError

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive chunks of one video, in pieces; the result does not depend on the cuts between chunks."""
        raise NotImplementedError

    def decode(self, raw_BCthw: Tensor) -> Tensor:
        """[B, 16, t, h, w] -> [B, 3, 4t - 3, 8h, 8w]."""
        return torch.cat(list(self.decode_stream([raw_BCthw])), dim=2)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


def normalise(raw_BCthw: Tensor) -> Tensor:
    """VAE space, as in ComfyUI's LATENT -> the space of the network."""
    return (raw_BCthw - _channels(WAN_MEAN, raw_BCthw)) / _channels(WAN_STD, raw_BCthw)


def denormalise(latents_BCthw: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return latents_BCthw * _channels(WAN_STD, latents_BCthw) + _channels(WAN_MEAN, latents_BCthw)


def check_pixels(pixels_BCTHW: Tensor) -> None:
    """Raises ValueError unless there are 1 + 4k frames and sides that are multiples of 8."""
    _, _, num_frames, height, width = pixels_BCTHW.shape
    if num_frames % FRAMES_PER_LATENT != 1 or height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise ValueError(
            f"pixels: {num_frames} frames of {width} x {height}; give 1 + 4k frames with sides that are multiples of 8"
        )
