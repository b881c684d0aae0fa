"""Pixels of the VAE and uint8 frames; frames as pictures.

Shapes: T pixel frames, M remembered latent frames, H W pixel rows and columns.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..memory.files import atomic_path
from ..memory.memory import Memory
from ..model.codecs.base import denormalise
from ..model.codecs.demo_vae import DemoCodec
from ..model.units import whole_pixel_frames

log = logging.getLogger("context_forcing")

Decode = Callable[[Iterable[Tensor]], Iterator[Tensor]]
"""Consecutive normalised latents [1, C, T, H, W] -> consecutive pixels [1, 3, T, H, W] in [-1, 1]."""


def to_uint8(pixels_BCTHW: Tensor) -> np.ndarray:
    """One video's pixels in [-1, 1], [1, 3, T, H, W] -> uint8 frames [T, H, W, 3]."""
    frames = pixels_BCTHW[0].movedim(0, -1).float().add(1).mul(127.5).round().clamp(0, 255)
    return frames.byte().cpu().numpy()


def to_pixels(frames_THWC: np.ndarray) -> Tensor:
    """uint8 frames [T, H, W, 3] -> pixels in [-1, 1], [1, 3, T, H, W]; the inverse of `to_uint8`."""
    return torch.from_numpy(frames_THWC.copy()).movedim(-1, 0)[None].float() / 127.5 - 1


def num_start_frames(num_frames: int) -> int:
    """How many of so many frames a video can begin with: the largest 1 + 4k. Logs how many are left out."""
    whole = whole_pixel_frames(num_frames)
    if whole < num_frames:
        log.info("start: %d of %d frames left out; 1 + 4k frames are used", num_frames - whole, num_frames)
    return whole


def thumbnails(memory: Memory, decode: Decode) -> np.ndarray:
    """The remembered frames in the order of `memory.slots.all`, uint8 [M, H, W, 3]. Each is decoded alone."""
    pictures = [to_uint8(next(iter(decode([memory.latents_of([frame])])))) for frame in memory.slots.all]
    return np.concatenate(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a .png atomically. Raises ValueError if it cannot be written."""
    try:
        with atomic_path(path) as part:
            picture.save(part, "PNG")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None


@torch.no_grad()
def film_strip(
    codec: DemoCodec, chunks: Sequence[Tensor], columns: int = 12, rows: int = 4, scale: int = 3
) -> Image.Image:
    """Latents [1, C, T, H, W] -> a picture of `columns` x `rows` frames, evenly spaced in time, line by line."""
    device = next(codec.parameters()).device
    runs = codec.decode_stream(denormalise(chunk.to(device)) for chunk in chunks)
    frames = np.concatenate([to_uint8(run) for run in runs])
    indices = np.linspace(0, len(frames) - 1, columns * rows).round().astype(int)
    enlarged = frames[indices].repeat(scale, axis=1).repeat(scale, axis=2)
    lines = [np.concatenate(list(enlarged[i : i + columns]), axis=1) for i in range(0, len(enlarged), columns)]
    return Image.fromarray(np.concatenate(lines))
