"""Videos and pictures read by ffmpeg as streams: memory use does not grow with length."""

import itertools
import math
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..memory.fields import brief

MAX_INPUT_PIXELS = 2**26
"""Pixels of a frame that is read, 8192 x 8192: a small file can claim any number."""
CONTAINERS = (
    *"mov matroska avi mpegts mpeg flv asf ogg mjpeg gif apng webp_anim".split(),
    *(f"{picture}_pipe" for picture in "bmp dpx exr gif j2k jpeg jpegxl pbm pgm png ppm tiff webp".split()),
)
"""ffmpeg's names of what is read. Not among them: playlists, lists and series of pictures, which name other files."""
INPUT_LIMITS = (
    "-protocol_whitelist",
    "file",
    "-format_whitelist",
    ",".join(CONTAINERS),
    "-max_pixels",
    str(MAX_INPUT_PIXELS),
)
"""Options of ffmpeg for every file that is read."""
OTHER_CONTAINER = "not a video or picture that is read; lists of files are not, nor names with %d in them"
MAX_TAGS = 2**24
"""Bytes of a video's tags. The graph of a ComfyUI video is among them."""
ENDED_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", 9))
"""Signals that say nothing about a video: the system ends processes when memory is at its end."""
TAG_LINE = re.compile(r"((?:\\.|[^\\=\n])+)=((?:\\.|[^\\\n])*)\n", re.DOTALL)
"""A tag as ffmpeg writes it: a backslash stands before a line's end that belongs to the text."""


class VideoError(ValueError):
    """A video cannot be used. The message is the reason, without the name of the file."""


def ffmpeg_program() -> str:
    """The path of ffmpeg. Raises ValueError, one line, if this machine has none."""
    remedy = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to the path of an ffmpeg"
    try:
        import imageio_ffmpeg

        path = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"ffmpeg: there is none ({brief(error)}); {remedy}") from None
    if shutil.which(path) is None:
        raise ValueError(f"ffmpeg: {path} is not a program; {remedy}")
    return path


def ffmpeg_version() -> str:
    """Raises ValueError, one line, for an ffmpeg that does not tell it."""
    path = ffmpeg_program()
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_version()
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"ffmpeg: {path} does not run ({brief(error)}); set IMAGEIO_FFMPEG_EXE to another") from None


def check_video(path: str | Path, start: float = 0.0, end: float | None = None) -> None:
    """Decode a video, or its part between two times in seconds, to the end. Raises VideoError for any error."""
    if not Path(path).is_file():
        raise VideoError("there is no such file")
    for _ in _ffmpeg(path, "-f", "null", "-", start=start, end=end, stop_at_errors=True):
        pass


def check_whole(path: str | Path, num_frames: int, fps: float) -> None:
    """Decode a video to the end. Raises VideoError for any error, another number of frames or another duration."""
    count, first, last = 0, math.inf, -math.inf
    options = ("-f", "null", "-", "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-")
    for line in _ffmpeg(path, *options, stop_at_errors=True):
        if line.startswith(b"#tb 0:"):
            unit = Fraction(line.decode().split(":")[1].strip())
        elif not line.startswith(b"#"):
            # Stream, decoding time, presentation time, duration, size, checksum.
            time, duration = (int(field) for field in line.split(b",")[2:4])
            count, first, last = count + 1, min(first, time), max(last, time + duration)
    if count != num_frames:
        raise VideoError(f"has {count} frames, {num_frames} were written")
    if abs((seconds := (last - first) * unit) - num_frames / fps) > 0.5 / fps:
        raise VideoError(f"is {float(seconds):.3f} s long, {num_frames / fps:.3f} s were written")


def read_tags(path: str | Path) -> dict[str, str]:
    """The tags of an mp4's container. Raises VideoError for a file that is no mp4 and for more than 16 MiB of tags."""
    if not Path(path).is_file():
        raise VideoError("there is no such file")
    # The demuxer is named: ffmpeg would follow the paths in a playlist, whatever its name.
    runs = _ffmpeg(path, "-c", "copy", "-f", "ffmetadata", "-", demuxer="mov", run_bytes=MAX_TAGS)
    data = next(runs, b"")
    runs.close()
    if len(data) == MAX_TAGS:
        raise VideoError(f"has {MAX_TAGS // 2**20} MiB of tags or more")
    text, tags = data.decode(errors="replace"), {}
    plain = lambda words: re.sub(r"\\(.)", r"\1", words, flags=re.DOTALL)
    position = text.find("\n") + 1  # The first line says that these are tags.
    while (match := TAG_LINE.match(text, position)) and text[position] != "[":  # [STREAM] begins another list.
        tags[plain(match[1])] = plain(match[2])
        position = match.end()
    return tags


