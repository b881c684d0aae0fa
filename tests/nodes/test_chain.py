"""A chain of samplers in a real ComfyUI: video, cache, interrupts, progress, the same latents as `generate`."""

import json

import imageio_ffmpeg
import pytest
import torch
from safetensors.torch import load_file

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.base import normalise
from context_forcing.video.mp4 import default_scale
from context_forcing.video.reading import read_frames, read_tags

from .graph import (  # fmt: skip
    CHUNK_SECONDS,
    PROMPTS,
    command_line,
    failure,
    interrupt_at,
    latents,
    nodes,
    only,
    picture_shown,
    succeeded,
    text_shown,
)
from .host import NODE_IDS, PACK

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.fixture(scope="module")
def size() -> tuple[int, int]:
    return StudentSource().open().card.size


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_comfyui_lists_the_node(object_info, node_id):
    info = object_info[node_id]
    assert info["category"] == "Context Forcing" and info["python_module"] == f"custom_nodes.{PACK}"
    for part in ("required", "optional"):
        for name, (_, *options) in info["input"].get(part, {}).items():
            assert options and options[0].get("tooltip"), f"{node_id}.{name} has no tooltip"
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_help_page_is_served(host, node_id):
    page = host.get_bytes(f"/extensions/{PACK}/docs/{node_id}.md").decode()
    assert page.startswith("# ") and len(page) > 200


def test_an_attention_that_is_not_installed_is_refused_with_its_remedy(host, demo_chain):
    for node in nodes(demo_chain, "ContextForcingSampler"):
        demo_chain[node]["inputs"]["attention"] = "sage3"
    (error,) = host.run(demo_chain).all("execution_error")
    assert error["exception_message"].startswith("attention: sage3 needs the package sageattn3 (")
    assert error["exception_message"].strip().endswith("install it by docs/performance.md, or use sdpa")


def test_demo_chain_makes_the_video(host, demo_chain, size):
    run = succeeded(host.run(demo_chain))
    (shown,) = run.outputs[only(demo_chain, "ContextForcingSaveVideo")]["images"]
    width, height = size
    scale = default_scale(width, height)
    frames = imageio_ffmpeg.read_frames(str(host.output_path(shown)))
    about = next(frames)
    assert about["size"] == (width * scale, height * scale) and about["fps"] == 16 and about["codec"] == "h264"
    assert sum(1 for _ in frames) == 3 * 48 - 3
    # ComfyUI's Vue nodes would take a preview of Save Long Video for the video itself.
    assert {node for node, _ in run.previews} <= set(nodes(demo_chain, "ContextForcingSampler"))
    assert picture_shown(host, run, only(demo_chain, "ContextForcingMemoryReport")).width == 1280
    assert "36 latent frames (9 s)" in text_shown(run, only(demo_chain, "PreviewAny"))


def test_the_video_carries_prompt_and_workflow(host, demo_chain):
    """Under the names that ComfyUI's page looks for, as its own Save Video writes them."""
    workflow = {"nodes": [{"id": 1, "title": "a=b; #c \u96ea\n"}], "links": []}
    demo_chain[only(demo_chain, "ContextForcingSaveVideo")]["inputs"]["filename_prefix"] = "video/tags"
    run = succeeded(host.run(demo_chain, workflow=workflow))
    (shown,) = run.outputs[only(demo_chain, "ContextForcingSaveVideo")]["images"]
    tags = read_tags(host.output_path(shown))
    assert json.loads(tags["prompt"]) == demo_chain and json.loads(tags["workflow"]) == workflow


def test_a_second_run_is_cached(host, demo_chain):
    first = succeeded(host.run(demo_chain))
    second = succeeded(host.run(demo_chain))
    assert second.cached == set(demo_chain) and not second.executed
    assert second.outputs == first.outputs


def test_a_changed_prompt_runs_only_later_nodes(host, demo_chain):
    succeeded(host.run(demo_chain))
    text, sampler = nodes(demo_chain, "CLIPTextEncode")[-1], nodes(demo_chain, "ContextForcingSampler")[-1]
    demo_chain[text]["inputs"]["text"] = "A meadow under a clear sky at night. The camera pans left."
    run = succeeded(host.run(demo_chain))
    ends = ("ContextForcingSaveVideo", "ContextForcingMemoryReport", "PreviewAny")
    assert run.executed == {text, sampler, *(only(demo_chain, name) for name in ends)}
    assert run.cached == set(demo_chain) - run.executed


def test_an_interrupt_keeps_finished_segments(host, graph, demo):
    text = graph.text(demo)
    first = graph.sampler(demo, text, graph.memory(demo), seed=11)
    second = graph.sampler(demo, text, first, seconds=120.0, seed=11)
    graph.save(second)
    for cached in (False, True):
        run = host.run(graph.prompt, interrupt_at(host, "progress", second, 1))
        assert run.end == "execution_interrupted"
        assert run.all(run.end)[0]["node_id"] == second
        assert max(data["value"] for data in run.all("progress") if data["node"] == second) < 5
        assert (first in run.cached) == cached and (first in run.executed) != cached

    graph.prompt[second]["inputs"]["seconds"] = CHUNK_SECONDS
    run = succeeded(host.run(graph.prompt))
    assert first in run.cached and second in run.executed


