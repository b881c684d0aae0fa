"""Reading videos: the frames, their size, and files that do not decode."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from context_forcing.video.mp4 import write_video
from context_forcing.video.reading import VideoError, check_video, read_runs


def film(path, frames_THWC, fps=16):
    pixels = torch.from_numpy(frames_THWC).float() / 127.5 - 1
    write_video(path, [pixels.movedim(-1, 0)[None]], fps=fps)


def bars(height, width):
    """A picture of three upright bars: red, green, blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        picture[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 220
    return picture


def test_pixels_are_resampled_resized_and_cropped_to_the_centre(tmp_path):
    brightness = np.repeat(np.arange(8, dtype=np.uint8) * 30, 4)
    frames = np.broadcast_to(brightness[:, None, None, None], (32, 48, 96, 3)).copy()
    film(tmp_path / "ramp.mp4", frames, fps=32)
    (found,) = read_runs(tmp_path / "ramp.mp4", 16, (32, 16), fps=16)
    assert found.shape == (16, 16, 32, 3), "half the frames, half the second"
    assert np.abs(found.mean((1, 2, 3)) - brightness[::2]).max() < 20 and (np.diff(found.mean((1, 2, 3))) > -3).all()

    film(tmp_path / "bars.mp4", np.stack([bars(48, 144)] * 5))
    for size in ((48, 48), (32, 32), (96, 96)):
        (found,) = read_runs(tmp_path / "bars.mp4", 5, size, fps=16)
        middle = found[:, :, size[0] // 8 : -size[0] // 8].reshape(-1, 3).mean(0)
        assert middle[1] > 180 and middle[0] < 30 and middle[2] < 30, "only the green middle is left"


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    writer = imageio_ffmpeg.write_frames(
        str(tmp_path / "wide.mp4"), (48, 48), fps=16, codec="libx264", macro_block_size=1,
        output_params=["-vf", "setsar=3"], ffmpeg_log_level="error",
    )  # fmt: skip
    writer.send(None)
    for _ in range(5):
        writer.send(bars(48, 48))
    writer.close()
    (found,) = read_runs(tmp_path / "wide.mp4", 5, (48, 48), fps=16)
    middle = found[:, :, 8:-8].reshape(-1, 3).mean(0)
    assert middle[1] > 150 and middle[0] < 60 and middle[2] < 60, "shown at 144 x 48, the middle is green"


def test_a_part_of_a_video(tmp_path):
    levels = np.arange(41, dtype=np.uint8) * 6
    film(tmp_path / "ramp.mp4", np.broadcast_to(levels[:, None, None, None], (41, 64, 128, 3)).copy())
    read = lambda **part: np.concatenate(list(read_runs(tmp_path / "ramp.mp4", 7, (128, 64), 16, **part)))
    whole = read()
    assert len(whole) == 41 and (np.diff(whole.mean((1, 2, 3))) > 0).all()
    check_video(tmp_path / "ramp.mp4", 0.5, 1.5)
    assert np.array_equal(read(start=0.5, end=1.5), whole[8:24])
    assert np.array_equal(read(start=0.5, end=1.5, skip=1), whole[15:24])


def test_a_file_without_pictures(tmp_path):
    (tmp_path / "none.mp4").write_text("x")
    with pytest.raises(VideoError, match="does not decode"):
        check_video(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="does not decode"):
        list(read_runs(tmp_path / "none.mp4", 5, (16, 16), 16))
    with pytest.raises(VideoError, match="there is no such file"):
        check_video(tmp_path / "gone.mp4")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_one_frame_at_every_rate(tmp_path, suffix):
    path = tmp_path / f"start{suffix}"
    Image.fromarray(bars(32, 48)).save(path)
    (expected,) = read_runs(path, 4, (48, 32), 25)
    assert expected.shape == (1, 32, 48, 3)
    for fps in (1, 8, 12, 12.5, 16):
        (found,) = read_runs(path, 4, (48, 32), fps)
        assert np.array_equal(found, expected), fps
        assert not list(read_runs(path, 4, (48, 32), fps, skip=1))


@pytest.mark.parametrize("fps, num_frames", [(2, 1), (6, 2), (7, 3), (16, 6), (25, 9)])
def test_a_video_has_the_frames_of_ffmpegs_filter(tmp_path, fps, num_frames):
    film(tmp_path / "ramp.mp4", np.stack([np.full((32, 48, 3), 40 * level, np.uint8) for level in range(6)]))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "ramp.mp4"), "-vf", f"fps={fps}"]
    data = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    (found,) = read_runs(tmp_path / "ramp.mp4", 99, (48, 32), fps)
    expected = np.frombuffer(data.stdout, np.uint8).reshape(-1, 32, 48, 3)
    assert found.shape == expected.shape and len(found) == num_frames
    assert np.abs(found.astype(int) - expected).max() < 3, "levels are 40 apart"


def test_a_video_of_less_than_half_a_frames_time_is_its_first_frame(tmp_path):
    levels = [np.full((32, 48, 3), 40 * level, np.uint8) for level in range(6)]
    film(tmp_path / "short.mp4", np.stack(levels), fps=240)
    (found,) = read_runs(tmp_path / "short.mp4", 9, (48, 32), 16)
    assert len(found) == 1 and found.max() < 20
