"""The judge must be right before it judges: the true world scores full marks, another one does not."""

import json

import numpy as np
import pytest
import torch

from context_forcing.model.pipeline import Pipeline
from context_forcing.train.evaluate import World, evaluate_recall, judge, sum_up
from context_forcing.train.world import ALL_STYLES, Scene, benchmark_script, render_latent_frames


@pytest.fixture(scope="module")
def world():
    return World(Pipeline.load(None, torch.device("cpu"), torch.float32))


def true_film(world, script, style, seed):
    """A film that begins somewhere on the ring, as generated ones do."""
    scene = Scene.sample(np.random.default_rng(seed))
    art = render_latent_frames(scene, [style] * len(script.moves), script.frame_moves, start=7 * seed)
    return world.encode(art).movedim(0, 1), scene


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind", ["dwell", "wander"])
def test_the_true_world_scores_full_marks(world, kind, mirror):
    script = benchmark_script(kind, 4, mirror)
    for k, style in enumerate(ALL_STYLES[::5]):
        film, scene = true_film(world, script, style, k)
        trial = judge(world, film, script, style)
        assert trial.remembered == trial.returned
        assert set(trial.remembered) <= set(scene.class_ids)
        assert trial.heading_accuracy == 1 and trial.motion == 1
        assert trial.residual < 1e-6


def test_a_world_that_changed_meanwhile_scores_chance(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    trials = []
    for k in range(20):
        film, _ = true_film(world, script, style, k)
        other, _ = true_film(world, script, style, 1000 + k)
        film[:, script.return_frame :] = other[:, script.return_frame :]
        trials.append(judge(world, film, script, style))
    cell = sum_up("novel", "dwell", 15, trials)
    assert cell.recall < 0.2 and cell.low <= cell.recall <= cell.high
    assert cell.chance < 0.2


def test_a_still_picture_is_caught_by_the_motion_figures(world):
    script, style = benchmark_script("dwell", 4, False), ALL_STYLES[0]
    film, _ = true_film(world, script, style, 0)
    trial = judge(world, film[:, :1].expand(-1, film.shape[1], -1, -1), script, style)
    assert trial.motion == 0 and trial.heading_accuracy < 0.5


@pytest.mark.slow
def test_evaluate_writes_a_table_and_strips(tmp_path):
    table = evaluate_recall(None, ["novel", "none"], [0], 2, 0, "cpu", "fp32", tmp_path)
    cells = json.loads((tmp_path / "recall.json").read_text())
    assert {(cell["kind"], cell["policy"]) for cell in cells} == {
        (kind, policy) for kind in ("dwell", "wander") for policy in ("novel", "none")
    }
    assert table.row_count == len(cells) and len(list(tmp_path.glob("*.png"))) == len(cells)
