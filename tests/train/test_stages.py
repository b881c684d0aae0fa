"""The distillation stages: what scores and students see, where gradients are, and that a killed run goes on alike."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.checkpoints.containers import read_safetensors
from context_forcing.model.checkpoints.student import StudentFile, StudentSource
from context_forcing.model.config import PRESETS, WanConfig
from context_forcing.model.network import Network
from context_forcing.model.sampler import CausalSampler, seeded_noise
from context_forcing.model.wan import WanModel
from context_forcing.train import run_stage
from context_forcing.train.checkpoints import Checkpoints, newest_checkpoint
from context_forcing.train.config import TEACHER_SEES, OptimConfig, RecyclingConfig
from context_forcing.train.log import MACHINE_METRICS
from context_forcing.train.parallel import ParallelState, module_runner, start_parallel
from context_forcing.train.presets import load_config
from context_forcing.train.stage import load_network, seeded_generator
from context_forcing.train.stages.codec import VaeStage
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.recycling import ErrorBuffer
from context_forcing.train.stages.score import NOTHING, Score
from context_forcing.train.stages.student import Student
from context_forcing.train.stages.teacher import TeacherStage
from context_forcing.train.trained_network import HISTORY, TrainedNetwork
from context_forcing.video.pipeline import Pipeline

TINY = WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=2)
SIGMAS = (1.0, 0.8, 0.5)
ALONE = ParallelState(0, 1, torch.device("cpu"), None)
STAGES = {
    "vae": "demo_codec", "pretrain": "student", "teacher": "teacher", "local": "student", "contextual": "student"
}  # fmt: skip
"""What each stage's file is called."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny(monkeypatch):
    """The demo preset, much smaller."""
    monkeypatch.setitem(PRESETS, "demo", TINY)


@pytest.fixture(scope="module")
def files(make_net, tmp_path_factory):
    """Two tiny networks in which nothing is zero, as plain files in Wan's layout: student and teacher."""
    folder, text = tmp_path_factory.mktemp("networks"), dict(text_dim=4096, text_len=512)
    paths = []
    for seed, name in enumerate(("student", "teacher")):
        net = make_net(seed, dim=32, ffn_dim=64, num_heads=1, num_layers=2, **text)
        paths.append(folder / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, paths[-1])
    return [f"student={paths[0]}", f"teacher={paths[1]}"]


@pytest.fixture
def learner(net):
    net.requires_grad_(True)
    yield net
    net.zero_grad()
    net.requires_grad_(False)


def network_of(net, recompute=False):
    return Network(net, torch.device("cpu"), torch.float32, run=module_runner(net, recompute))


def student_of(net, num_texts=1, recompute=False):
    text = random(num_texts, 5, net.config.text_dim, seed=9)
    return Student(network_of(net, recompute), text, recompute)


def empty(**settings):
    return empty_memory(MemoryConfig(**settings), (16, 4, 6))


# What is seen


def test_a_score_sees_the_context_and_the_context_does_not_see_the_target(net):
    score, text = Score(network_of(net)), random(1, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 4, 4, 6, seed=2), random(1, 16, 6, 4, 6, seed=3)
    with torch.no_grad():
        view = score.remember(context, text)
        flow = score.flow(view, x, 0.7, text)
        for frame in range(4):
            changed = context.clone()
            changed[:, :, frame] += 1
            assert not torch.allclose(score.flow(score.remember(changed, text), x, 0.7, text), flow, atol=1e-3)
        ahead = x.clone()
        ahead[:, :, 5] += 1
        assert not torch.allclose(score.flow(view, ahead, 0.7, text)[:, :, 0], flow[:, :, 0], atol=1e-4), (
            "the target sees itself in both directions"
        )
        nothing = score.remember(context[:, :, :0], text)
        assert nothing.num_frames == 0 and score.flow(nothing, x, 0.7, text).shape == x.shape


def test_a_score_pass_is_one_pass_over_both(net):
    """Remembering and then scoring equals attending to remembered frames in the sampler's own way."""
    score, text = Score(network_of(net)), random(1, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 3, 4, 6, seed=2), random(1, 16, 3, 4, 6, seed=3)
    with torch.no_grad():
        sampler = CausalSampler(network=score.network, text=score.network.embed_text(text))
        memory = sampler.commit(empty(sink=3, slow=0, fast=3), context)
        torch.testing.assert_close(
            score.flow(score.remember(context, text), x, 0.7, text),
            score.network.flow(x, 0.7, sampler.text, score.network.attend(sampler.view(memory), 3, memory.latent_size)),
        )


