"""A video that stands under its name is whole: ffmpeg ended well, every frame is there, all of it on the disk."""

import json
import os
import re
import stat
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from context_forcing.cli.doctor import examine
from context_forcing.video.mp4 import FAST, hold_output, join_videos, part_name, write_video
from context_forcing.video.provenance import libraries
from context_forcing.video.reading import VideoError, check_whole, read_frames, read_runs, read_tags

SHORT, LONG = 6, 150
"""Frames: those that fit into a pipe, and more than ffmpeg takes before it writes."""

FULL = "trap '' XFSZ; ulimit -f 4"
"""The system lets ffmpeg write 2 kB, then tells it that there is no more room."""


def noise(num_frames, size=(32, 48)):
    return torch.rand(1, 3, num_frames, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write(path, num_frames, **settings):
    return write_video(path, noise(num_frames).split(5, dim=2), **{"fps": 16, **settings})


@pytest.mark.parametrize("fps", [16, 16.0, 23.976, 24000 / 1001, 1, 240, 0.5, 16.123457])
def test_every_speed_passes_its_own_check(tmp_path, fps):
    assert write(tmp_path / "film.mp4", 33, fps=fps) == 33
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize(("scale", "effort"), [(1, ("-preset", "medium")), (2, FAST)])
def test_ffmpeg_gets_the_arguments_that_imageio_gave_it(tmp_path, scale, effort):
    """Films are the same to the byte, but for the effort of enlarged ones."""
    write(tmp_path / "film.mp4", 20, scale=scale, crf=20)
    writer = imageio_ffmpeg.write_frames(
        str(tmp_path / "other.mp4"), (48 * scale, 32 * scale), fps=16, codec="libx264", pix_fmt_out="yuv420p",
        macro_block_size=1, quality=None, ffmpeg_log_level="error",
        output_params=[*effort, "-crf", "20", "-movflags", "+faststart"],
    )  # fmt: skip
    writer.send(None)
    for frame in noise(20)[0].movedim(0, -1).add(1).mul(127.5).round().clamp(0, 255).byte().numpy():
        writer.send(frame.repeat(scale, axis=0).repeat(scale, axis=1))
    writer.close()
    assert (tmp_path / "film.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()


TAGS = {
    "prompt": json.dumps({"1": {"inputs": {"text": "a=b; #c \\ 'd' \"e\"\nf \u96ea \U0001f3ac"}}}, ensure_ascii=False),
    "workflow": json.dumps({"nodes": list(range(60000))}),
    "context_forcing": "",
}
"""The second is longer than an argument of a command can be."""


def ffmpeg(*arguments) -> bytes:
    return subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *map(str, arguments)], check=True, capture_output=True
    ).stdout


def test_tags_of_any_length_and_any_characters_are_kept(tmp_path):
    write(tmp_path / "film.mp4", SHORT, metadata=TAGS)
    found = read_tags(tmp_path / "film.mp4")
    assert {name: found.get(name, "") for name in TAGS} == TAGS


def test_tags_change_no_frame(tmp_path):
    write(tmp_path / "plain.mp4", LONG)
    write(tmp_path / "tagged.mp4", LONG, metadata=TAGS)
    sums = [
        ffmpeg("-v", "error", "-i", tmp_path / f"{name}.mp4", "-f", "framemd5", "-") for name in ("plain", "tagged")
    ]
    assert sums[0] == sums[1] and sums[0].count(b"\n0,") == LONG


def test_videos_are_joined_without_encoding_them_again(tmp_path):
    frames = []
    for name, count in (("it's 1", 9), ("2", 4)):
        write(tmp_path / f"{name}.mp4", count)
        frames += list(read_frames(tmp_path / f"{name}.mp4")[1])
    join_videos([tmp_path / "it's 1.mp4", tmp_path / "2.mp4"], tmp_path / "film.mp4")
    check_whole(tmp_path / "film.mp4", 13, 16)
    assert np.array_equal(np.stack(frames), np.stack(list(read_frames(tmp_path / "film.mp4")[1])))


def test_a_video_that_cannot_be_joined_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="output: .*film.mp4 is not whole: ffmpeg: "):
        join_videos([tmp_path / "missing.mp4"], tmp_path / "film.mp4")


