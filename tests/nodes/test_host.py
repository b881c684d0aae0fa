"""The nodes in a real ComfyUI, as its page would use them."""

import io
import json
import subprocess
import sys

import imageio_ffmpeg
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from context_forcing.model.checkpoints.student import DEMO_STUDENT, StudentSource
from context_forcing.model.codecs.base import normalise
from context_forcing.model.config import WanConfig
from context_forcing.model.wan import WanModel
from context_forcing.video.mp4 import default_scale

from ..model.checkpoints.published import diffusers, quantise
from .graph import CHUNK_FRAMES, CHUNK_SECONDS, PROMPTS, Graph, failure, latents, nodes, only, succeeded
from .host import NODE_IDS, PACK

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_node_is_described(object_info, node_id):
    info = object_info[node_id]
    assert info["category"] == "Context Forcing"
    assert info["display_name"] and info["display_name"] != node_id
    assert len(info["description"]) > 20
    assert info["python_module"] == f"custom_nodes.{PACK}"
    for part in ("required", "optional"):
        for name, (_, *options) in info["input"].get(part, {}).items():
            assert options and options[0].get("tooltip"), f"{node_id}.{name} has no tooltip"
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_page_is_served(host, node_id):
    page = host.get_bytes(f"/extensions/{PACK}/docs/{node_id}.md").decode()
    assert page.startswith("# ") and len(page) > 200


def test_student_list_follows_the_folder(host, object_info):
    def students():
        info = host.get("/object_info/ContextForcingLoadStudent")["ContextForcingLoadStudent"]
        return info["input"]["required"]["student"][1]["options"]

    before = students()
    host.add_model("diffusion_models", DEMO_STUDENT, "added_later.safetensors")
    assert students() == sorted([*before, "added_later.safetensors"])


def test_demo_chain_makes_the_video(host, demo_chain):
    run = succeeded(host.run(demo_chain))
    (shown,) = run.outputs[only(demo_chain, "ContextForcingSaveVideo")]["images"]
    width, height = StudentSource(DEMO_STUDENT).open().card.size
    scale = default_scale(width, height)
    frames = imageio_ffmpeg.read_frames(str(host.output_path(shown)))
    about = next(frames)
    assert about["size"] == (width * scale, height * scale) and about["fps"] == 16 and about["codec"] == "h264"
    assert sum(1 for _ in frames) == 3 * 48 - 3
    # The page's Vue nodes would take a preview of Save Long Video for the video itself.
    assert {node for node, _ in run.previews} <= set(nodes(demo_chain, "ContextForcingSampler"))
    (picture,) = run.outputs[only(demo_chain, "ContextForcingMemoryReport")]["images"]
    assert Image.open(io.BytesIO(host.view(picture))).width == 1280
    assert "36 latent frames (9.0 s)" in run.outputs[only(demo_chain, "PreviewAny")]["text"][0]


def test_second_run_is_cached(host, demo_chain):
    first = succeeded(host.run(demo_chain))
    second = succeeded(host.run(demo_chain))
    assert second.cached == set(demo_chain) and not second.executed
    assert second.outputs == first.outputs


def test_a_changed_prompt_runs_only_what_follows(host, demo_chain):
    succeeded(host.run(demo_chain))
    text, sampler = nodes(demo_chain, "CLIPTextEncode")[-1], nodes(demo_chain, "ContextForcingSampler")[-1]
    demo_chain[text]["inputs"]["text"] = "A meadow under a clear sky at night. The camera pans left."
    run = succeeded(host.run(demo_chain))
    consumers = {
        only(demo_chain, name) for name in ("ContextForcingSaveVideo", "ContextForcingMemoryReport", "PreviewAny")
    }
    assert run.executed == {text, sampler} | consumers
    assert run.cached == set(demo_chain) - run.executed


