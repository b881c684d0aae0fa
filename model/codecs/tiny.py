"""Tiny decoders of the TAEHV family for Wan 2.1, run as a stream (docs/method.md, Codecs). Names are those of taew2_1.

A block sees its input of the frame before, which is carried from frame to frame; the decoder doubles the frame rate
twice on the way. Frames are computed one by one, so a video does not depend, to the bit, on how it is cut into chunks.

Shapes: B batch, C channels, t latent frames, T pixel frames, h w rows and columns at the resolution of the layer.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.locate import read_tensors
from ..checkpoints.student import build
from ..units import FRAMES_PER_LATENT, LATENT_CHANNELS
from .base import VAE, normalise

log = logging.getLogger("context_forcing")

NUM_LEVELS, NUM_BLOCKS = 3, 3
FIRST_BLOCK = 3
"""Place of the first block; a clamp, a convolution and a ReLU are before it."""
LEVEL = NUM_BLOCKS + 3
"""Layers of a level: the blocks, an enlargement, the growth in time, a convolution."""
LAST = FIRST_BLOCK + NUM_LEVELS * LEVEL + 1
"""Place of the last convolution."""
RAW, NORMALISED = "lighttae", "taew2_1"
"""Parts of the names of files that decode latents in VAE space, and normalised ones. Their tensors are the same."""


class Clamp(nn.Module):
    """Bends large latents towards 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions of a frame beside the one before it, and a skip."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * dim, dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class Grow(nn.Module):
    """One frame [B, C, h, w] -> `stride` frames [B * stride, C, h, w], those of one video together."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyDecoder(VAE):
    """Decodes by itself; `encoder` encodes, if there is one. Runs in the dtype of its weights."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], takes_normalised: bool):
        super().__init__()
        self.takes_normalised = takes_normalised
        self.encoder: VAE | None = None
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(LATENT_CHANNELS, widths[0], 3, padding=1), nn.ReLU()]
        for (dim, out_dim), stride in zip(pairwise(widths), strides, strict=True):
            layers += [Block(dim) for _ in range(NUM_BLOCKS)]
            layers += [
                nn.Upsample(scale_factor=2),
                Grow(dim, stride),
                nn.Conv2d(dim, out_dim, 3, padding=1, bias=False),
            ]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        if self.encoder is None:
            raise ValueError("--decoder: a tiny decoder does not encode pictures; give the VAE too, with --vae")
        return self.encoder.encode(pixels_BCTHW)

    def decode_stream(self, raw_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive chunks of one video; yields the pixels of each latent frame."""
        dtype = next(self.decoder.parameters()).dtype
        chunks = ((normalise(raw) if self.takes_normalised else raw).to(dtype) for raw in raw_chunks)
        return decode_tiny_stream(self.decoder, chunks, Block, Grow)


def decode_tiny_stream(
    layers: Iterable[nn.Module], chunks: Iterable[Tensor], block: type[nn.Module], grow: type[nn.Module]
) -> Iterator[Tensor]:
    """Decode consecutive chunks [B, 16, t, h, w] with the layers of a decoder; yields [B, 3, 1 or 4, H, W] in [-1, 1].

    `block` and `grow` are the classes of the layers that see the frame before, and that make several frames of one.
    The first latent frame makes four frames as every other; the first three of them are not in the video.
    """
    layers, before = list(layers), {}

    def drawn(place: int, x: Tensor) -> Iterator[Tensor]:
        for place, layer in enumerate(layers[place:], place):
            if isinstance(layer, block):
                past, before[place] = before.get(place), x
                x = layer(x, torch.zeros_like(x) if past is None else past)
            elif isinstance(layer, grow):
                for frame in layer(x).unflatten(0, (len(x), -1)).unbind(1):
                    yield from drawn(place + 1, frame)
                return
            else:
                x = layer(x)
        yield x

    num_left_out = FRAMES_PER_LATENT - 1
    for chunk in chunks:
        for latent in chunk.unbind(2):
            frames = list(drawn(0, latent))[num_left_out:]
            num_left_out = 0
            yield (torch.stack(frames, dim=2).float() * 2 - 1).clamp(-1, 1)


def load_tiny_decoder(path: str | Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """The decoder of taew2_1 or lighttaew2_1, .pth or .safetensors. Raises ValueError for other files and names.

    The name says which latents it takes, because nothing in the file does.
    """
    path = Path(path)
    state = read_tensors(path)
    if reason := why_no_tiny_decoder(state):
        raise ValueError(f"{path}: {reason}; give taew2_1 or lighttaew2_1")
    name = path.name.lower()
    if RAW not in name and NORMALISED not in name:
        raise ValueError(
            f"{path}: its name does not say which latents it takes; name it as it was published, taew2_1 (normalised"
            " latents) or lighttaew2_1 (those of the VAE)"
        )
    log.info("decoder: %s takes %s latents", path, "VAE-space" if RAW in name else "normalised")
    state = {key: value.to(dtype) for key, value in state.items() if key.startswith("decoder.")}
    return build(lambda: TinyDecoder(*_sizes(state), takes_normalised=RAW not in name), state, path)


def why_no_tiny_decoder(state: Mapping[str, Tensor]) -> str:
    """Why tensors are not those of a tiny decoder for Wan 2.1, by names and channels; empty if they may be."""
    places = [place for level in range(NUM_LEVELS) for place in (_grow(level), _grow(level) + 1)]
    grows = [f"decoder.{place}.conv.weight" for place in places[::2]]
    for key in ("decoder.1.weight", *grows, *(f"decoder.{place}.weight" for place in (*places[1::2], LAST))):
        if key not in state or state[key].ndim != 4:
            return (
                f"not a tiny decoder, {key} is missing or no convolution (its first tensor is {next(iter(state), '')})"
            )
    channels, colours = state["decoder.1.weight"].shape[1], len(state[f"decoder.{LAST}.weight"])
    if channels != LATENT_CHANNELS or colours != 3:
        return f"a tiny decoder of {channels} latent channels, for example of Wan 2.2; Wan 2.1 has {LATENT_CHANNELS}"
    _, strides = _sizes(state)
    if math.prod(strides) != FRAMES_PER_LATENT:
        return f"a tiny decoder of {math.prod(strides)} frames per latent frame; Wan 2.1 has {FRAMES_PER_LATENT}"
    return ""


def _sizes(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Widths of the levels and of the last convolution, and how many frames each level makes of one."""
    widths = [state[f"decoder.{_grow(level) + 1}.weight"].shape[1] for level in range(NUM_LEVELS)]
    strides = [len(state[f"decoder.{_grow(level)}.conv.weight"]) // max(1, width) for level, width in enumerate(widths)]
    return [*widths, len(state[f"decoder.{_grow(NUM_LEVELS - 1) + 1}.weight"])], strides


def _grow(level: int) -> int:
    """The place of a level's growth in time."""
    return FIRST_BLOCK + level * LEVEL + NUM_BLOCKS + 1
