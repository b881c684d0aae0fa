"""Students from files in a real ComfyUI: every layout and loader, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.model.checkpoints.student import DEMO_STUDENT
from context_forcing.model.config import WanConfig
from context_forcing.model.wan import WanModel

from ..model.checkpoints.published import diffusers, quantise
from .graph import CHUNK_FRAMES, failure, latents, succeeded

pytestmark = [pytest.mark.host, pytest.mark.slow]


def test_the_list_of_students_follows_the_folder(host):
    def students():
        info = host.get("/object_info/ContextForcingLoadStudent")["ContextForcingLoadStudent"]
        return info["input"]["required"]["student"][1]["options"]

    before = students()
    host.add_model("diffusion_models", DEMO_STUDENT, "added_later.safetensors")
    assert students() == sorted([*before, "added_later.safetensors"])


def test_a_model_that_is_not_wan_is_named(host, graph, demo, tmp_path):
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "caption_channels": 64}
    weights = {"adaln_single.emb.timestep_embedder.linear_1.bias": torch.zeros(64)}
    weights["transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(64, 64)
    save_file(weights, tmp_path / "other.safetensors", {"config": json.dumps({"transformer": config})})
    host.add_model("diffusion_models", tmp_path / "other.safetensors")

    other = graph.add("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    sampler = graph.sampler(other, graph.text(demo), graph.memory(demo))
    graph.save(sampler)
    error = failure(host, graph)
    assert error["node_id"] == sampler
    for words in ("model: LTXV", "is not Wan 2.1 text-to-video", "load a Wan 2.1 text-to-video student"):
        assert words in error["exception_message"]


def test_a_file_that_is_no_student_is_named(host, graph, tmp_path):
    save_file({"decoder.conv1.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    host.add_model("diffusion_models", tmp_path / "vae.safetensors")
    student = graph.add("ContextForcingLoadStudent", student="vae.safetensors")
    graph.add("PreviewAny", source=[student, 0])
    error = failure(host, graph)
    assert error["node_id"] == student
    assert "vae.safetensors: a VAE" in error["exception_message"] and "\n" not in error["exception_message"].strip()


def test_published_layouts_make_the_same_latents(host, graph, demo, tmp_path):
    """A training checkpoint, diffusers' names and a plain file, with heads that ComfyUI guesses: one student.

    Two steps with the framewise card's chunk of one. ComfyUI reads the plain file itself.
    """
    net = WanModel(WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2))
    net.reset_parameters(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    state = net.state_dict()
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}
    other = {f"model.{name}": -tensor for name, tensor in state.items()}
    torch.save({"generator": other, "generator_ema": wrapped}, tmp_path / "published.pt")
    save_file(diffusers(state), tmp_path / "diffusers.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    save_file(quantise(state, "old")[0], tmp_path / "scaled.safetensors")
    text, saved = graph.text(demo), []
    for name, choice in (
        ("published.pt", {}), ("diffusers.safetensors", {}), ("plain.safetensors", {}),
        ("published.pt", {"weights": "generator"}), ("scaled.safetensors", {}),
    ):  # fmt: skip
        host.add_model("diffusion_models", tmp_path / name)
        model = graph.add("ContextForcingLoadStudent", student=name, card="causal-forcing-2step", **choice)
        saved.append(graph.save(graph.sampler(model, text, graph.memory(model, width=64, height=32), seconds=0.5)))
    run = succeeded(host.run(graph.prompt))
    results = [latents(host, run, node) for node in saved]
    assert results[0].shape == (1, 16, 2, 4, 8) and results[0].isfinite().all()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])
    assert 0 < (results[4] - results[0]).norm() < 0.1 * results[0].norm(), "scaled float8, read by ComfyUI"


def test_loaders_of_one_file_make_the_same_latents(host, graph, demo):
    host.add_model("diffusion_models", DEMO_STUDENT)
    student = graph.add("ContextForcingLoadStudent", student=DEMO_STUDENT.name)
    text = graph.text(demo)
    saved = [graph.save(graph.sampler(model, text, graph.memory(model), seed=14)) for model in (demo, student)]
    run = succeeded(host.run(graph.prompt))
    built_in, loaded = (latents(host, run, node) for node in saved)
    assert torch.equal(built_in, loaded)


def test_the_stock_loader_works_without_a_card(host, graph, demo):
    host.add_model("diffusion_models", DEMO_STUDENT)
    model = graph.add("UNETLoader", unet_name=DEMO_STUDENT.name, weight_dtype="default")
    memory = graph.memory(model, width=128, height=64)
    saved = graph.save(graph.sampler(model, graph.text(demo), memory, seed=15))
    result = latents(host, succeeded(host.run(graph.prompt)), saved)
    assert result.shape == (1, 16, CHUNK_FRAMES, 8, 16) and result.isfinite().all()