def test_interrupt_keeps_what_is_finished(host):
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    text = graph.text(demo)
    first = graph.sampler(demo, text, graph.memory(demo), seed=11)
    second = graph.sampler(demo, text, first, seconds=120.0, seed=11)
    graph.save(second)

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == second and data["value"] == 1:
            host.post("/interrupt", {})

    for cached in (False, True):
        run = host.run(graph.prompt, interrupt)
        assert run.end == "execution_interrupted"
        assert run.all(run.end)[0]["node_id"] == second
        assert max(data["value"] for data in run.all("progress") if data["node"] == second) < 5
        assert (first in run.cached) == cached and (first in run.executed) != cached

    graph.prompt[second]["inputs"]["seconds"] = CHUNK_SECONDS
    run = succeeded(host.run(graph.prompt))
    assert first in run.cached and second in run.executed


def test_interrupt_while_saving_leaves_no_file(host, demo_chain):
    save = only(demo_chain, "ContextForcingSaveVideo")
    demo_chain[save]["inputs"]["filename_prefix"] = "interrupted/video"

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == save:
            host.post("/interrupt", {})

    run = host.run(demo_chain, interrupt)
    assert run.end == "execution_interrupted" and run.all(run.end)[0]["node_id"] == save
    assert list((host.base / "output" / "interrupted").iterdir()) == []


def test_progress_and_previews_come_chunk_by_chunk(host):
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=3 * CHUNK_SECONDS, seed=12)
    graph.save(sampler)
    run = succeeded(host.run(graph.prompt))
    states = [data["nodes"][sampler] for data in run.all("progress_state") if sampler in data["nodes"]]
    assert {(state["value"], state["max"]) for state in states} >= {(1, 3), (2, 3), (3, 3)}
    pictures = [Image.open(io.BytesIO(data)) for node, data in run.previews if node == sampler]
    width, height = StudentSource(DEMO_STUDENT).open().card.size
    assert len(pictures) == 3
    assert all(picture.size == (4 * width, 4 * height) for picture in pictures)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"sink": 1024}, ["window", "sink 1024", "do not fit", "make one of them smaller"]),
        ({"fast": 1}, ["fast", "1 latent frames", "at least 4"]),
        ({"width": 100}, ["width 100", "multiple of 16", "96 is the nearest"]),
    ],
)
def test_wrong_settings_are_named(host, settings, says):
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    memory = graph.memory(demo, **settings)
    graph.save(graph.sampler(demo, graph.text(demo), memory))
    error = failure(host, graph)
    assert error["node_id"] == memory and error["exception_type"] == "ValueError"
    for words in says:
        assert words in error["exception_message"]


