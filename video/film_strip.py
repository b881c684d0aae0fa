"""Films as still pictures, for logs and reports."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.codecs.base import denormalise
from ..model.codecs.demo_vae import DemoCodec
from .frames import to_uint8


@torch.no_grad()
def film_strip(
    codec: DemoCodec, film: Sequence[Tensor], columns: int = 12, rows: int = 4, scale: int = 3
) -> Image.Image:
    """Latents [1, C, T, H, W] chunk by chunk -> `columns` x `rows` frames, evenly spread, line by line."""
    device = next(codec.parameters()).device
    frames = [to_uint8(run) for run in codec.decode_stream(denormalise(chunk.to(device)) for chunk in film)]
    pixels = np.concatenate(frames)
    picked = np.linspace(0, len(pixels) - 1, columns * rows).round().astype(int)
    shown = pixels[picked].repeat(scale, axis=1).repeat(scale, axis=2)
    lines = [np.concatenate(list(shown[i : i + columns]), axis=1) for i in range(0, len(shown), columns)]
    return Image.fromarray(np.concatenate(lines))
