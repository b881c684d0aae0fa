"""A student with weights of its own for the commit pass (SGF+) in ComfyUI's MODEL."""

import comfy.model_management as mm
import pytest
import torch
from bench import ROUNDING, SIZES, difference
from test_lora import STRENGTH, Lora, with_lora

from context_forcing.nodes.loaders import ContextForcingLoadStudent
from context_forcing.nodes.model_access import COMMIT


@pytest.fixture
def second(bench):
    return bench.make_net(1, **SIZES).state_dict()


@pytest.fixture
def model(bench, second):
    """Of a file with the names of SGF+."""
    part = lambda name: f"memory_{name}"
    inside = lambda name: ".".join([*name.split(".")[:-1], part(name.split(".")[-1])])
    twins = {(inside if name.startswith("blocks.") else part)(name): second[name] for name in second}
    name = bench.save("sgf_plus.safetensors", bench.state | twins)
    return ContextForcingLoadStudent.execute(name, card="self-forcing").result[0]


def test_the_second_set_computes_the_commit_pass(bench, second, model):
    expected, memory = bench.headless(bench.state, commit=second)
    latents, after = bench.run(model)
    assert difference(latents, expected) < ROUNDING < 1e-2 < difference(latents, bench.plain)
    assert after.memory.student == memory.student != bench.student


def test_a_lora_changes_denoising_only(bench, second, model):
    lora = Lora(bench, 1)
    expected, _ = bench.headless(lora.merged(bench.state, STRENGTH), commit=second)
    patched = with_lora(bench, model, lora.in_layout("diffusion_model.", "lora_A", "lora_B"))
    latents, _ = bench.run(patched)
    assert difference(latents, expected) < ROUNDING


def test_both_are_loaded_together(bench, model, monkeypatch):
    asked, load = [], mm.load_models_gpu
    monkeypatch.setattr(
        mm, "load_models_gpu", lambda models, **options: (asked.extend(models), load(models, **options))
    )
    bench.run(model, chunks=1)
    assert asked == [model, *model.get_additional_models_with_key(COMMIT)] and len(asked) == 2


def test_it_is_loaded_again_for_another_device(bench, model):
    load, arguments = model.get_additional_models_with_key(COMMIT)[0].cached_patcher_init
    weight = lambda patcher: patcher.model.diffusion_model.blocks[0].ffn[0].weight
    assert torch.equal(weight(load(*arguments)), weight(model.get_additional_models_with_key(COMMIT)[0]))
