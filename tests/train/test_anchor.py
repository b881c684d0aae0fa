"""What keeps recall through distillation: the anchor, weights of columns, exit steps, prompts, averages."""

import dataclasses

import numpy as np
import pytest
import torch

from context_forcing.model.flow import shift_sigma
from context_forcing.model.sampler import seeded_generator
from context_forcing.train.data.clips import DemoPrompts, ShownBy
from context_forcing.train.presets import load_config
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.student import Piece
from context_forcing.train.trained_network import TrainedNetwork

from .helpers import ALONE, random

ANCHOR = ["anchor.weight=0.25", "anchor.chunks=4", "anchor.batch=2"]


def stage_of(files, *settings, name="contextual"):
    return DistillStage(load_config(name, "smoke", [*files, "batch=1", *settings]), ALONE)


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def student_gradients(stage, monkeypatch, step=1):
    """The student's gradients at its update in an iteration, before they are clipped."""
    taken = {}
    monkeypatch.setattr(TrainedNetwork, "update", lambda self, *_: taken.update(gradients(self.net)) or {})
    stage._update(step, "student")
    stage.student.net.zero_grad()
    return taken


def test_the_anchor_is_the_loss_of_pretraining(tiny, files):
    """The same clips, noise levels and noise: the same loss, and gradients times the weight."""
    same = ["recall_weight=7", "unseen_weight=2", "pacing=0.2", "long_trips=0.5", "text_dropout=0.3"]
    stage = stage_of(files, *ANCHOR, "anchor.own_sigmas=0", *(f"anchor.{setting}" for setting in same))
    anchor = stage.anchor.add_gradients(stage.student, 3)
    config = load_config("pretrain", "smoke", ["batch=2", *same, files[0].replace("student=", "init=")])
    pretrain = PretrainStage(config, ALONE)
    clips = stage.anchor.batches.long(3, 2)
    loss = pretrain._backward(clips, seeded_generator(config.seed, 2, 3))
    assert anchor == loss > 0
    expected = gradients(pretrain.network.net)
    assert expected.keys() == gradients(stage.student.net).keys()
    for name, gradient in gradients(stage.student.net).items():
        torch.testing.assert_close(gradient, 0.25 * expected[name], rtol=1e-4, atol=1e-8)


def test_the_anchor_is_added_to_the_loss_of_the_scores(tiny, files, monkeypatch):
    settings = ["first_exit_share=1", "context_from=1", "guidance=0"]
    without = student_gradients(stage_of(files, *settings), monkeypatch)
    off = student_gradients(stage_of(files, *settings, "anchor.weight=0", "anchor.chunks=9"), monkeypatch)
    stage = stage_of(files, *settings, *ANCHOR)
    both = student_gradients(stage, monkeypatch)
    assert stage.anchor.add_gradients(stage.student, 1) > 0
    alone = gradients(stage.student.net)
    assert all(torch.equal(off[name], without[name]) for name in without)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, without.get(name, 0) + alone.get(name, 0), rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(both[name], without[name]) for name in without)


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_the_anchor_s_noise_levels_are_the_student_s_own(tiny, files, own):
    stage = stage_of(files, "anchor.weight=1", "anchor.chunks=50", "anchor.batch=20", f"anchor.own_sigmas={own}")
    drawn = stage.anchor.draw_sigmas(seeded_generator(5))
    shares = [(drawn == sigma).float().mean().item() for sigma in torch.tensor(stage.sigmas)]
    assert shares == pytest.approx([own / 4] * 4, abs=0.05)
    whole_range = shift_sigma(torch.rand(20, 50, generator=seeded_generator(5)), 3.0)
    assert torch.equal(drawn, whole_range) == (own == 0)
    rest = drawn[~torch.isin(drawn, torch.tensor(stage.sigmas))]
    assert len(rest) == 0 if own == 1.0 else rest.min() < 0.1 and rest.max() > 0.97


@pytest.mark.parametrize("share, first", [(0.0, 0.25), (0.5, 0.5), (1.0, 1.0)])
def test_the_share_of_the_first_exit_step(tiny, share, first):
    stage = stage_of([], f"first_exit_share={share}")
    exits = np.array([stage.draw_lengths(step, True)[2] for step in range(1200)])
    shares = [(exits == step).mean() for step in range(4)]
    assert shares == pytest.approx([first] + [(1 - first) / 3] * 3, abs=0.05)


def piece_of(stage, shown_by):
    text = stage.prompts.text(0, 4)
    rollout = stage.rollout(text, 2, 1, 1, 0, False)
    target = rollout.target_BCTHW.detach().requires_grad_()
    return Piece(rollout.contexts[0], target, shown_by), text


def test_the_student_s_gradient_in_columns_that_only_memory_tells(tiny, files):
    shown_by = torch.randint(3, (1, 3, 8), generator=torch.Generator().manual_seed(0))
    grads = {}
    for weight in (1, 3):
        stage = stage_of(files, "guidance=0", f"recall_weight={weight}")
        for p in stage.critic.net.parameters():
            p.data.add_(0.05 * random(*p.shape))
        piece, text = piece_of(stage, shown_by)
        stage.student_loss(piece, text, seeded_generator(7))[0].backward()
        grads[weight] = piece.target_BCTHW.grad
    # 16 latents of a row in 8 columns
    factor = torch.where(shown_by == ShownBy.MEMORY, 3.0, 1.0).repeat_interleave(2, -1)[:, None, :, None]
    torch.testing.assert_close(grads[3], factor * grads[1])