def test_texts_may_differ_from_chunk_to_chunk(net):
    score, texts = Score(network_of(net)), random(2, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 2, 4, 6, seed=2), random(1, 16, 6, 4, 6, seed=3)
    with torch.no_grad():
        flow = score.flow(score.remember(context, texts), x, 0.7, texts)
        other = score.flow(score.remember(context, texts.flip(0)), x, 0.7, texts)
        same = score.flow(score.remember(context, texts[:1].expand(2, -1, -1)), x, 0.7, texts)
    assert not torch.allclose(flow, other) and not torch.allclose(flow, same)


@pytest.mark.parametrize("sees", TEACHER_SEES)
@pytest.mark.parametrize("together", [0, 1])
def test_scores_are_given_exactly_what_the_student_remembers(tiny, sees, together):
    """All of the target what was remembered when it began, or every chunk what was remembered then."""
    settings = [f"teacher_sees={sees}", f"score_chunks={together}", "context_from=3", "memory.slow=2"]
    stage = DistillStage(load_config("contextual", "smoke", settings), ALONE)
    text = stage.prompts.text(0, 6)
    rolled = stage.roll(text, 4, 2, 1, 0, False)
    film = torch.cat(rolled.memory.latent_chunks, dim=2)
    pieces = list(rolled.windows(together or 2))
    assert torch.equal(torch.cat([target for _, target in pieces], dim=2), rolled.target_BCTHW)
    for chunk, (memory, target) in zip((4, 5) if together else (4,), pieces, strict=True):
        assert memory.num_frames == 3 * chunk and len(memory.slots.all) >= 6
        context, frame_text, target_text = stage.remembered(memory, target, text)
        frames = {"memory": memory.slots.all, "recent": tuple(range(3 * chunk - 3, 3 * chunk)), "nothing": ()}[sees]
        assert torch.equal(context, film[:, :, list(frames)])
        assert torch.equal(frame_text, text[[frame // 3 for frame in frames]])
        assert torch.equal(target_text, text[chunk : chunk + (together or 2)])


def test_a_target_scored_chunk_by_chunk_learns_the_mean_of_its_chunks(tiny, files):
    stage = DistillStage(load_config("contextual", "smoke", [*files, "score_chunks=1"]), ALONE)
    text = stage.prompts.text(0, 4)
    rolled = stage.roll(text, 2, 2, 1, 0, False)
    for name, score in (("student", stage.student_loss), ("critic", stage.critic_loss)):
        generator = seeded_generator(7)
        losses = [score(*piece, text, generator)[0] for piece in rolled.windows(1)]
        loss, _ = stage.loss(name, rolled, text, seeded_generator(7))
        torch.testing.assert_close(loss, sum(losses) / 2)
    with pytest.raises(ValueError, match="score_chunks"):
        load_config("contextual", "smoke", ["score_chunks=3"])


# The student's rollout


@pytest.mark.parametrize("exit_step", [0, 2])
def test_a_training_rollout_is_the_sampler_s_rollout(net, exit_step):
    student, noise = student_of(net), seeded_noise(3, (16, 4, 6))
    sampler = student.sampler(0)
    with torch.no_grad():
        *_, expected = sampler.rollout(empty(), 5, sigmas=SIGMAS, noise=noise)
    context = student.rollout(empty(), 3, SIGMAS, noise)
    rolled = student.target(context, 2, exit_step, SIGMAS, noise, with_gradient=False)
    assert torch.equal(torch.cat(rolled.memory.latent_chunks, 2), torch.cat(expected.latent_chunks, 2))
    assert rolled.memory.slots == expected.slots and rolled.contexts[0] is context
    last_step = torch.equal(rolled.target_BCTHW, torch.cat(rolled.memory.latent_chunks[3:], 2))
    assert last_step == (exit_step == len(SIGMAS) - 1)


def test_gradients_are_in_the_exit_step_only_and_change_nothing(learner):
    student, noise = student_of(learner), seeded_noise(3, (16, 4, 6))
    context = student.rollout(empty(), 3, SIGMAS, noise)
    plain = student.target(context, 2, 1, SIGMAS, noise, with_gradient=False)
    rolled = student.target(context, 2, 1, SIGMAS, noise, with_gradient=True)
    assert rolled.target_BCTHW.requires_grad and not plain.target_BCTHW.requires_grad
    assert torch.equal(rolled.target_BCTHW, plain.target_BCTHW)
    assert not any(frame.keys.requires_grad for frame in rolled.memory.store.frames.values())
    assert not any(part.requires_grad for part in rolled.memory.latent_chunks)
    rolled.target_BCTHW.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


def bytes_saved(student, context_chunks):
    """Bytes that the backward pass of a target keeps, weights not counted."""
    noise = seeded_noise(3, (16, 4, 6))
    context = student.rollout(empty(policy="uniform", uniform_stride=1), context_chunks, SIGMAS, noise)
    weights = {p.untyped_storage().data_ptr() for p in student.network.net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rolled = student.target(context, 2, 1, SIGMAS, noise, with_gradient=True)
    assert rolled.target_BCTHW.requires_grad
    return sum(size for size, _ in kept.values())


def test_memory_under_gradient_is_flat_in_rollout_length(learner):
    student = student_of(learner)
    full, long = bytes_saved(student, 8), bytes_saved(student, 40)
    assert full == long > 0


def test_recomputing_gives_the_same_gradients(learner):
    noise, grads = seeded_noise(3, (16, 4, 6)), []
    for recompute in (False, True):
        student = student_of(learner, num_texts=7, recompute=recompute)
        context = student.rollout(empty(), 5, SIGMAS, noise)
        rolled = student.target(context, 2, 1, SIGMAS, noise, with_gradient=True)
        rolled.target_BCTHW.square().mean().backward()
        grads.append([p.grad.clone() for p in learner.parameters()])
        learner.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_recomputing_saves_memory(learner):
    assert bytes_saved(student_of(learner, recompute=True), 8) < 0.6 * bytes_saved(student_of(learner), 8)


def test_a_view_laid_out_anew_is_the_same_view(net):
    student = student_of(net)
    memory = student.rollout(empty(), 5, SIGMAS, seeded_noise(3, (16, 4, 6)))
    sampler = student.sampler(0)
    eager, lazy = sampler.view(memory), sampler.view(memory, lazy=True)
    assert eager.num_frames == lazy.num_frames and len(lazy.keys) == len(eager.keys) == 2
    for kind in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(eager, kind), getattr(lazy, kind), strict=True))
    assert lazy.keys[0] is not lazy.keys[0], "nothing is kept"


# The loss


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_student_s_gradient_is_critic_minus_guided_teacher(tiny, files, guidance):
    stage = DistillStage(load_config("contextual", "smoke", [*files, f"guidance={guidance}"]), ALONE)
    torch.manual_seed(0)
    for p in stage.critic.network.net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    text = stage.prompts.text(0, 4)
    rolled = stage.roll(text, 2, 2, 1, 0, True)
    leaf = rolled.target_BCTHW.detach().requires_grad_()
    rolled = dataclasses.replace(rolled, target_BCTHW=leaf)
    loss, values = stage.loss("student", rolled, text, seeded_generator(7))
    loss.backward()
    context, frame_text, target_text = stage.remembered(rolled.contexts[0], leaf, text)
    sigma, _, x = stage.noised(leaf.detach(), seeded_generator(7))
    with torch.no_grad():
        fake = stage._x0(stage.critic, context, frame_text, target_text, x, sigma)
        real = stage._x0(stage.teacher, context, frame_text, target_text, x, sigma)
        blank = torch.zeros(1, 1, 4096)
        plain = stage._x0(stage.teacher, context, blank, blank, x, sigma)
        assert (real - plain).abs().mean() > 1e-3
        real = real + guidance * (real - plain)
    expected = (fake - real) / (leaf.detach() - real).abs().mean() / leaf.numel()
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-9)
    assert values["dmd_gradient"] > 0


def test_critic_and_teacher_are_asked_the_same(tiny, files, monkeypatch):
    """The critic begins as the teacher: nothing to learn, unless one were given another context or text."""
    stage = DistillStage(load_config("contextual", "smoke", [*files, "guidance=0.0"]), ALONE)
    text = stage.prompts.text(0, 4)
    rolled = stage.roll(text, 2, 2, 0, 0, True)
    loss, _ = stage.loss("student", rolled, text, seeded_generator(7))
    assert loss.item() < 1e-12
    remember = Score.remember
    monkeypatch.setattr(
        Score, "remember", lambda self, *given: remember(self, *given) if self is stage.critic else NOTHING
    )
    assert stage.loss("student", rolled, text, seeded_generator(7))[0].item() > 1e-6


def test_lengths_are_the_same_on_every_rank_and_grow(tiny):
    config = load_config("contextual", "smoke", ["context_from=2", "context_to=10", "context_ramp=100"])
    stages = [DistillStage(config, dataclasses.replace(ALONE, rank=rank, world_size=2)) for rank in (0, 1)]
    draws = [[stage.draw_lengths(step, False) for step in range(200)] for stage in stages]
    assert draws[0] == draws[1]
    early, late = [c for c, _, _ in draws[0][:20]], [c for c, _, _ in draws[0][100:]]
    assert max(early) <= 4 and max(late) == 10 and 0 in early
    assert {e for _, _, e in draws[0]} == {0, 1, 2, 3}
    assert {t for _, t, _ in draws[0]} == {1, 2}


# Killed and resumed


def same_tensors(path, other):
    """Whether two files hold the same, to the bit."""
    (a, _), (b, _) = read_safetensors(path), read_safetensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if k not in MACHINE_METRICS} for line in lines}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_killed_stage_resumes_to_the_same_network(tiny, tmp_path, monkeypatch, name, stop_at):
    monkeypatch.setattr("context_forcing.train.trained_network.HISTORY", 2)
    settings = ["steps=5", "batch=1", "sample_every=9"]
    if name == "teacher":
        settings += ["recycling.learn_clean_share=1.0", "recycling.share=1.0", "optim.ema_from=1", "plain_share=0.3"]
    elif name in ("local", "contextual"):
        settings += ["student_optim.ema_from=1", "critic_optim.spike=1.05"]
    run = lambda folder, resume: run_stage(name, "smoke", [*settings, f"out={tmp_path / folder}"], resume)
    whole = run("whole", False)
    cls = {"vae": VaeStage, "pretrain": PretrainStage, "teacher": TeacherStage}.get(name, DistillStage)
    step = cls.step

    def killed(self, number):
        if number == stop_at:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed", False)
    resumed = run("killed", True)
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert sorted(losses_of(tmp_path / "whole")) == [0, 1, 2, 3, 4]
    assert same_tensors(whole, resumed)
    if name != "vae":
        card = StudentSource(whole).open().card
        assert (card.stage, card.train_steps) == (name, 5)
    assert not list(tmp_path.rglob("*.part"))
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2


