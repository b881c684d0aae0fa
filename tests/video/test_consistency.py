"""Similarity to the first picture says how alike they are, never without motion; both are drawn by pillow."""

import numpy as np
import pytest
import torch

from context_forcing.video.consistency import (
    LINES,
    ConsistencyCurve,
    describe,
    draw_consistency,
    measure_consistency,
    palette,
)
from context_forcing.video.sheet import WIDTH

FPS = 8


def picture(seed=0):
    """Flat patches of a few colours, 48 x 64."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return patches.repeat(8, 0).repeat(8, 1)


def alike(a, b):
    first, other = palette([a, b])
    return (first @ other).item()


def test_the_palette_of_a_picture():
    scene = picture()
    darker = (scene * 0.97).astype(np.uint8)
    red = np.clip(scene + np.array([90, 0, 0]), 0, 255).astype(np.uint8)
    assert alike(scene, scene) == pytest.approx(1, abs=1e-5)
    assert alike(scene, scene[:, ::-1]) == pytest.approx(1, abs=1e-5), "which colours, not where"
    assert alike(scene, darker) > 0.9 and 0.7 > max(alike(scene, red), alike(scene, 255 - scene))
    assert alike(np.zeros_like(scene), np.full_like(scene, 255)) == 0
    assert palette([scene]).norm().item() == pytest.approx(1, abs=1e-5)


def test_a_tint_that_grows_is_less_and_less_alike():
    scene = picture()
    tinted = [np.clip(scene + np.array([shade, 0, -shade]), 0, 255).astype(np.uint8) for shade in range(0, 100, 20)]
    found = [alike(scene, each) for each in tinted]
    assert found == sorted(found, reverse=True)


def test_a_still_picture_is_perfectly_alike_and_says_that_it_does_not_move():
    found = measure_consistency([picture()] * 33, FPS, {"palette": palette}, 1.0)
    assert found.similarity["palette"] == pytest.approx([1] * 5, abs=1e-5) and found.motion == (0,) * 5
    assert found.times == (0, 1, 2, 3, 4) and found.num_frames == 33
    assert "motion: 0.00 %" in describe(found) and "1.000 at the end" in describe(found)


def test_motion_is_the_mean_change_of_all_frames_between_looks():
    frames = [np.full((4, 4, 3), 51 * (number % 2), np.uint8) for number in range(17)]
    found = measure_consistency(frames, FPS, {}, 1.0)
    assert found.motion == pytest.approx((0, 20, 20)) and found.similarity == {}


def test_what_is_held_does_not_grow():
    held = []

    def extractor(pictures):
        held.append(len(pictures))
        return torch.ones(len(pictures), 1)

    found = measure_consistency((picture() for _ in range(100)), FPS, {"one": extractor}, 1 / FPS)
    assert sum(held) == 100 == len(found.times) and max(held) == 16


@pytest.mark.parametrize(
    "every, frames, words", [(0.01, 9, "give 0.125 or more"), (9.0, 9, "too short for two samples")]
)
def test_what_cannot_be_watched_is_refused(every, frames, words):
    with pytest.raises(ValueError, match=f"every: .*the video.*{words}"):
        measure_consistency([picture()] * frames, FPS, {"palette": palette}, every)


@pytest.mark.parametrize("num_eyes", [0, 1, 2])
@pytest.mark.parametrize("num_looks", [2, 11, 600])
def test_the_plot_has_a_panel_an_eye_and_one_of_motion(num_eyes, num_looks, monkeypatch):
    from PIL import ImageDraw

    written, real = [], ImageDraw.ImageDraw.text

    def note(draw, at, text, *args):
        written.append(text)
        real(draw, at, text, *args)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    falling = tuple(np.linspace(1, 0.7, num_looks))
    names = ("palette", "CLIP")[:num_eyes]
    curve = ConsistencyCurve(
        fps=16, num_frames=16 * num_looks, times=tuple(map(float, range(num_looks))),
        similarity=dict.fromkeys(names, falling), motion=(0.0, *[2.5] * (num_looks - 1)),
    )  # fmt: skip
    image = draw_consistency({"one": curve})
    assert image.width == WIDTH
    assert not any(text.startswith("one") for text in written)
    titles = [text for text in written if text.startswith(("palette: cosine", "CLIP: cosine", "motion: mean change"))]
    assert titles == [*(f"{name}: cosine to the first frame" for name in names), titles[-1]]
    assert "% of the full range" in titles[-1]
    assert describe(curve).count("least 0.700") == num_eyes and "2.50 %" in describe(curve)


def test_several_videos_are_drawn_in_colours_of_their_own():
    curves = {
        name: ConsistencyCurve(
            fps=16, num_frames=32, times=(0.0, 1.0), similarity={"palette": (1.0, end)}, motion=(0.0, 9.0)
        )
        for name, end in (("first", 0.8), ("second", 0.6))
    }
    colours = {colour for _, colour in draw_consistency(curves).getcolors(2**16)}
    assert set(LINES[:2]) <= colours and not set(LINES[2:]) & colours
