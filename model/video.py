"""Pixel frames -> an mp4, as a stream: memory does not grow with length."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

SHOWN_SIDE = 360
"""Small pictures are enlarged until the shorter side is at least this long."""


def default_scale(width: int, height: int) -> int:
    """Whole-number enlargement that brings the shorter side to 360 pixels at least; 1 from 360 pixels up."""
    return max(1, math.ceil(SHOWN_SIDE / min(width, height)))


def to_uint8(pixels_BCTHW: Tensor) -> np.ndarray:
    """One video's pixels in [-1, 1], [1, 3, T, H, W] -> uint8 frames [T, H, W, 3]."""
    frames = pixels_BCTHW[0].movedim(0, -1).float().add(1).mul(127.5).round().clamp(0, 255)
    return frames.byte().cpu().numpy()


def part_name(path: Path) -> Path:
    """Where a video stands while it is not whole."""
    return path.with_name(f".{path.stem}.part{path.suffix}")


def check_writable(path: str | Path) -> Path:
    """Raises ValueError, one line, when an mp4 cannot be written there; leaves nothing behind."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"output: {path} must end in .mp4")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder")
    part = part_name(path)
    try:
        with open(part, "wb"):
            pass
        part.unlink()
    except OSError as error:
        raise ValueError(f"output: {path} cannot be written ({error.strerror})") from None
    return path


def write_video(
    path: str | Path,
    pixels: Iterable[Tensor],
    *,
    fps: float,
    scale: int = 1,
    crf: int = 16,
    on_frames: Callable[[np.ndarray], None] = lambda frames: None,
) -> int:
    """Encode consecutive pixels [1, 3, T, H, W] in [-1, 1] to H.264; returns the number of frames.

    `scale` enlarges by nearest neighbour. The file stands under a temporary name until it is whole. `on_frames`
    sees every run of uint8 frames [T, H, W, 3] before it is encoded.
    """
    import imageio_ffmpeg

    if scale < 1:
        raise ValueError(f"scale: {scale} must be 1 or more")
    path = Path(path)
    part = part_name(path)
    writer, count = None, 0
    try:
        for run in pixels:
            frames = to_uint8(run)
            on_frames(frames)
            for frame in frames:
                frame = frame.repeat(scale, axis=0).repeat(scale, axis=1)
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        str(part), frame.shape[1::-1], fps=fps, codec="libx264", pix_fmt_out="yuv420p",
                        macro_block_size=1, quality=None, output_params=["-crf", str(crf), "-movflags", "+faststart"],
                        ffmpeg_log_level="error",
                    )  # fmt: skip
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
                count += 1
        if writer is None:
            raise ValueError("film: there is no frame to write; generate at least one chunk first")
        writer.close()
        writer = None
        os.replace(part, path)
    finally:
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
    return count
