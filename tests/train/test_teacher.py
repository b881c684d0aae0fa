"""The teacher: error recycling, contexts."""

import torch

from context_forcing.model.sampler import seeded_generator
from context_forcing.train import run_stage
from context_forcing.train.presets import load_config
from context_forcing.train.stages.recycling import ErrorBuffer, RecyclingConfig
from context_forcing.train.stages.teacher import TeacherStage

from .helpers import ALONE, metrics_of, random


def test_errors_are_kept_by_noise_level_up_to_a_limit():
    errors = ErrorBuffer(RecyclingConfig(bins=2, entries=4))
    assert errors.draw(5, seeded_generator(1)) is None
    for number in range(9):
        errors.add(0.2, torch.full((16, 6, 2, 2), float(number)), 3, seeded_generator(number))
    errors.add(0.9, torch.full((16, 3, 2, 2), 100.0), 3, seeded_generator(0))
    assert [len(entries) for entries in errors.bins] == [4, 1] and len(errors) == 5
    drawn = errors.draw(7, seeded_generator(5))
    assert drawn.shape == (16, 7, 2, 2) and torch.equal(drawn, errors.draw(7, seeded_generator(5)))
    again = ErrorBuffer(RecyclingConfig(bins=2, entries=4))
    again.load_state(errors.state())
    assert torch.equal(again.draw(7, seeded_generator(6)), errors.draw(7, seeded_generator(6)))


def test_errors_are_added_to_contexts_that_are_not_clean(tiny):
    stage = TeacherStage(load_config("teacher", "smoke", ["recycling.clean_share=0.5", "recycling.share=1.0"]), ALONE)
    context = random(1, 16, 6, 8, 16)
    assert torch.equal(stage.add_errors(context, seeded_generator(0))[0], context), "there are no errors yet"
    stage.errors.add(0.5, torch.ones(16, 3, 8, 16), 3, seeded_generator(0))
    outcomes = [stage.add_errors(context, seeded_generator(k)) for k in range(60)]
    changed = [result for result, clean in outcomes if not clean]
    assert 15 < len(changed) < 45 and all(torch.equal(result, context) for result, clean in outcomes if clean)
    assert all(torch.allclose(result[:, :, 1:], context[:, :, 1:] + 1) for result in changed)
    first_clean = sum(torch.equal(result[:, :, 0], context[:, :, 0]) for result in changed)
    assert 0 < first_clean < len(changed)


def test_a_teacher_also_trains_without_a_context(tiny, tmp_path):
    run_stage("teacher", "smoke", ["steps=2", "plain_share=1.0", f"out={tmp_path}"], False)
    assert [line["remembered"] for line in metrics_of(tmp_path).values()] == [0, 0]


def test_errors_that_are_not_finite_are_not_kept(tiny, monkeypatch):
    stage = TeacherStage(load_config("teacher", "smoke", ["recycling.learn_clean_share=1.0"]), ALONE)
    loss = TeacherStage.loss
    broken = lambda self, *inputs: (
        loss(self, *inputs)[0] * float("nan"),
        torch.full((1, 16, 6, 8, 16), float("nan")),
        0.5,
        True,
    )
    with monkeypatch.context() as patch:
        patch.setattr(TeacherStage, "loss", broken)
        assert stage.step(0)["skipped"]
    assert len(stage.errors) == 0
    assert not stage.step(1)["skipped"] and len(stage.errors) > 0