def test_a_model_that_is_not_wan_is_named(host, tmp_path):
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "caption_channels": 64}
    weights = {"adaln_single.emb.timestep_embedder.linear_1.bias": torch.zeros(64)}
    weights["transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(64, 64)
    save_file(weights, tmp_path / "other.safetensors", {"config": json.dumps({"transformer": config})})
    host.add_model("diffusion_models", tmp_path / "other.safetensors")

    graph = Graph()
    other = graph.add("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    demo = graph.add("ContextForcingLoadDemo")
    sampler = graph.sampler(other, graph.text(demo), graph.memory(demo))
    graph.save(sampler)
    error = failure(host, graph)
    assert error["node_id"] == sampler
    for words in ("model: LTXV", "is not Wan 2.1 text-to-video", "load a Wan 2.1 text-to-video student"):
        assert words in error["exception_message"]


def test_a_file_that_is_no_student_is_named(host, tmp_path):
    save_file({"decoder.conv1.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    host.add_model("diffusion_models", tmp_path / "vae.safetensors")
    graph = Graph()
    student = graph.add("ContextForcingLoadStudent", student="vae.safetensors")
    graph.add("PreviewAny", source=[student, 0])
    error = failure(host, graph)
    assert error["node_id"] == student
    assert "vae.safetensors: a VAE" in error["exception_message"] and "\n" not in error["exception_message"].strip()


def test_published_layouts_make_the_same_latents(host, tmp_path):
    """A training checkpoint, diffusers' names and a plain file, of heads that ComfyUI guesses: one student, three ways.

    Two steps with the framewise card's chunk of one; the plain file goes through ComfyUI's own reading.
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
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    text, saved = graph.text(demo), []
    for name, choice in (
        ("published.pt", {}), ("diffusers.safetensors", {}), ("plain.safetensors", {}),
        ("published.pt", {"weights": "generator"}), ("scaled.safetensors", {}),
    ):  # fmt: skip
        host.add_model("diffusion_models", tmp_path / name)
        model = graph.add("ContextForcingLoadStudent", student=name, card="causal-forcing-2step", **choice)
        saved.append(graph.save(graph.sampler(model, text, graph.memory(model, width=64, height=32), seconds=0.5)))
    run = succeeded(host.run(graph.prompt))
    made = [latents(host, run, node) for node in saved]
    assert made[0].shape == (1, 16, 2, 4, 8) and made[0].isfinite().all()
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[3])
    assert 0 < (made[4] - made[0]).norm() < 0.1 * made[0].norm(), "float8, scaled, read by ComfyUI"


def test_command_line_makes_the_same_latents(host, demo_chain, tmp_path):
    width, height = StudentSource(DEMO_STUDENT).open().card.size
    scenes = [{"prompt": prompt, "seconds": 3} for prompt in PROMPTS]
    # JSON is YAML.
    story = tmp_path / "story.yaml"
    story.write_text(json.dumps({"size": [width, height], "seed": 7, "segments": scenes}))
    command = [sys.executable, "-c", "from context_forcing.cli import main; main()", "generate", str(story)]
    command += ["--output", str(tmp_path / "film.mp4"), "--memory-out", str(tmp_path / "memory.safetensors")]
    command += ["--device", "cpu", "--dtype", "fp32", "--scale", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    film = load_file(tmp_path / "memory.safetensors")["film"]

    texts = nodes(demo_chain, "CLIPTextEncode")
    assert tuple(demo_chain[text]["inputs"]["text"] for text in texts) == PROMPTS
    saved = []
    for sampler in nodes(demo_chain, "ContextForcingSampler"):
        saved.append(f"save {sampler}")
        inputs = {"samples": [sampler, 1], "filename_prefix": "latents/chain"}
        demo_chain[saved[-1]] = {"class_type": "SaveLatent", "inputs": inputs}
    run = succeeded(host.run(demo_chain))
    made = normalise(latents(host, run, *saved))
    assert made.shape == film.shape == (1, 16, 36, height // 8, width // 8)
    torch.testing.assert_close(made, film, rtol=0, atol=1e-5 * film.abs().max().item())


def test_splitting_changes_nothing(host):
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    text, empty = graph.text(demo), graph.memory(demo)
    whole = graph.save(graph.sampler(demo, text, empty, seconds=9.0, seed=13))
    parts, memory = [], empty
    for _ in range(3):
        memory = graph.sampler(demo, text, memory, seconds=3.0, seed=13)
        parts.append(graph.save(memory))
    run = succeeded(host.run(graph.prompt))
    at_once = latents(host, run, whole)
    assert at_once.shape[2] == 36
    assert torch.equal(at_once, latents(host, run, *parts))


def test_loaders_of_one_file_make_the_same_latents(host):
    host.add_model("diffusion_models", DEMO_STUDENT)
    graph = Graph()
    demo = graph.add("ContextForcingLoadDemo")
    student = graph.add("ContextForcingLoadStudent", student=DEMO_STUDENT.name)
    text = graph.text(demo)
    saved = [graph.save(graph.sampler(model, text, graph.memory(model), seed=14)) for model in (demo, student)]
    run = succeeded(host.run(graph.prompt))
    built_in, loaded = (latents(host, run, node) for node in saved)
    assert torch.equal(built_in, loaded)


def test_the_stock_loader_works_without_a_card(host):
    host.add_model("diffusion_models", DEMO_STUDENT)
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=DEMO_STUDENT.name, weight_dtype="default")
    demo = graph.add("ContextForcingLoadDemo")
    memory = graph.memory(model, width=128, height=64)
    saved = graph.save(graph.sampler(model, graph.text(demo), memory, seed=15))
    run = succeeded(host.run(graph.prompt))
    made = latents(host, run, saved)
    assert made.shape == (1, 16, CHUNK_FRAMES, 8, 16) and made.isfinite().all()