def read_frames(path: str | Path) -> tuple[float, Iterator[np.ndarray]]:
    """Frames per second of a video, and every frame as a stream, uint8 [H, W, 3]. Raises VideoError for other files."""
    if not Path(path).is_file():
        raise VideoError("there is no such file")
    ffmpeg_program()
    import imageio_ffmpeg

    stream = imageio_ffmpeg.read_frames(f"file:{path}", pix_fmt="rgb24", input_params=list(INPUT_LIMITS))
    try:
        info = next(stream)
    except (OSError, RuntimeError):
        raise VideoError("ffmpeg finds no video in it") from None
    width, height = info["size"]
    return float(info["fps"]), (np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in stream)


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
    """Consecutive runs of a video as uint8 [num_frames, H, W, 3], without the first `skip`; the last may be shorter.

    Frames are resampled to `fps`, resized to cover `size` (width, height) in square pixels, and cropped to the centre.
    A video of less than half a frame's time, such as a picture at a low `fps`, is its first frame. Raises VideoError
    for a file that does not decode.
    """
    width, height = size
    zoom = f"max({width}/(iw*sar),{height}/ih)"
    fit = (
        f"scale=w='max({width},round(iw*sar*{zoom}))':h='max({height},round(ih*{zoom}))'"
        f":flags=bicubic+accurate_rnd+full_chroma_int,crop={width}:{height}"
    )
    raw, run_bytes = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-"), num_frames * height * width * 3
    resampled = _ffmpeg(path, "-vf", f"fps={fps},{fit}", *raw, start=start, end=end, run_bytes=run_bytes)
    if (first := next(resampled, None)) is None:
        # The filter fps rounds the duration of the video to no frame.
        resampled = _ffmpeg(path, "-vf", fit, "-frames:v", "1", *raw, start=start, end=end, run_bytes=run_bytes)
        first = next(resampled, None)
    for data in itertools.islice(itertools.chain([first] if first else [], resampled), skip, None):
        yield np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def first_line(stderr: str) -> str:
    """The first message of ffmpeg, without the address before it; empty if there is none."""
    lines = (re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip() for line in stderr.splitlines())
    return next(filter(None, lines), "")


def _ffmpeg(
    path: str | Path,
    *options: str,
    start: float = 0.0,
    end: float | None = None,
    run_bytes: int = 0,
    stop_at_errors: bool = False,
    demuxer: str = "",
) -> Generator[bytes, None, None]:
    """What ffmpeg writes to its output, in runs of `run_bytes`, or in lines if that is 0.

    `demuxer` is the only one that may read the file; by default ffmpeg chooses one by the contents.
    Raises VideoError if ffmpeg fails, before a last run that is shorter, and ValueError if another process ended it.
    """
    part = ["-ss", f"{start:.6f}"] if start else []
    part += ["-t", f"{end - start:.6f}"] if end is not None else []
    command = [ffmpeg_program(), "-nostdin", "-v", "error", *["-xerror"] * stop_at_errors, *part]
    command += [*INPUT_LIMITS, *(["-f", demuxer] if demuxer else [])]
    command += ["-i", f"file:{path}", "-map", "0:v:0", *options]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, bufsize=2**20) as process,
    ):
        assert process.stdout is not None
        try:
            while True:
                data = process.stdout.read(run_bytes) if run_bytes else process.stdout.readline()
                if (not data or len(data) < run_bytes) and process.wait():
                    if -process.returncode in ENDED_FROM_OUTSIDE:
                        raise ValueError(f"{path}: ffmpeg was ended by signal {-process.returncode}; run it again")
                    stderr.seek(0)
                    message = first_line(stderr.read().decode(errors="replace"))
                    reason = OTHER_CONTAINER if "not on whitelist" in message else brief(message, 160)
                    raise VideoError(f"does not decode: {reason or 'ffmpeg gave no reason'}")
                if not data:
                    return
                yield data
        finally:
            process.kill()