FAULTS = {
    "disk full at the end": (SHORT, (FULL, ":"), "File too large (exit status"),
    "disk full in the middle": (LONG, (FULL, ":"), "File too large (exit status"),
    "killed at the end": (SHORT, (":", "kill -9 $$"), "ffmpeg: ended by signal 9, Killed"),
    "killed in the middle": (LONG, ("head -c 100000 >/dev/null; kill -9 $$", ":"), "ended by signal 9, Killed"),
    "killed at once": (SHORT, ("kill -9 $$", ":"), "ended by signal 9, Killed"),
    "a status alone": (SHORT, (":", "status=3"), "ffmpeg: exit status 3"),
    "gone in the middle": (LONG, ("exit 0", ":"), "ffmpeg: exit status 0"),
    "half a file": (SHORT, (":", 'head -c 3000 "$file" >"$file.x"; mv "$file.x" "$file"'), "does not decode"),
    "nothing in it": (SHORT, (":", ': >"$file"'), "does not decode"),
    "no file": (SHORT, (":", 'rm "$file"'), "does not decode"),
    "a frame too few": (
        SHORT, (":", '"$ffmpeg" -v error -i "$file" -frames:v 5 "$file.mp4"; mv "$file.mp4" "$file"'),
        "has 5 frames, 6 were written",
    ),
    "too long": (
        SHORT, (":", '"$ffmpeg" -v error -itsscale 2 -i "$file" -c copy "$file.mp4"; mv "$file.mp4" "$file"'),
        "s long, 0.375 s were written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_frames, does, words", FAULTS.values(), ids=FAULTS)
def test_what_is_not_whole_does_not_get_its_name(tmp_path, ffmpeg_that, num_frames, does, words):
    """One line: which file, why, and what to do. What stood there before stays."""
    path = tmp_path / "film.mp4"
    path.write_bytes(b"the film of yesterday")
    ffmpeg_that(*does)
    with pytest.raises(ValueError) as error:
        write(path, num_frames)
    message = str(error.value)
    assert str(path) in message and words in message and "then run it again" in message and "\n" not in message
    assert path.read_bytes() == b"the film of yesterday" and not part_name(path).exists()


def none_found():
    raise RuntimeError("No ffmpeg exe could be found.")


@pytest.mark.parametrize(
    "find, words",
    [
        (
            none_found,
            "ffmpeg: there is none (No ffmpeg exe could be found.); pip install",
        ),
        (lambda: "/nowhere/ffmpeg", "ffmpeg: /nowhere/ffmpeg is not a program; pip install"),
    ],
)
def test_no_ffmpeg_is_one_line(tmp_path, monkeypatch, find, words):
    """Whatever needs it; nothing is left."""
    source = tmp_path / "film.mp4"
    write(source, SHORT)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", find)
    (finding,) = (finding for finding in examine() if finding.name == "ffmpeg")
    assert not finding.ok and finding.text == words.removeprefix("ffmpeg: ") + finding.text.partition("pip install")[2]
    for work in (
        lambda: write(tmp_path / "other.mp4", SHORT),
        lambda: join_videos([source, source], tmp_path / "other.mp4"),
        lambda: check_whole(source, SHORT, 16),
        lambda: read_tags(source),
        lambda: read_frames(source),
        lambda: libraries("sdpa"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            work()
        assert type(error.value) is ValueError and "IMAGEIO_FFMPEG_EXE" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.skipif(os.name == "nt", reason="a text file stands in for ffmpeg")
def test_what_is_no_ffmpeg_is_one_line(tmp_path, monkeypatch):
    other = tmp_path / "ffmpeg"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(other))
    with pytest.raises(ValueError, match="^ffmpeg: .*ffmpeg does not run .*; set IMAGEIO_FFMPEG_EXE to another$"):
        libraries("sdpa")


def test_errors_of_the_source_are_its_own(tmp_path):
    def pixels():
        yield noise(5)
        raise BrokenPipeError("mine")

    with pytest.raises(BrokenPipeError, match="mine"):
        write_video(tmp_path / "film.mp4", pixels(), fps=16)
    assert not list(tmp_path.iterdir())


def test_much_that_ffmpeg_says_blocks_nothing(tmp_path, ffmpeg_that, caplog):
    ffmpeg_that('yes "[mp4 @ 0x1] something odd" | head -c 300000 >&2')
    assert write(tmp_path / "film.mp4", SHORT) == SHORT
    assert "film.mp4: ffmpeg: something odd" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_video_has_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with hold_output(tmp_path / "film.mp4"):
            write(tmp_path / "film.mp4", SHORT)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "film.mp4").stat().st_mode) == 0o640


def test_a_whole_video_is_measured(tmp_path):
    path = tmp_path / "film.mp4"
    write(path, 40)
    check_whole(path, 40, 16)
    assert sum(map(len, read_runs(path, 16, (48, 32), 16))) == 40
    for num_frames, fps, words in ((41, 16, "has 40 frames, 41"), (40, 15, r"is 2.500 s long, 2.667 s")):
        with pytest.raises(VideoError, match=words):
            check_whole(path, num_frames, fps)


def test_a_place_is_held(tmp_path):
    path = tmp_path / "film.mp4"
    part_name(path).write_bytes(b"of a run that was killed")
    with hold_output(path), pytest.raises(ValueError, match=rf"written by another process \(pid {os.getpid()} on"):
        assert not part_name(path).exists()
        with hold_output(path):
            pass
    assert not list(tmp_path.iterdir())
    for name, words in (
        ("film.avi", "does not end in .mp4"),
        ("missing/film.mp4", "cannot be written"),
        ("", "folder"),
    ):
        (tmp_path / "folder.mp4").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=words), hold_output(tmp_path / (name or "folder.mp4")):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_frames_of_a_video_as_it_is(tmp_path):
    """The size and speed of the file, not those of a request."""
    path = tmp_path / "film.mp4"
    write(path, 5, fps=24)
    fps, frames = read_frames(path)
    (run,) = read_runs(path, 5, (48, 32), 24)
    frames = np.stack(list(frames))
    assert fps == 24 and frames.shape == run.shape and abs(frames.mean() - run.mean()) < 3
    for name, words in (("none.mp4", "no such file"), ("text.mp4", "no video")):
        (tmp_path / "text.mp4").write_text("no video")
        with pytest.raises(VideoError, match=words):
            read_frames(tmp_path / name)