def test_a_fresh_run_does_not_overwrite_and_resume_wants_the_same_settings(tiny, tmp_path):
    out = f"out={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="no checkpoint"):
        run_stage("local", "smoke", [out], True)
    run_stage("local", "smoke", [out, "steps=1"], False)
    with pytest.raises(ValueError, match="holds a run already"):
        run_stage("local", "smoke", [out], False)
    with pytest.raises(ValueError, match="shift: 4.0 now, 3.0 when"):
        run_stage("local", "smoke", [out, "shift=4"], True)
    run_stage("local", "smoke", [out, "steps=2"], True)


def wait_for(path, lines=1, seconds=120):
    """Until a file has as many lines."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_kill_9_and_resume_give_the_same_curve(tmp_path, name):
    """As processes, killed between two checkpoints."""
    command = lambda folder: [sys.executable, "-m", "context_forcing.train", name, "--config", "smoke", "steps=12",
                              "checkpoint_every=3", "sample_every=99", f"out={tmp_path / folder}"]  # fmt: skip
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "log.jsonl", lines=5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(*command("killed"), "--resume")
    run(*command("whole"))
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    file = f"{STAGES[name]}.safetensors"
    assert same_tensors(tmp_path / "killed" / file, tmp_path / "whole" / file)


@pytest.mark.slow
def test_sigterm_checkpoints_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "context_forcing.train", "teacher", "--config", "smoke", "steps=10000",
               "checkpoint_every=10000", f"out={tmp_path}"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "log.jsonl")
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 0 and "--resume goes on" in words
    steps = len(losses_of(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert (tmp_path / "teacher.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "teacher", "contextual"])
def test_two_processes_equal_one(tmp_path, name):
    """The same global batch on one process and on two under torchrun (gloo, sharded)."""
    arguments = [name, "--config", "smoke", "steps=3", "batch=2", "sample_every=9"]
    arguments += {
        "pretrain": [],
        "teacher": ["optim.lr=0.01", "recycling.share=0.0"],  # each process has an error bank of its own
        "contextual": ["student_optim.lr=0.01", "critic_optim.lr=0.01", "critic_per_student=1"],
    }[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                   "-m", "context_forcing.train", *arguments, f"out={tmp_path / str(processes)}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert one.keys() == two.keys() == {0, 1, 2}
    assert one[0]["loss"] != one[2]["loss"]
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-4)
        assert one[step]["grad_norm"] == pytest.approx(two[step]["grad_norm"], rel=1e-3)
    file = f"{STAGES[name]}.safetensors"
    a, b = (StudentSource(tmp_path / run / file).open().load() for run in ("1", "2"))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4)


# Bad gradients, averages


def trainee_of(**settings):
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    return TrainedNetwork(net, OptimConfig(lr=0.1, **settings), ALONE)


def give(trainee, gradient):
    trainee.net.weight.grad = torch.full_like(trainee.net.weight, gradient)


def test_bad_gradients_are_not_applied():
    trainee = trainee_of(spike=5.0)
    for _ in range(HISTORY):
        give(trainee, 1.0)
        assert not trainee.update(1.0)["skipped"]
    before = trainee.net.weight.clone()
    for loss, gradient in ((float("nan"), 1.0), (1.0, float("inf")), (1.0, 100.0)):
        give(trainee, gradient)
        assert trainee.update(loss)["skipped"] and torch.equal(trainee.net.weight, before)
    give(trainee, 1.0)
    assert not trainee.update(1.0)["skipped"] and not torch.equal(trainee.net.weight, before)


def test_a_run_of_bad_gradients_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherStage, "loss", lambda self, memory, latents, *_: (
        self.score.network.net.head.head.bias.sum() * float("nan"), latents, 0.5, True))  # fmt: skip
    with pytest.raises(FloatingPointError, match="teacher: 3 updates in a row"):
        run_stage("teacher", "smoke", ["steps=9", "max_skipped=2", f"out={tmp_path}"], False)


def test_the_average_follows_the_weights():
    trainee = trainee_of(ema=0.5, ema_from=1, betas=(0.0, 0.999))
    path = [trainee.net.weight.clone()]
    for _ in range(3):
        give(trainee, 1.0)
        trainee.update(1.0)
        path.append(trainee.net.weight.detach().clone())
    expected = 0.25 * path[1] + 0.25 * path[2] + 0.5 * path[3]
    torch.testing.assert_close(trainee.weights()["weight"], expected.detach())


# Recycled errors


def test_the_bank_keeps_errors_by_noise_level_and_no_more_than_it_may():
    bank = ErrorBuffer(RecyclingConfig(bins=2, entries=4))
    assert bank.draw(5, seeded_generator(1)) is None
    for number in range(9):
        bank.add(0.2, torch.full((16, 6, 2, 2), float(number)), 3, seeded_generator(number))
    bank.add(0.9, torch.full((16, 3, 2, 2), 100.0), 3, seeded_generator(0))
    assert [len(held) for held in bank.bins] == [4, 1] and len(bank) == 5
    drawn = bank.draw(7, seeded_generator(5))
    assert drawn.shape == (16, 7, 2, 2) and torch.equal(drawn, bank.draw(7, seeded_generator(5)))
    again = ErrorBuffer(RecyclingConfig(bins=2, entries=4))
    again.load_state(bank.state())
    assert torch.equal(again.draw(7, seeded_generator(6)), bank.draw(7, seeded_generator(6)))


def test_spoilt_contexts_are_spoilt_and_clean_ones_are_not(tiny):
    stage = TeacherStage(load_config("teacher", "smoke", ["recycling.clean_share=0.5", "recycling.share=1.0"]), ALONE)
    context = random(1, 16, 6, 8, 16)
    assert torch.equal(stage.add_errors(context, seeded_generator(0))[0], context), "an empty bank spoils nothing"
    stage.errors.add(0.5, torch.ones(16, 3, 8, 16), 3, seeded_generator(0))
    outcomes = [stage.add_errors(context, seeded_generator(k)) for k in range(60)]
    spoilt = [made for made, clean in outcomes if not clean]
    assert 15 < len(spoilt) < 45 and all(torch.equal(made, context) for made, clean in outcomes if clean)
    assert all(torch.allclose(made[:, :, 1:], context[:, :, 1:] + 1) for made in spoilt)
    spared = sum(torch.equal(made[:, :, 0], context[:, :, 0]) for made in spoilt)
    assert 0 < spared < len(spoilt)


# What comes out


@pytest.mark.slow
def test_a_distilled_student_goes_straight_into_the_pipeline(tmp_path):
    path = run_stage("contextual", "smoke", ["steps=2", "batch=1", "memory=longlive", f"out={tmp_path}"], False)
    pipeline = Pipeline.load(StudentSource(path).open(), torch.device("cpu"), torch.float32)
    card = pipeline.card
    assert (card.solver, card.shift, card.steps) == ("renoise", 3.0, (1000.0, 750.0, 500.0, 250.0))
    assert (card.memory.sink, card.memory.slow, card.memory.fast, card.memory.window) == (3, 0, 9, 12)
    assert pipeline.empty_memory().config == card.memory


@pytest.mark.parametrize("device, words", [("tpu", "auto, cuda, cpu"), ("cuda", "not available")])
def test_devices_that_are_not_there_are_refused(device, words):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=words):
        start_parallel(device)


def test_a_batch_must_divide_over_the_processes():
    with pytest.raises(ValueError, match="batch: 3 samples"):
        dataclasses.replace(ALONE, world_size=2).samples(3)
    assert list(dataclasses.replace(ALONE, rank=1, world_size=2).samples(4)) == [1, 3]


def test_checkpoints_are_whole_or_not_there(tiny, tmp_path):
    stage = TeacherStage(load_config("teacher", "smoke"), ALONE)
    checkpoints = Checkpoints(tmp_path, stage, "teacher")
    checkpoints.save(3, 1.0, "r")
    (tmp_path / "checkpoints" / "step-00000009.part").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-00000003" and checkpoints.load()["step"] == 3


def test_a_network_of_any_layout_may_be_begun_from(tiny, files, tmp_path):
    plain = files[0].partition("=")[2]
    state, _ = read_safetensors(plain)
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "student.pt")
    config = load_config("contextual", "smoke")
    network, card = load_network(str(tmp_path / "student.pt"), config, ALONE, config.lora)
    assert card is None and all(torch.equal(tensor, state[name]) for name, tensor in network.net.state_dict().items())


def test_a_checkpoint_before_the_first_update_changes_nothing(tiny, files, tmp_path):
    """Adam counts its steps: an empty one, taken to have a state to save, must not be among them."""
    run = lambda folder, steps, resume: run_stage(
        "contextual", "smoke", [*files, f"steps={steps}", "batch=1", "critic_per_student=3", "checkpoint_every=1",
                                "sample_every=9", f"out={tmp_path / folder}"], resume,
    )  # fmt: skip
    whole = run("whole", 3, False)
    seldom = run_stage("contextual", "smoke", [*files, "steps=3", "batch=1", "critic_per_student=3",
                       "checkpoint_every=9", "sample_every=9", f"out={tmp_path / 'seldom'}"], False)  # fmt: skip
    run("parts", 1, False)
    parts = run("parts", 3, True)
    a, *others = (StudentSource(path).open().load().state_dict() for path in (whole, seldom, parts))
    assert all(torch.equal(a[key], other[key]) for key in a for other in others)


@pytest.mark.parametrize("was, now", [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused_only_where_banks_are(tiny, tmp_path, was, now):
    for number, bank in enumerate((False, True)):
        stage = TeacherStage(load_config("teacher", "smoke"), ALONE)
        if bank:
            stage.errors.add(0.5, torch.ones(16, 3, 8, 16), 3, seeded_generator(0))
        checkpoints = Checkpoints(tmp_path / str(number), stage, "teacher")
        checkpoints.save(3, 1.0, "r")
        path = newest_checkpoint(tmp_path / str(number))
        for rank in range(was):
            torch.save(stage.extra_state(), path / f"rank{rank}.pt")
        run = json.loads((path / "run.json").read_text()) | {"world_size": was}
        (path / "run.json").write_text(json.dumps(run))
        checkpoints.parallel = dataclasses.replace(ALONE, world_size=now)
        if bank:
            with pytest.raises(ValueError, match=f"written by {was} processes"):
                checkpoints.load()
            assert checkpoints.load(extra_state=False)["step"] == 3
        else:
            assert checkpoints.load()["step"] == 3


def test_a_teacher_learns_without_a_context_too(tiny, tmp_path):
    run_stage("teacher", "smoke", ["steps=2", "plain_share=1.0", f"out={tmp_path}"], False)
    assert [line["remembered"] for line in losses_of(tmp_path).values()] == [0, 0]


def test_a_teacher_is_exported_from_its_checkpoint(tiny, tmp_path):
    run = run_stage("teacher", "smoke", ["steps=2", f"out={tmp_path / 'run'}"], False)
    again = run_stage("export", "demo", [f"run={tmp_path / 'run'}", f"out={tmp_path / 'other'}"], False)
    first, second = StudentSource(run).open(), StudentSource(again).open()
    a, b, card, card_again = first.load(), second.load(), first.card, second.card
    assert card == card_again
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_an_error_that_is_not_a_number_stays_out_of_the_bank(tiny, monkeypatch):
    stage = TeacherStage(load_config("teacher", "smoke", ["recycling.learn_clean_share=1.0"]), ALONE)
    loss = TeacherStage.loss
    broken = lambda self, *given: (
        loss(self, *given)[0] * float("nan"),
        torch.full((1, 16, 6, 8, 16), float("nan")),
        0.5,
        True,
    )
    with monkeypatch.context() as patch:
        patch.setattr(TeacherStage, "loss", broken)
        assert stage.step(0)["skipped"]
    assert len(stage.errors) == 0
    assert not stage.step(1)["skipped"] and len(stage.errors) > 0


def test_a_resumed_run_may_learn_more_slowly(tiny, tmp_path):
    run_stage("local", "smoke", ["steps=1", f"out={tmp_path}"], False)
    run_stage("local", "smoke", ["steps=2", "student_optim.lr=1e-7", "max_skipped=3", f"out={tmp_path}"], True)
    with pytest.raises(ValueError, match="student_optim"):
        run_stage("local", "smoke", ["steps=3", "student_optim.ema=0.5", f"out={tmp_path}"], True)


@pytest.mark.parametrize(
    "stage, overrides, words",
    [
        ("contextual", ["precision=bf16"], "precision: one process on the CPU"),
        ("teacher", ["seed=-1"], "seed: -1"),
        ("teacher", ["memory=goldfish"], "memory: 'goldfish' is not one of slow-fast"),
        ("teacher", ["memory.slow=24"], "do not fit in the window"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(tiny, stage, overrides, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run_stage(stage, "smoke", [*overrides, f"out={tmp_path}"], False)


def test_settings_that_only_fit_together_are_taken_together():
    config = load_config(
        "contextual", "smoke", ["memory.slow=24", "memory.window=33", "target_from=9", "target_chunks=9"]
    )
    assert (config.memory.slow, config.memory.window, config.target_from) == (24, 33, 9)


# Adapters


@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_adapters_begin_with_nothing_and_export_merged_and_alone(tiny, files, tmp_path, alpha):
    whole = files[1].partition("=")[2]
    settings = ["steps=3", "lora.rank=4", f"lora.alpha={alpha}", f"init={whole}", f"out={tmp_path / 'lora'}"]
    stage = TeacherStage(load_config("teacher", "smoke", settings), ALONE)
    assert all(".lora_" in name for name, _ in stage.trained["teacher"].parameters())
    latents, text = stage.clips.sample(0)
    begun = WanModel(TINY)
    begun.load_state_dict(read_safetensors(whole)[0])
    flow = lambda net: Score(network_of(net)).flow(NOTHING, latents[:, :, :6], 0.5, text[:2])
    with torch.no_grad():
        assert flow(begun).abs().mean() > 0.1
        torch.testing.assert_close(flow(stage.score.network.net), flow(begun))

    path = run_stage("teacher", "smoke", settings, False)
    merged = StudentSource(path).open().load()
    adapters, metadata = read_safetensors(path.with_name("teacher_lora.safetensors"))
    assert StudentFile(StudentSource(path.with_name("teacher_lora.safetensors"))).card.stage == "teacher" and metadata
    by_hand = {name: value.clone() for name, value in begun.state_dict().items()}
    for name in [name.removesuffix(".lora_A.weight") for name in adapters if name.endswith("lora_A.weight")]:
        down, up = adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
        scale = adapters[f"{name}.alpha"] / down.shape[0]
        assert scale == (alpha or 4) / 4 and up.abs().sum() > 0
        by_hand[name.removeprefix("diffusion_model.") + ".weight"] += scale * up @ down
    assert len(adapters) == 3 * 10 * TINY.num_layers
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, by_hand[name])


def test_adapters_resume_alike(tiny, tmp_path):
    run = lambda folder, steps, resume: run_stage(
        "local", "smoke", [f"steps={steps}", "batch=1", "lora.rank=2", "sample_every=9", f"out={tmp_path / folder}"], resume
    )  # fmt: skip
    whole = run("whole", 4, False)
    run("parts", 2, False)
    parts = run("parts", 4, True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    a, b = StudentSource(whole).open().load(), StudentSource(parts).open().load()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_an_adapter_target_that_is_not_there_is_refused(tiny):
    with pytest.raises(ValueError, match="targets: 'self_attn.w' names no linear layer"):
        TeacherStage(load_config("teacher", "smoke", ["lora.rank=2", "lora.targets=[self_attn.w]"]), ALONE)


def test_export_writes_what_the_run_wrote(tiny, tmp_path):
    run = run_stage("local", "smoke", ["steps=2", "batch=1", "memory=longlive", f"out={tmp_path / 'run'}"], False)
    again = run_stage("export", "demo", [f"run={tmp_path / 'run'}", f"out={tmp_path / 'other'}"], False)
    first, second = StudentSource(run).open(), StudentSource(again).open()
    a, b, card, card_again = first.load(), second.load(), first.card, second.card
    assert again.parent == tmp_path / "other" and card == card_again
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run_stage("export", "demo", [f"run={tmp_path / 'nothing'}"], False)


# Encoded sets


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A set of four clips of 12 latent frames, and one of three prompts, as `context-forcing encode` writes them."""
    from context_forcing.train.data.shards import Header, ShardWriter

    root = tmp_path_factory.mktemp("sets")
    common = dict(source="made up", model="demo", text_encoder="demo", dtype="fp16")
    clips = ShardWriter(
        root / "clips", Header(**common, vae="demo", fps=16, size=(128, 64), frames=12), 2**20
    )  # fmt: skip
    prompts = ShardWriter(root / "prompts", Header(**common, vae=None), 2**20)
    for number, writer in enumerate([clips] * 4 + [prompts] * 3):
        tensors = {"text": random(3, 4096, seed=number).half()}
        if writer is clips:
            tensors["latents"] = random(16, 12, 8, 16, seed=number).half()
        writer.add(f"source {number}", None, "words", tensors)
    for writer in (clips, prompts):
        writer.write_empty_text(torch.zeros(1, 4096).half())
        writer.flush()
    return root


@pytest.mark.parametrize("name, data", [("teacher", "clips"), ("contextual", "prompts"), ("contextual", "clips")])
def test_stages_learn_from_encoded_sets(tiny, tmp_path, encoded, name, data):
    path = run_stage(
        name, "smoke", ["steps=2", f"data={encoded / data}", "sample_every=1", f"out={tmp_path}"], False
    )  # fmt: skip
    assert "made up" in StudentSource(path).open().card.data and len(losses_of(tmp_path)) == 2
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "data, overrides, words",
    [
        ("prompts", [], "holds prompts only"),
        ("clips", ["num_chunks=9"], "27 are needed"),
        ("clips", ["size=[256,128]"], "was encoded at"),
        ("nothing", [], "manifest"),
        ("", ["data="], "data: "),
    ],
)
def test_sets_that_do_not_fit_are_refused(tiny, encoded, data, overrides, words):
    with pytest.raises(ValueError, match=words):
        TeacherStage(load_config("teacher", "smoke", [f"data={encoded / data}", *overrides]), ALONE)
