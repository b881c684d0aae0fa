"""Distillation: the inputs of the scores, the losses, the lengths of rollouts."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.config import PRESETS, WanConfig
from context_forcing.model.sampler import seeded_generator
from context_forcing.model.segment import used_rows
from context_forcing.train import parallel, run_stage
from context_forcing.train.presets import load_config
from context_forcing.train.stages import distill
from context_forcing.train.stages.distill import TEACHER_SEES, DistillStage, x0_given_context
from context_forcing.train.stages.student import Student
from context_forcing.video.pipeline import Pipeline

from .helpers import ALONE, TINY


@pytest.mark.parametrize("sees", TEACHER_SEES)
@pytest.mark.parametrize("together", [0, 1])
def test_scores_get_what_the_student_remembers(tiny, sees, together):
    """The whole target is scored with the memory before it, or every chunk with the memory before the chunk."""
    settings = [f"teacher_sees={sees}", f"score_chunks={together}", "context_from=3", "memory.slow=2"]
    stage = DistillStage(load_config("contextual", "smoke", settings), ALONE)
    text = stage.prompts.text(0, 6)
    rollout = stage.rollout(text, 4, 2, 1, 0, False)
    film = torch.cat(rollout.memory.latent_chunks, dim=2)
    pieces = list(rollout.pieces(together or 2))
    assert torch.equal(torch.cat([piece.target_BCTHW for piece in pieces], dim=2), rollout.target_BCTHW)
    for chunk, (memory, target, _) in zip((4, 5) if together else (4,), pieces, strict=True):
        assert memory.num_frames == 3 * chunk and len(memory.slots.all) >= 6
        context, context_text, target_text = stage.score_inputs(memory, target, text)
        frames = {"memory": memory.slots.all, "recent": tuple(range(3 * chunk - 3, 3 * chunk)), "nothing": ()}[sees]
        assert torch.equal(context, film[:, :, list(frames)])
        assert torch.equal(context_text, text[[frame // 3 for frame in frames]])
        assert torch.equal(target_text, text[chunk : chunk + (together or 2)])


def test_the_loss_of_a_target_scored_by_chunk_is_the_mean_of_its_chunks(tiny, files):
    stage = DistillStage(load_config("contextual", "smoke", [*files, "score_chunks=1"]), ALONE)
    text = stage.prompts.text(0, 4)
    rollout = stage.rollout(text, 2, 2, 1, 0, False)
    for name, score in (("student", stage.student_loss), ("critic", stage.critic_loss)):
        generator = seeded_generator(7)
        losses = [score(piece, text, generator)[0] for piece in rollout.pieces(1)]
        loss, _ = stage.loss(name, rollout, text, seeded_generator(7))
        torch.testing.assert_close(loss, sum(losses) / 2)
    with pytest.raises(ValueError, match="score_chunks"):
        load_config("contextual", "smoke", ["score_chunks=3"])


def test_the_student_is_trained_with_the_commit_pass_on_its_card(tiny, files, monkeypatch):
    made = []
    monkeypatch.setattr(distill, "Student", lambda *args: made.append(Student(*args)) or made[-1])
    stage = DistillStage(load_config("contextual", "smoke", [*files, "commit_attends=no sink"]), ALONE)
    films = [stage.rollout(stage.prompts.text(0, 6), 4, 2, 1, 0, False).memory]
    assert stage.card().commit_attends == made[0].commit_attends == "no sink"
    other = DistillStage(load_config("contextual", "smoke", [*files]), ALONE)
    films.append(other.rollout(other.prompts.text(0, 6), 4, 2, 1, 0, False).memory)
    assert other.card().commit_attends == "all"
    assert not torch.equal(*(torch.cat(memory.latent_chunks, dim=2) for memory in films))
    with pytest.raises(ValueError, match="^commit_attends: 'sink' is not one of all"):
        load_config("contextual", "smoke", ["commit_attends=sink"])


@pytest.mark.parametrize("guidance, negative", [(0.0, ""), (3.0, ""), (3.0, "snow at night")])
def test_the_student_s_gradient_is_critic_minus_guided_teacher(tiny, files, guidance, negative):
    settings = [*files, f"guidance={guidance}", f"negative_prompt={negative}"]
    stage = DistillStage(load_config("contextual", "smoke", settings), ALONE)
    torch.manual_seed(0)
    for p in stage.critic.net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    text = stage.prompts.text(0, 4)
    rollout = stage.rollout(text, 2, 2, 1, 0, True)
    leaf = rollout.target_BCTHW.detach().requires_grad_()
    rollout = dataclasses.replace(rollout, target_BCTHW=leaf)
    loss, values = stage.loss("student", rollout, text, seeded_generator(7))
    loss.backward()
    context, context_text, target_text = stage.score_inputs(rollout.contexts[0], leaf, text)
    sigma, _, x = stage.noised_target(leaf.detach(), seeded_generator(7))
    with torch.no_grad():
        fake = x0_given_context(stage.critic, context, context_text, x, sigma, target_text)
        real = x0_given_context(stage.teacher, context, context_text, x, sigma, target_text)
        unwanted_text = used_rows(encode_demo_text(negative)) if negative else torch.zeros(1, 1, 4096)
        unwanted = x0_given_context(stage.teacher, context, unwanted_text, x, sigma, unwanted_text)
        assert (real - unwanted).abs().mean() > 1e-3
        real = real + guidance * (real - unwanted)
    expected = (fake - real) / (leaf.detach() - real).abs().mean() / leaf.numel()
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-9)
    assert values["dmd_gradient"] > 0


def test_critic_and_teacher_get_the_same_inputs(tiny, files, monkeypatch):
    """The critic starts as the teacher, so the loss is zero until one of them gets another context."""
    stage = DistillStage(load_config("contextual", "smoke", [*files, "guidance=0.0"]), ALONE)
    text = stage.prompts.text(0, 4)
    rollout = stage.rollout(text, 2, 2, 0, 0, True)
    loss, _ = stage.loss("student", rollout, text, seeded_generator(7))
    assert loss.item() < 1e-12
    score = distill.flow_given_context
    without_context = lambda network, context, *inputs: score(
        network, context if network is stage.critic else context[:, :, :0], *inputs
    )
    monkeypatch.setattr(distill, "flow_given_context", without_context)
    assert stage.loss("student", rollout, text, seeded_generator(7))[0].item() > 1e-6


def test_lengths_are_the_same_on_every_rank_and_grow(tiny):
    config = load_config("contextual", "smoke", ["context_from=2", "context_to=10", "context_ramp=100"])
    stages = [DistillStage(config, dataclasses.replace(ALONE, rank=rank, world_size=2)) for rank in (0, 1)]
    draws = [[stage.draw_lengths(step, False) for step in range(200)] for stage in stages]
    assert draws[0] == draws[1]
    early, late = [c for c, _, _ in draws[0][:20]], [c for c, _, _ in draws[0][100:]]
    assert max(early) <= 4 and max(late) == 10 and 0 in early
    assert {e for _, _, e in draws[0]} == {0, 1, 2, 3}
    assert {t for _, t, _ in draws[0]} == {1, 2}


@pytest.mark.slow
def test_a_distilled_student_goes_straight_into_the_pipeline(tmp_path):
    path = run_stage("contextual", "smoke", ["steps=2", "batch=1", "memory=longlive", f"out={tmp_path}"], False)
    pipeline = Pipeline.load(StudentSource(path).open(), torch.device("cpu"), torch.float32)
    card = pipeline.card
    assert (card.solver, card.shift, card.steps) == ("renoise", 3.0, (1000.0, 750.0, 500.0, 250.0))
    assert (card.memory.sink, card.memory.slow, card.memory.fast, card.memory.window) == (3, 0, 9, 12)
    assert pipeline.empty_memory().config == card.memory


def test_teacher_and_critic_can_have_another_size(monkeypatch, tmp_path, make_net):
    """A large teacher of a small student: both score, both learn, and the student's file has the student's size."""
    text = dict(text_dim=4096, text_len=512)
    large, name_14b = dict(dim=64, ffn_dim=96, num_heads=2, num_layers=3, **text), "wan2.1-14b"
    monkeypatch.setitem(PRESETS, "wan2.1-1.3b", TINY)
    monkeypatch.setitem(PRESETS, name_14b, WanConfig(**large))
    paths = {}
    for seed, (name, sizes) in enumerate({"student": dict(vars(TINY)), "teacher": large}.items()):
        paths[name] = tmp_path / f"{name}.safetensors"
        state = make_net(seed, **sizes).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, paths[name])
    settings = [
        "preset=wan2.1-1.3b", *(f"{name}={path}" for name, path in paths.items()), f"out={tmp_path / 'run'}", "steps=2",
        "critic_per_student=1", "guidance=3", f"teacher_preset={name_14b}", "precision=fp32", "lora.rank=0",
    ]  # fmt: skip
    config = load_config("contextual", "smoke", settings)
    stage = DistillStage(config, ALONE)
    assert {stage.teacher.net.config, stage.critic.net.config} == {WanConfig(**large)}
    assert stage.student.net.config == TINY
    before = {name: trained.weights() for name, trained in stage.trained.items()}
    stage.step(0)
    for name, trained in stage.trained.items():
        assert any(not torch.equal(before[name][key], value) for key, value in trained.weights().items())
    path = run_stage("contextual", "smoke", settings, False)
    assert StudentSource(path).open().load().config.num_layers == TINY.num_layers
    with pytest.raises(ValueError, match="student.safetensors"):
        DistillStage(dataclasses.replace(config, teacher=str(paths["student"])), ALONE)


@pytest.mark.parametrize("preset", ["demo", "huge"])
def test_a_teacher_of_another_kind_is_refused(preset):
    with pytest.raises(ValueError, match=f"teacher_preset: '?{preset}"):
        load_config("contextual", "wan2.1-1.3b", [f"teacher_preset={preset}"])


def test_weights_of_one_network_are_gathered_at_a_time(tiny, monkeypatch):
    """Before each pass and each backward pass the weights of the other networks are freed, of every rank alike."""
    stage, freed = DistillStage(load_config("contextual", "smoke", ["guidance=3", "steps=4"]), ALONE), []
    names = {id(getattr(stage, name).net): name for name in ("student", "critic", "teacher")}
    monkeypatch.setattr(parallel, "reshard", lambda net: freed.append(names[id(net)]))
    stage.step(0)
    # Two samples: the rollout, then the critic; the critic stays gathered for its backward pass.
    assert freed == ["student", "critic", "student"]
    freed.clear()
    stage._update(1, "student")
    # Rollout, critic, teacher, and the student's backward pass.
    assert freed == ["critic", "student", "critic", "teacher", "student", "critic", "teacher"]


@pytest.mark.parametrize("stage", ["local", "contextual"])
def test_policy_recall_is_refused(stage):
    with pytest.raises(ValueError, match="memory.policy: recall .* train with novel"):
        load_config(stage, "smoke", ["memory.policy=recall"])
