"""Pixel frames to an mp4 and from a video or picture, as streams: memory does not grow with length."""

import contextlib
import itertools
import logging
import math
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..memory.files import HeldError, lock, settle

log = logging.getLogger("context_forcing")

SHOWN_SIDE = 360
"""Small pictures are enlarged until the shorter side is at least this long."""

OF_ITS_OWN = dict(
    start_new_session=True,
    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0),
)
"""For a process that Ctrl-C must not reach: the one that started it ends it."""


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


@contextlib.contextmanager
def hold_output(path: str | Path) -> Iterator[Path]:
    """Keep the place of an mp4 for this process, from before it is begun until it is whole.

    Raises ValueError, one line, when an mp4 cannot be written there or another process writes it; then nothing is
    changed. A lock file stands beside it meanwhile (disk.lock).
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"output: {path} must end in .mp4")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(path.with_name(f".{path.name}.lock")))
            # Left by a killed run. Its ffmpeg may still write: deleted, the file is not the one that this run makes.
            part_name(path).unlink(missing_ok=True)
        except HeldError as error:
            raise ValueError(
                f"output: {path} is being written by another process ({error}); wait for its end, or give another file"
            ) from None
        except OSError as error:
            raise ValueError(f"output: {path} cannot be written ({error.strerror})") from None
        yield path


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

    `scale` enlarges by nearest neighbour. The file stands under a temporary name until it is whole: ffmpeg ended well,
    every frame decodes, and all of it is on the disk. `on_frames` sees every run of uint8 frames [T, H, W, 3] before it
    is encoded. Raises ValueError, one line, where the file does not become whole; then none is left.
    """
    if scale < 1:
        raise ValueError(f"scale: {scale} must be 1 or more")
    path = Path(path)
    part, frames = part_name(path), _frames(pixels, scale, on_frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("film: there is no frame to write; generate at least one chunk first")
    try:
        with _Encoder(path, first.shape[1::-1], fps, crf) as encoder:
            for count, frame in enumerate(itertools.chain([first], frames), 1):
                encoder.write(frame)
            encoder.finish()
        try:
            check_whole(part, count, fps)
            settle(part, path)
        except VideoError as error:
            raise _not_whole(path, str(error)) from None
        except OSError as error:
            raise _not_whole(path, error.strerror) from None
    finally:
        part.unlink(missing_ok=True)
    return count


def _frames(pixels: Iterable[Tensor], scale: int, on_frames: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    for run in pixels:
        frames = to_uint8(run)
        on_frames(frames)
        for frame in frames:
            yield np.ascontiguousarray(frame.repeat(scale, axis=0).repeat(scale, axis=1))


class _Encoder:
    """ffmpeg, which writes the part of a video; it is killed when the block is left before `finish`."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, crf: int):
        import imageio_ffmpeg

        self._path = path
        width, height = size
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}",
            "-pix_fmt", "rgb24", "-r", str(Fraction(fps).limit_denominator()), "-i", "-", "-an", "-vcodec", "libx264",
            "-pix_fmt", "yuv420p", "-v", "error", "-crf", str(crf), "-movflags", "+faststart",
            f"file:{part_name(path)}",
        ]  # fmt: skip
        # A file, not a pipe: nobody reads while frames are written.
        self._said = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._said, **OF_ITS_OWN
            )
        except OSError as error:
            raise _not_whole(path, f"{command[0]}: {error.strerror}") from None

    def __enter__(self) -> "_Encoder":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Raises ValueError where ffmpeg has ended."""
        try:
            self._process.stdin.write(frame)
        except OSError:
            raise self._failed() from None

    def finish(self) -> None:
        """Raises ValueError unless ffmpeg took every frame and ends well."""
        try:
            self._process.stdin.close()
        except OSError:
            raise self._failed() from None
        if self._process.wait():
            raise self._failed()
        if said := self._first_line():
            log.warning("%s: ffmpeg: %s", self._path, said)

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._said.close()

    def _failed(self) -> ValueError:
        status, said = self._process.wait(), self._first_line()
        how = f"exit status {status}" if status >= 0 else f"ended by signal {-status}, {signal.strsignal(-status)}"
        return _not_whole(self._path, f"ffmpeg: {said} ({how})" if said else f"ffmpeg: {how}")

    def _first_line(self) -> str:
        self._said.seek(0)
        return _first_line(self._said.read().decode(errors="replace"), "")


def _not_whole(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"output: {path} did not become whole: {reason}; see that disk and memory have room, then run it again"
    )


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


def check_whole(path: str | Path, num_frames: int, fps: float) -> None:
    """Raises VideoError unless a video decodes to its end, with that many frames and their length, without an error."""
    count, first, last = 0, math.inf, -math.inf
    command = _ffmpeg(path, 0.0, None, "-f", "null", "-", "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-",
                      stop_at_errors=True)  # fmt: skip
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("#tb 0:"):
                unit = Fraction(line.split(":")[1].strip())
            elif not line.startswith("#"):
                # Stream, time of decoding, time of showing, duration, size, checksum.
                shown, duration = (int(field) for field in line.split(",")[2:4])
                count, first, last = count + 1, min(first, shown), max(last, shown + duration)
        if process.wait():
            stderr.seek(0)
            raise VideoError(f"does not decode: {_first_line(stderr.read().decode(errors='replace'))}")
    if count != num_frames:
        raise VideoError(f"has {count} frames, {num_frames} were made")
    if abs((seconds := (last - first) * unit) - num_frames / fps) > 0.5 / fps:
        raise VideoError(f"is {float(seconds):.3f} s long, {num_frames / fps:.3f} s were made")


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


def _first_line(stderr: str, otherwise: str = "ffmpeg gave no reason") -> str:
    """What ffmpeg says first, without the address it puts before."""
    lines = [re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip() for line in stderr.splitlines()]
    return next(filter(None, lines), otherwise)
