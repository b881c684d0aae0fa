"""Pixels written to an mp4 as a stream: memory use does not grow with length."""

import contextlib
import itertools
import logging
import math
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from ..memory.files import HeldError, beside, lock, lock_name, settle
from ..memory.memory import all_finite
from .background import AtStop, in_background
from .frames import to_uint8
from .reading import VideoError, check_whole, ffmpeg_program, first_line

log = logging.getLogger("context_forcing")

Decoding = Callable[[Iterable[Tensor]], contextlib.AbstractContextManager[Iterable[Tensor]]]
"""Consecutive chunks -> their pixels as a stream, which is read within the block."""

MIN_SIDE = 360
"""Small videos are enlarged until the shorter side has at least this many pixels."""

MAX_SCALE = 64
"""Largest enlargement: a video has a size that players open."""

FAST = "-preset", "superfast", "-x264-params", "mbtree=1:rc-lookahead=10"
"""x264's options for enlarged frames. Without the lookahead of mbtree files are half as large again."""

SPECIAL = re.compile(r"[=;#\\\n]")
"""Characters that ffmpeg's metadata files need a backslash before."""


def check_scale(name: str, scale: int) -> None:
    """Raises ValueError for an enlargement that is out of range, named as the user wrote it."""
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"{name}: {scale} is not from 1 to {MAX_SCALE}")


def default_scale(width: int, height: int) -> int:
    """The least whole number that enlarges the shorter side to 360 pixels or more."""
    return max(1, math.ceil(MIN_SIDE / min(width, height)))


def part_name(path: Path) -> Path:
    """The name of a video until it is whole. ffmpeg needs the suffix."""
    return beside(path.with_suffix(""), f".part{path.suffix}")


