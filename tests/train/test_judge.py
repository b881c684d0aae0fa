"""The judge on films whose truth is known: a true world scores full marks, and every way to go wrong is caught."""

import numpy as np
import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.train.evaluation.judge import QUARTERS, WHOLE, World, judge, judge_long, landmark, path_of
from context_forcing.train.world.camera import render_latent_frames
from context_forcing.train.world.geometry import stations_in_view
from context_forcing.train.world.prompts import ALL_STYLES
from context_forcing.train.world.scene import Scene, templates
from context_forcing.train.world.scripts import benchmark_script
from context_forcing.video.pipeline import Pipeline

TRIP = [0, 1, 1, 1, 0, -1, -1, -1]
LONG = TRIP * QUARTERS
REACH = [3 * chunk for chunk in range(len(LONG))]


@pytest.fixture(scope="module")
def world():
    return World(Pipeline.load(StudentSource().open(), torch.device("cpu"), torch.float32))


def true_film(world, moves, style, seed):
    """A film that begins somewhere on the ring, as generated ones do; `moves` per chunk."""
    scene = Scene.sample(np.random.default_rng(seed))
    art = render_latent_frames(scene, [style] * len(moves), moves, start=7 * seed)
    return world.encode(art).movedim(0, 1), scene


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind", ["dwell", "wander"])
def test_the_true_world_scores_full_marks(world, kind, mirror):
    script = benchmark_script(kind, 4, mirror)
    for k, style in enumerate(ALL_STYLES[::5]):
        film, scene = true_film(world, script.moves, style, k)
        trial = judge(world, film, script, style)
        assert trial.first == trial.remembered == trial.returned
        assert trial.recall == trial.recall_first == trial.recall_whole == trial.share_whole == 1
        assert set(trial.remembered) <= set(scene.class_ids)
        assert trial.heading_accuracy == 1 and trial.motion == 1
        assert trial.change == pytest.approx(1, abs=1e-4)
        assert trial.residual < 1e-6


def test_half_drawn_landmarks_are_not_whole_and_do_not_count(world):
    """The right half of the first target is of another class, so that it has no class to return to."""
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    film, scene = true_film(world, script.moves, style, 0)
    (station, column), *others = stations_in_view(script.target_heading)
    classes = world.encode(templates(style, station))
    other = (scene.class_ids[station] + 12) % len(classes)
    landmark(film[:, script.target_frame], column)[..., 2:] = classes[other, ..., 2:]
    landmark(film[:, script.return_frame + 1], column)[:] = classes[5]
    trial = judge(world, film, script, style)
    assert trial.whole == (False, *(True for _ in others))
    assert trial.recall == len(others) / (1 + len(others)) == trial.share_whole
    assert trial.recall_whole == 1


def test_soft_landmarks_are_whole_and_mixed_ones_are_not(world):
    """What the docstring of WHOLE says of noise and of even mixtures of two classes."""
    generator = torch.Generator().manual_seed(0)
    soft, mixed = [], []
    for station, style in enumerate(ALL_STYLES[::3]):
        classes = world.encode(templates(style, station))
        pairs = torch.combinations(torch.arange(len(classes)))
        picture = torch.zeros(16, 8, 16)
        for one, two in classes[pairs]:
            for distances, drawn in (
                (soft, one + 0.25 * torch.randn(one.shape, generator=generator)),
                (mixed, 0.5 * (one + two)),
            ):
                landmark(picture, 2)[:] = drawn
                distances.append(world.classify(picture, 2, style, station)[1])
    assert max(soft) < WHOLE and np.mean(np.array(mixed) < WHOLE) == pytest.approx(0.05, abs=0.02)


