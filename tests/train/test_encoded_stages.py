"""Stages that train on encoded sets."""

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.train import run_stage
from context_forcing.train.data.manifest import Header
from context_forcing.train.data.shards import ShardWriter
from context_forcing.train.presets import load_config
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.teacher import TeacherStage

from .helpers import ALONE, metrics_of, random


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A set of four clips of 12 latent frames, and one of three prompts, in the format of `context-forcing encode`."""
    root = tmp_path_factory.mktemp("sets")
    common = dict(source="made up", model="demo", text_encoder="demo", dtype="fp16")
    clips = ShardWriter(root / "clips", Header(**common, vae="demo", fps=16, size=(128, 64), frames=12), 2**20)
    prompts = ShardWriter(root / "prompts", Header(**common, vae=None), 2**20)
    for number, writer in enumerate([clips] * 4 + [prompts] * 3):
        tensors = {"text": random(3, 4096, seed=number).half()}
        if writer is clips:
            tensors["latents"] = random(16, 12, 8, 16, seed=number).half()
        writer.add(f"source {number}", None, "words", tensors)
    for writer in (clips, prompts):
        writer.write_empty_text(lambda: torch.zeros(1, 4096).half())
        writer.write_negative_text("ugly, blurred", lambda: random(2, 4096, seed=9).half())
        writer.flush()
    return root


@pytest.mark.parametrize("name, data", [("teacher", "clips"), ("contextual", "prompts"), ("contextual", "clips")])
def test_stages_train_on_encoded_sets(tiny, tmp_path, encoded, name, data):
    settings = ["steps=2", f"data={encoded / data}", "sample_every=1", f"out={tmp_path}"]
    path = run_stage(name, "smoke", settings, False)
    assert "made up" in StudentSource(path).open().card.data and len(metrics_of(tmp_path)) == 2
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("data", ["clips", "prompts"])
def test_guidance_takes_the_negative_prompt_of_the_set(tiny, encoded, data):
    make = lambda *more: DistillStage(load_config("contextual", "smoke", [f"data={encoded / data}", *more]), ALONE)
    of_set = make("guidance=3", "negative_prompt=ugly, blurred").negative
    assert torch.equal(of_set, random(2, 4096, seed=9).half().float()[None])
    assert torch.equal(make("guidance=3").negative, torch.zeros(1, 1, 4096))
    assert make("guidance=0", "negative_prompt=ugly").negative is None, "not read where it is not used"
    with pytest.raises(ValueError, match="^negative_prompt: 'ugly' is not in .* with --negative-prompt"):
        make("guidance=3", "negative_prompt=ugly")


def test_the_anchor_needs_clips(tiny, tmp_path, encoded):
    settings = ["steps=2", "sample_every=9", "anchor.weight=0.5", "anchor.chunks=4", "anchor.batch=1"]
    run_stage("contextual", "smoke", [*settings, f"data={encoded / 'clips'}", f"out={tmp_path}"], False)
    assert metrics_of(tmp_path)[1]["student_anchor"] > 0
    with pytest.raises(ValueError, match="holds prompts only"):
        run_stage("contextual", "smoke", [*settings, f"data={encoded / 'prompts'}", f"out={tmp_path / 'other'}"], False)


@pytest.mark.parametrize(
    "data, overrides, message",
    [
        ("prompts", [], "holds prompts only"),
        ("clips", ["num_chunks=9"], "27 are needed"),
        ("clips", ["size=[256,128]"], "was encoded at"),
        ("nothing", [], "manifest"),
        ("", ["data="], "data: "),
    ],
)
def test_sets_that_do_not_fit_are_refused(tiny, encoded, data, overrides, message):
    with pytest.raises(ValueError, match=message):
        TeacherStage(load_config("teacher", "smoke", [f"data={encoded / data}", *overrides]), ALONE)