def test_a_failed_column_does_not_divide_its_own_gradient(tiny):
    shown_by = torch.tensor([[[0, 0, 1, 1, 2, 2, 0, 1]] * 3])
    small = random(1, 16, 3, 8, 16).abs()
    failed = small + 100 * (shown_by == ShownBy.MEMORY).repeat_interleave(2, -1)[:, None, :, None]
    every, fast = (stage_of([], f"normaliser={name}").normaliser for name in ("all", "fast"))
    assert fast(failed, shown_by) == fast(small, shown_by)
    is_fast = (shown_by == ShownBy.FAST).repeat_interleave(2, -1)[0, 0]
    torch.testing.assert_close(fast(small, shown_by), small[..., is_fast].mean())
    assert every(failed, shown_by) == failed.mean() > 10 * every(small, shown_by)
    opening = torch.full_like(shown_by, ShownBy.NOTHING)
    assert fast(small, opening) == small.mean()


def test_a_rollout_knows_which_columns_its_memory_shows(tiny, files):
    stage = stage_of(files, "recall_weight=2", "context_from=3", "pacing=1.0")
    sample, context, target = 4, 5, 3
    text = stage.prompts.text(sample, context + target)
    rollout = stage.rollout(text, context, target, 0, sample, False)
    assert rollout.shown_by is None
    shown_by = stage.with_shown_by(rollout, sample).shown_by
    headings = stage.prompts.clip(sample, context + target).headings
    assert shown_by.shape == (1, 3 * target, 8)
    view = lambda frames: {headings[frame] + column for frame in frames for column in range(8)}
    for chunk, memory in enumerate(rollout.contexts):
        fast, every = view(memory.slots.fast[-3:]), view(memory.slots.all)
        for t in range(3 * chunk, 3 * chunk + 3):
            for column in range(8):
                place = headings[3 * context + t] + column
                expected = ShownBy.FAST if place in fast else ShownBy.MEMORY if place in every else ShownBy.NOTHING
                assert shown_by[0, t, column] == expected
    assert {*shown_by.unique().tolist()} >= {ShownBy.FAST, ShownBy.MEMORY}
    pieces = list(dataclasses.replace(rollout, shown_by=shown_by).pieces(1))
    assert torch.equal(torch.cat([piece.shown_by for piece in pieces], dim=1), shown_by)


def test_prompts_go_out_and_back():
    reach = lambda chunks, **moves: [np.ptp(DemoPrompts(seed=1, **moves).clip(n, chunks).headings) for n in range(40)]
    assert np.mean(reach(24, long_trips=1.0)) > np.mean(reach(24)) + 2
    # Too short for a long trip: other moves, no still camera.
    assert np.mean(reach(7, long_trips=1.0)) > 3


def test_shared_rollouts_serve_student_and_critic(tiny, files, monkeypatch):
    """The gradients are those of separate rollouts, before any network of the iteration changed."""
    settings, taken = ["context_from=1", "guidance=0", *ANCHOR], {}
    numbers, rollout = [], DistillStage.rollout
    monkeypatch.setattr(DistillStage, "rollout", lambda self, *args: numbers.append(args[4]) or rollout(self, *args))

    def update(self, *_):
        taken[self] = gradients(self.net)
        return {}

    monkeypatch.setattr(TrainedNetwork, "update", update)
    for p in (stage := stage_of(files, *settings, "share_rollouts=true")).critic.net.parameters():
        p.data.add_(0.05 * random(*p.shape))
    stage.step(1)
    shared = [taken[stage.trained[name]] for name in ("student", "critic")]
    assert numbers == [3], "batch 1: the student's sample of iteration 1"
    for name in ("student", "critic"):
        stage.trained[name].net.zero_grad()
    stage._update(1, "student")
    assert all(torch.equal(shared[0][name], value) for name, value in taken[stage.trained["student"]].items())
    stage.critic.net.zero_grad()
    text = stage.prompts.text(3, sum(stage.draw_lengths(1, True)[:2]))
    again = stage.rollout(text, *stage.draw_lengths(1, True), 3, False)
    stage.loss("critic", again, text, seeded_generator(stage.config.seed, 0, 1, 0, False))[0].backward()
    assert all(torch.equal(shared[1][name], value) for name, value in gradients(stage.critic.net).items())
    numbers.clear()
    stage_of(files, *settings).step(1)
    assert numbers == [2, 3]


@pytest.mark.parametrize("name", ["local", "contextual"])
def test_the_exported_average_is_not_start_weights(name):
    config = load_config(name, "demo")
    trained = TrainedNetwork(torch.nn.Linear(1, 1, bias=False), config.student_optim, ALONE)
    trained.average["weight"].fill_(1.0)
    trained.net.weight.data.zero_()
    for update in range(config.steps // config.critic_per_student):
        trained.updates = update + 1
        trained._update_average()
    assert trained.weights()["weight"].item() < 0.02


@pytest.mark.parametrize("setting", ["pacing=0.1", "recall_weight=2", "normaliser=fast", "long_trips=0.1"])
def test_settings_of_the_demo_world_are_refused_without_it(setting):
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}: .* data=demo"):
        load_config("contextual", "wan2.1-1.3b", [setting])
