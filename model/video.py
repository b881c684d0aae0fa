"""Pixel frames to an mp4 and from a video or picture, as streams: memory does not grow with length."""

import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
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


class VideoError(ValueError):
    """A video that cannot be used; says why."""


def check_video(path: str | Path, start: float = 0.0, end: float | None = None) -> None:
    """Raises VideoError unless a video, or the part between two times in seconds, decodes to its end without an error."""
    if not Path(path).is_file():
        raise VideoError("there is no such file")
    command = _ffmpeg(path, start, end, "-f", "null", "-", stop_at_errors=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise VideoError(f"does not decode: {_first_line(done.stderr)}")


def read_runs(
    path: str | Path,
    num_frames: int,
    size: tuple[int, int],
    fps: float,
    *,
    start: float = 0.0,
    end: float | None = None,
    skip: int = 0,
) -> Iterator[np.ndarray]:
    """Consecutive runs of a video as uint8 [num_frames, H, W, 3]; the last may be shorter. `skip`: runs to leave out.

    Resampled to `fps`; resized to cover `size` (width, height), in square pixels, and cropped to its centre. A picture
    is a video of one frame. Raises VideoError for what does not decode.
    """
    width, height = size
    zoom = f"max({width}/(iw*sar),{height}/ih)"
    filters = (
        f"fps={fps},scale=w='max({width},round(iw*sar*{zoom}))':h='max({height},round(ih*{zoom}))'"
        f":flags=bicubic+accurate_rnd+full_chroma_int,crop={width}:{height}"
    )
    command = _ffmpeg(path, start, end, "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    run_bytes = num_frames * height * width * 3
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, bufsize=2**20
    ) as process:  # fmt: skip
        try:
            for run in itertools.count():
                data = process.stdout.read(run_bytes)
                if len(data) < run_bytes and process.wait():
                    stderr.seek(0)
                    raise VideoError(f"does not decode: {_first_line(stderr.read().decode(errors='replace'))}")
                if not data:
                    return
                if run >= skip:
                    yield np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
        finally:
            process.kill()


def to_pixels(frames_THWC: np.ndarray) -> Tensor:
    """uint8 frames [T, H, W, 3] -> pixels in [-1, 1], [1, 3, T, H, W]; the inverse of `to_uint8`."""
    return torch.from_numpy(frames_THWC.copy()).movedim(-1, 0)[None].float() / 127.5 - 1


def _ffmpeg(path: str | Path, start: float, end: float | None, *options: str, stop_at_errors: bool = False) -> list:
    import imageio_ffmpeg

    part = ["-ss", f"{start:.6f}"] if start else []
    part += ["-t", f"{end - start:.6f}"] if end is not None else []
    strict = ["-xerror"] if stop_at_errors else []
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", *strict, *part,
            "-i", f"file:{path}", "-map", "0:v:0", *options]  # fmt: skip


def _first_line(stderr: str) -> str:
    """What ffmpeg says first, without the address it puts before."""
    lines = [re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip() for line in stderr.splitlines()]
    return next(filter(None, lines), "ffmpeg gave no reason")