@contextlib.contextmanager
def hold_output(path: str | Path) -> Iterator[Path]:
    """Reserve the path of an mp4 for this process by a lock file beside it.

    Raises ValueError if an mp4 cannot be written there or another process writes it; then nothing is changed.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"output: {path} does not end in .mp4; give a name that does")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder; give a file name")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(lock_name(path)))
            # Left by a killed process whose ffmpeg may still write: this process writes a new file.
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
    metadata: Mapping[str, str] | None = None,
    decoding: Decoding | None = None,
) -> int:
    """Encode consecutive pixels [1, 3, T, H, W] in [-1, 1] to H.264. Returns the number of frames.

    `scale` enlarges by nearest neighbour. Enlarged frames are encoded FAST, in a quarter of the time, others by x264's
    preset `medium`. `on_frames` is called with every run of uint8 frames [T, H, W, 3] before it is encoded.
    `metadata` are tags of the container, of any length. With `decoding`, `pixels` are chunks of latents: they are
    decoded and encoded on a second thread while this thread makes more, and few of them wait (`in_background`).
    The file has a temporary name until ffmpeg has ended without an error, every frame decodes, and all of it is on the
    disk. Raises ValueError if that fails; then no file is left.
    """
    check_scale("scale", scale)
    path = Path(path)
    part = part_name(path)

    def encode(pixels: Iterable[Tensor], at_stop: AtStop = lambda end: None) -> int:
        return _encode(path, _frames(path, pixels, scale, on_frames), fps, crf, scale > 1, metadata or {}, at_stop)

    def decode(chunks: Iterable[Tensor], at_stop: AtStop) -> int:
        assert decoding is not None
        with decoding(chunks) as pixels:
            return encode(pixels, at_stop)

    try:
        count = encode(pixels) if decoding is None else in_background(pixels, decode)
        try:
            check_whole(part, count, fps)
            settle(part, path)
        except VideoError as error:
            raise _not_whole(path, str(error)) from None
        except OSError as error:
            raise _not_whole(path, error.strerror) from None
    finally:
        with contextlib.suppress(OSError):  # a folder that has become read-only; the next process deletes it
            part.unlink(missing_ok=True)
    return count


def _encode(
    path: Path, frames: Iterator[np.ndarray], fps: float, crf: int, fast: bool, metadata: Mapping[str, str],
    at_stop: AtStop,
) -> int:  # fmt: skip
    """Write the part of a video. Returns the number of frames. Raises ValueError unless ffmpeg takes all of them."""
    first, count = next(frames, None), 0
    if first is None:
        raise ValueError("film: there is no frame to write; generate at least one chunk first")
    effort = FAST if fast else ("-preset", "medium")
    with (
        tempfile.TemporaryFile() as stderr,
        _tags_file(metadata) as tags,
        _Encoder(path, first.shape[1::-1], fps, crf, effort, stderr, tags) as encoder,
    ):
        at_stop(encoder.kill)
        for count, frame in enumerate(itertools.chain([first], frames), 1):
            encoder.write(frame)
        encoder.finish()
    return count


def join_videos(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write videos of one size and speed one after the other, without encoding them again. Raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        quoted = (str(Path(path).absolute()).replace("'", "'\\''") for path in paths)
        names.write_text("".join(f"file '{path}'\n" for path in quoted), encoding="utf-8")
        command = [ffmpeg_program(), "-nostdin", "-y", "-v", "error", "-f", "concat", "-safe", "0"]
        command += ["-i", f"file:{names}", "-c", "copy", "-movflags", "+faststart", f"file:{output}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _not_whole(Path(output), f"ffmpeg: {first_line(done.stderr)}")


def _frames(
    path: Path, pixels: Iterable[Tensor], scale: int, on_frames: Callable[[np.ndarray], None]
) -> Iterator[np.ndarray]:
    """Enlarged frames. Raises ValueError for pixels that are not finite: they would be black."""
    count = 0
    for run in pixels:
        if not all_finite([run]):
            where = f"pixel frames {count}-{count + run.shape[2] - 1}"
            remedy = "check the VAE's file, in ComfyUI start it with --fp32-vae"
            raise ValueError(f"output: {path}: NaN or infinity in {where} from the VAE; {remedy}")
        frames = to_uint8(run)
        count += len(frames)
        on_frames(frames)
        for frame in frames:
            # Columns first: the rows are then copied whole.
            yield frame.repeat(scale, axis=1).repeat(scale, axis=0)


@contextlib.contextmanager
def _tags_file(metadata: Mapping[str, str]) -> Iterator[Path | None]:
    """A temporary file with tags as ffmpeg reads them, or None if there are none. A command line would be too short."""
    if not metadata:
        yield None
        return
    escaped = ((SPECIAL.sub(r"\\\g<0>", text) for text in tag) for tag in metadata.items())
    with tempfile.TemporaryDirectory() as folder:
        tags = Path(folder) / "tags.txt"
        try:
            tags.write_bytes("\n".join([";FFMETADATA1", *map("=".join, escaped), ""]).encode())
        except OSError as error:
            raise ValueError(f"metadata: {tags} cannot be written ({error.strerror}); make room there") from None
        yield tags


class _Encoder:
    """An ffmpeg process that writes the part of a video. It is killed if the block is left before `finish`.

    `stderr` is a file, not a pipe: nobody reads it while frames are written. `tags` is a file of ffmpeg's metadata.
    """

    def __init__(
        self, path: Path, size: tuple[int, ...], fps: float, crf: int, effort: Sequence[str], stderr: IO[bytes],
        tags: Path | None,
    ):  # fmt: skip
        self._path, self._stderr = path, stderr
        width, height = size
        tagging, movflags = [], "+faststart"
        if tags:
            tagging = ["-f", "ffmetadata", "-i", f"file:{tags}", "-map", "0:v", "-map_metadata", "1"]
            movflags += "+use_metadata_tags"  # else an mp4 keeps only the tags that ffmpeg knows
        command = [
            ffmpeg_program(), "-y", "-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}",
            "-pix_fmt", "rgb24", "-r", str(Fraction(fps).limit_denominator()), "-i", "-", *tagging, "-an", "-vcodec",
            "libx264", *effort, "-pix_fmt", "yuv420p", "-v", "error", "-crf", str(crf), "-movflags", movflags,
            f"file:{part_name(path)}",
        ]  # fmt: skip
        # Ctrl-C must not reach ffmpeg: this process ends it.
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True, creationflags=flags,
            )  # fmt: skip
        except OSError as error:
            raise _not_whole(path, f"{command[0]}: {error.strerror}") from None
        assert self._process.stdin is not None
        self._stdin = self._process.stdin

    def __enter__(self) -> "_Encoder":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Raises ValueError if ffmpeg has ended."""
        try:
            self._stdin.write(frame)
        except OSError:
            raise self._failed() from None

    def finish(self) -> None:
        """Raises ValueError unless ffmpeg takes every frame and ends without an error."""
        try:
            self._stdin.close()
        except OSError:
            raise self._failed() from None
        if self._process.wait():
            raise self._failed()
        if message := self._message():
            log.warning("%s: ffmpeg: %s", self._path, message)

    def kill(self) -> None:
        """End ffmpeg at once. A thread that waits for it in `write` or `finish` gets an error."""
        self._process.kill()

    def __exit__(self, *_) -> None:
        self.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _failed(self) -> ValueError:
        status, message = self._process.wait(), self._message()
        end = f"exit status {status}" if status >= 0 else f"ended by signal {-status}, {signal.strsignal(-status)}"
        return _not_whole(self._path, f"ffmpeg: {message} ({end})" if message else f"ffmpeg: {end}")

    def _message(self) -> str:
        self._stderr.seek(0)
        return first_line(self._stderr.read().decode(errors="replace"))


def _not_whole(path: Path, reason: str | None) -> ValueError:
    return ValueError(f"output: {path} is not whole: {reason}; check that disk and memory have room, then run it again")
