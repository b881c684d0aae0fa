"""Adapters: they start at zero, resume, and are exported merged and alone."""

import pytest
import torch

from context_forcing.model.checkpoints.containers import read_safetensors
from context_forcing.model.checkpoints.student import StudentFile, StudentSource
from context_forcing.model.wan import WanModel
from context_forcing.train import run_stage
from context_forcing.train.presets import load_config
from context_forcing.train.stages.score import flow_given_context
from context_forcing.train.stages.teacher import TeacherStage

from .helpers import ALONE, TINY, metrics_of, network_of, same_tensors


@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_adapters_start_at_zero_and_are_exported_merged_and_alone(tiny, files, tmp_path, alpha):
    whole = files[1].partition("=")[2]
    settings = ["steps=3", "lora.rank=4", f"lora.alpha={alpha}", f"init={whole}", f"out={tmp_path / 'lora'}"]
    stage = TeacherStage(load_config("teacher", "smoke", settings), ALONE)
    assert all(".lora_" in name for name, _ in stage.trained["teacher"].parameters())
    latents, text = stage.clips.sample(0)
    base = WanModel(TINY)
    base.load_state_dict(read_safetensors(whole)[0])
    flow = lambda net: flow_given_context(
        network_of(net), latents[:, :, :0], text[:0], latents[:, :, :6], 0.5, text[:2]
    )
    with torch.no_grad():
        assert flow(base).abs().mean() > 0.1
        torch.testing.assert_close(flow(stage.network.net), flow(base))

    path = run_stage("teacher", "smoke", settings, False)
    merged = StudentSource(path).open().load()
    adapters, metadata = read_safetensors(path.with_name("teacher_lora.safetensors"))
    assert StudentFile(StudentSource(path.with_name("teacher_lora.safetensors"))).card.stage == "teacher" and metadata
    by_hand = {name: value.clone() for name, value in base.state_dict().items()}
    for name in [name.removesuffix(".lora_A.weight") for name in adapters if name.endswith("lora_A.weight")]:
        down, up = adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
        scale = adapters[f"{name}.alpha"] / down.shape[0]
        assert scale == (alpha or 4) / 4 and up.abs().sum() > 0
        by_hand[name.removeprefix("diffusion_model.") + ".weight"] += scale * up @ down
    assert len(adapters) == 3 * 10 * TINY.num_layers
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, by_hand[name])


def test_adapters_resume_with_the_same_result(tiny, tmp_path):
    settings = ["batch=1", "lora.rank=2", "sample_every=9"]
    run = lambda folder, steps, resume: run_stage(
        "local", "smoke", [*settings, f"steps={steps}", f"out={tmp_path / folder}"], resume
    )
    whole = run("whole", 4, False)
    run("parts", 2, False)
    parts = run("parts", 4, True)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole") and same_tensors(whole, parts)


def test_an_unknown_adapter_target_is_refused(tiny):
    with pytest.raises(ValueError, match="targets: 'self_attn.w' names no linear layer"):
        TeacherStage(load_config("teacher", "smoke", ["lora.rank=2", "lora.targets=[self_attn.w]"]), ALONE)