def test_a_still_picture_is_caught_by_the_motion_figures(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    film, _ = true_film(world, script.moves, style, 0)
    trial = judge(world, film[:, :1].expand(-1, film.shape[1], -1, -1), script, style)
    assert trial.recall == 1
    assert trial.motion == 0 and trial.change == 0 and trial.heading_accuracy < 0.5


def test_a_flicker_is_caught_by_the_change_of_frames(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    film, _ = true_film(world, script.moves, style, 0)
    film = film + 0.4 * (torch.arange(film.shape[1]) % 2).view(1, -1, 1, 1)
    trial = judge(world, film, script, style)
    assert trial.recall == 1 and trial.change > 1.2


def test_the_first_view_is_the_first_not_the_last_before_leaving(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    for k in range(4):
        film, _ = true_film(world, script.moves, style, k)
        # Another scene, at the same headings, up to just before the last look at the targets.
        scene = Scene.sample(np.random.default_rng(1000 + k))
        art = render_latent_frames(scene, [style] * len(script.moves), script.moves, start=7 * k)
        film[:, : script.target_frame] = world.encode(art).movedim(0, 1)[:, : script.target_frame]
        trial = judge(world, film, script, style)
        targets = [station for station, _ in stations_in_view(script.target_heading + 7 * k)]
        assert trial.first == tuple(scene.class_ids[station] for station in targets)
        assert trial.recall == 1
        assert trial.recall_first == np.mean([a == b for a, b in zip(trial.first, trial.returned)])


def test_a_true_long_film_scores_full_marks_in_every_quarter(world):
    for k, style in enumerate(ALL_STYLES[::9]):
        film, _ = true_film(world, LONG, style, k)
        trial = judge_long(world, film, LONG, style, REACH)
        assert trial.heading_accuracy == (1,) * QUARTERS and trial.motion == (1,) * QUARTERS
        assert trial.change == pytest.approx((1,) * QUARTERS, abs=1e-4)
        assert max(trial.palette) < 1e-3 and max(trial.residual) < 1e-6
        assert max(trial.palette_any) < 1e-3 and max(trial.palette_own) < 1e-3 and trial.style == (1,) * QUARTERS
        assert trial.reach == tuple(np.mean(REACH[8 * q : 8 * q + 8]) for q in range(QUARTERS))


def test_a_palette_that_drifts_is_caught_and_nothing_else_is_blamed(world):
    style = ALL_STYLES[0]
    film, _ = true_film(world, LONG, style, 3)
    drift = torch.linspace(0, 0.3, film.shape[1]).view(1, -1, 1, 1)
    film = torch.cat([film[:-1], film[-1:] + drift])
    trial = judge_long(world, film, LONG, style, REACH)
    expected = drift.flatten().view(QUARTERS, -1).mean(1).tolist()
    assert trial.palette == pytest.approx(expected, abs=1e-3)
    # The other channels tell the heading: the nearest true view is hardly nearer than that of the right heading.
    assert all(0 < a <= b + 1e-3 for a, b in zip(trial.palette_any, trial.palette))
    first, *later = trial.palette_own
    assert later == pytest.approx([each - expected[0] for each in expected[1:]], abs=0.02) and first < later[0]
    assert trial.heading_accuracy == (1,) * QUARTERS and trial.motion == (1,) * QUARTERS


def test_a_wrong_heading_is_not_a_wrong_colour_and_another_style_is_told(world):
    """The second half shows the world from elsewhere, the last quarter also under another style."""
    style, other = ALL_STYLES[0], ALL_STYLES[-1]
    film, scene = true_film(world, LONG, style, 3)
    art = [render_latent_frames(scene, [each] * len(LONG), LONG, start=21 + 12) for each in (style, other)]
    elsewhere, styled = (world.encode(each).movedim(0, 1) for each in art)
    half, last = film.shape[1] // 2, film.shape[1] // QUARTERS * 3
    film = torch.cat([film[:, :half], elsewhere[:, half:last], styled[:, last:]], dim=1)
    trial = judge_long(world, film, LONG, style, REACH)
    assert trial.palette[1] < 1e-3 and trial.palette[2] > 0.2
    assert trial.palette_any[2] < 1e-3 and trial.palette_any[3] > 0.2
    assert trial.style == (1, 1, 1, 0)


def test_places_that_are_not_those_of_the_first_quarter_have_no_own_palette(world):
    moves = [1, 0, 0, 0] + [1, 0, 0, 0] * 2 + [1, 1, 1, -1]
    film, _ = true_film(world, moves, ALL_STYLES[0], 3)
    own = judge_long(world, film, moves, ALL_STYLES[0], [0] * len(moves)).palette_own
    assert own[0] < 1e-3 and own[1] is None and own[2] is None and own[3] is None


def test_pictures_that_blur_are_caught_by_the_residual(world):
    style = ALL_STYLES[0]
    film, _ = true_film(world, LONG, style, 3)
    late = film.shape[1] // 2
    noise = torch.randn(film[:, late:].shape, generator=torch.Generator().manual_seed(1))
    film[:, late:] += 0.3 * noise
    first, second, third, last = judge_long(world, film, LONG, style, REACH).residual
    assert (
        max(first, second) < 1e-6 and third == pytest.approx(0.09, abs=0.02) and last == pytest.approx(third, abs=0.01)
    )


def test_a_camera_that_stops_is_caught_in_its_quarter(world):
    style = ALL_STYLES[0]
    film, _ = true_film(world, LONG, style, 3)
    quarter = film.shape[1] // QUARTERS
    film[:, -quarter:] = film[:, -quarter - 1 : -quarter]
    trial = judge_long(world, film, LONG, style, REACH)
    assert trial.motion[:3] == (1, 1, 1) and trial.motion[3] == 0
    assert trial.change[3] == 0 and trial.heading_accuracy[3] < 0.6


def test_a_camera_that_slips_loses_the_heading_but_not_the_sharpness(world):
    style = ALL_STYLES[0]
    film, _ = true_film(world, LONG, style, 3)
    slipped = torch.cat([film[:, :48], film[:, 49:], film[:, -1:]], dim=1)
    assert LONG[48 // 3 + 1] == 1
    trial = judge_long(world, slipped, LONG, style, REACH)
    assert trial.heading_accuracy[0] == 1 and trial.heading_accuracy[3] < 1
    assert max(trial.residual) < 1e-6


@pytest.mark.parametrize("moves", [[1] * 7, [1] * 12 + [0] * 4], ids=["not four quarters", "one quarter stays"])
def test_quarters_without_a_move_are_refused(world, moves):
    film = torch.zeros(16, 3 * len(moves), 8, 16)
    with pytest.raises(ValueError, match="moves"):
        judge_long(world, film, moves, ALL_STYLES[0], [0] * len(moves))


def test_a_film_with_a_poor_background_is_judged_by_its_landmarks(world):
    """Landmarks locate the start of the film too: a grey sky must not shift the headings."""
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    film, _ = true_film(world, script.moves, style, 3)
    rows = film.shape[-2] // 4
    film[:, :, [*range(rows), *range(film.shape[-2] - rows, film.shape[-2])]] = 0
    trial = judge(world, film, script, style)
    assert trial.recall == 1 and trial.residual < 0.15
    assert trial.heading_accuracy == 1 and trial.motion == 1


def test_turns_are_told_from_the_pictures_alone(world):
    moves = [0, 0, 1, 1, 0, -1, -1, -1, 0, 1]
    art = render_latent_frames(Scene.sample(np.random.default_rng(2)), [ALL_STYLES[4]] * 10, moves, 1, start=9)
    film = world.encode(art).movedim(0, 1)
    assert np.diff(path_of(film)).tolist() == moves[1:]
    noisy = film + 0.1 * torch.randn(film.shape, generator=torch.Generator().manual_seed(0))
    assert np.diff(path_of(noisy)).tolist() == moves[1:]
    assert not path_of(film[:, :1].expand(-1, 5, -1, -1)).any()