def test_an_interrupt_while_saving_leaves_no_file(host, demo_chain):
    save = only(demo_chain, "ContextForcingSaveVideo")
    demo_chain[save]["inputs"]["filename_prefix"] = "interrupted/video"
    run = host.run(demo_chain, interrupt_at(host, "progress", save))
    assert run.end == "execution_interrupted" and run.all(run.end)[0]["node_id"] == save
    assert list((host.base / "output" / "interrupted").iterdir()) == []


def test_progress_and_previews_come_chunk_by_chunk(host, graph, demo, size):
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=3 * CHUNK_SECONDS, seed=12)
    graph.save(sampler)
    run = succeeded(host.run(graph.prompt))
    assert run.progress(sampler) >= {(1, 3), (2, 3), (3, 3)}
    pictures = [picture for node, picture in run.preview_pictures() if node == sampler]
    assert [picture.size for picture in pictures] == [(4 * size[0], 4 * size[1])] * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sink": 1024}, ["window", "sink 1024", "do not fit", "make one of them smaller"]),
        ({"fast": 1}, ["fast", "1 latent frames", "4 or more"]),
        ({"width": 100}, ["width 100", "multiple of 16", "96 is the nearest"]),
    ],
)
def test_wrong_settings_are_named(host, graph, demo, settings, message):
    memory = graph.memory(demo, **settings)
    graph.save(graph.sampler(demo, graph.text(demo), memory))
    error = failure(host, graph)
    assert error["node_id"] == memory and error["exception_type"] == "ValueError"
    for words in message:
        assert words in error["exception_message"]


def test_the_command_line_makes_the_same_latents(host, demo_chain, size, tmp_path):
    segments = [{"prompt": prompt, "seconds": 3} for prompt in PROMPTS]
    # JSON is YAML.
    (tmp_path / "story.yaml").write_text(json.dumps({"size": size, "seed": 7, "segments": segments}))
    options = ["--memory-out", "memory.safetensors", "--device", "cpu", "--dtype", "fp32", "--scale", "1"]
    command_line(tmp_path, "generate", "story.yaml", "--output", "film.mp4", *options)
    expected = load_file(tmp_path / "memory.safetensors")["film"]

    texts = nodes(demo_chain, "CLIPTextEncode")
    assert tuple(demo_chain[text]["inputs"]["text"] for text in texts) == PROMPTS
    saved = []
    for sampler in nodes(demo_chain, "ContextForcingSampler"):
        saved.append(f"save {sampler}")
        inputs = {"samples": [sampler, 1], "filename_prefix": "latents/chain"}
        demo_chain[saved[-1]] = {"class_type": "SaveLatent", "inputs": inputs}
    run = succeeded(host.run(demo_chain))
    result = normalise(latents(host, run, *saved))
    assert result.shape == expected.shape == (1, 16, 36, size[1] // 8, size[0] // 8)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Films:
    """For Host.run: the number of frames of every film that was shown on a node that had not run, in order."""

    def __init__(self, host, node, on_event=lambda kind, data: None):
        self.host, self.node, self.on_event, self.frames = host, node, on_event, []

    def __call__(self, kind, data):
        if kind == "executed" and data["node"] == self.node and data["output"]["images"][0]["type"] == "temp":
            film = self.host.output_path(data["output"]["images"][0])
            self.frames.append(len(list(read_frames(film)[1])))
        self.on_event(kind, data)


def test_the_film_so_far_is_shown_where_it_will_be_saved(host, demo_chain):
    """After each segment but the last, which is shown by the saved video itself. One frame per latent frame."""
    for sampler in nodes(demo_chain, "ContextForcingSampler"):
        demo_chain[sampler]["inputs"] |= {"seed": 41, "seconds": 1.5}
    save, texts = only(demo_chain, "ContextForcingSaveVideo"), nodes(demo_chain, "CLIPTextEncode")
    written = lambda: {path.name for path in (host.base / "temp").glob("context_forcing_*")}
    before, films = written(), Films(host, save)
    run = succeeded(host.run(demo_chain, films))
    assert films.frames == [6, 12]
    kinds = sorted(name.split("_")[2] for name in written() - before)
    assert kinds == ["clip", "clip", "film"], "only the newest film stays"
    assert host.output_path(run.outputs[save]["images"][0]).parent == host.base / "output" / "video"
    for line in ("0.8 s of 4.5 s, ", "4.5 s of 4.5 s, "):
        assert any(text.startswith(line) and " frames/s, " in text for _, text in run.texts), run.texts
    assert {node for node, _ in run.texts} == set(nodes(demo_chain, "ContextForcingSampler"))

    # The first segments come from the cache, their part of the film, too.
    demo_chain[texts[-1]]["inputs"]["text"] = "Snow under a clear sky."
    last = nodes(demo_chain, "ContextForcingSampler")[-1]
    demo_chain[last]["inputs"]["seconds"] = 30.0
    films = Films(host, save, interrupt_at(host, "progress", last, 2))
    assert host.run(demo_chain, films).end == "execution_interrupted"
    assert len(films.frames) == 1 and films.frames[0] >= 12 + 6


def test_splitting_changes_nothing(host, graph, demo):
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
