"""Memories saved, continued twice, changed and begun in a real ComfyUI."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from context_forcing.memory.snapshot import load_memory as load_snapshot
from context_forcing.model.codecs.base import normalise

from .graph import (  # fmt: skip
    CHUNK_FRAMES,
    CHUNK_SECONDS,
    FOLDER,
    PROMPTS,
    Graph,
    command_line,
    failure,
    film,
    interrupt_at,
    latents,
    load_memory_input,
    memory_file,
    nodes,
    picture_shown,
    succeeded,
    text_shown,
)

pytestmark = [pytest.mark.host, pytest.mark.slow]


def test_a_saved_memory_continues_bit_for_bit(host, graph, demo):
    # Long enough to forget: a compact memory that forgot nothing continues bit for bit, too.
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=9.0)
    second = graph.sampler(demo, graph.text(demo, PROMPTS[1]), first, seconds=1.5)
    at_once = graph.save(second)
    saved = {form: graph.save_memory(first, form, prefix=form) for form in ("exact", "compact")}
    run = succeeded(host.run(graph.prompt))
    expected = latents(host, run, at_once)
    files = {form: memory_file(host, run, node) for form, node in saved.items()}

    host.post("/free", {"unload_models": True, "free_memory": True})
    results = {}
    for form, file in files.items():
        later = Graph()
        demo = later.add("ContextForcingLoadDemo")
        loaded = later.add("ContextForcingLoadMemory", file=load_memory_input(host, file))
        later.show_text(loaded)
        end = later.save(later.sampler(demo, later.text(demo, PROMPTS[1]), loaded, seconds=1.5))
        results[form] = latents(host, succeeded(host.run(later.prompt)), end)
    assert torch.equal(results["exact"], expected)
    difference = (results["compact"] - expected).abs().mean() / expected.abs().mean()
    assert 0 < difference < 0.5
    assert files["compact"].stat().st_size < files["exact"].stat().st_size / 3


def test_save_memory_shows_on_the_node_which_file_it_wrote(host, graph, demo):
    saved = graph.save_memory(graph.sampler(demo, graph.text(demo), graph.memory(demo)), prefix="shown")
    run = succeeded(host.run(graph.prompt))
    [shown] = [text for node, text in run.texts if node == saved]
    file = memory_file(host, run, saved)
    assert shown == f"{file.relative_to(host.base / 'output')}, {file.stat().st_size / 1e6:.1f} MB"


def test_load_memory_lists_the_files_and_refuses_others(host, graph, demo):
    saved = graph.save_memory(graph.sampler(demo, graph.text(demo), graph.memory(demo)), prefix="listed")
    file = memory_file(host, succeeded(host.run(graph.prompt)), saved)
    info = host.get("/object_info/ContextForcingLoadMemory")["ContextForcingLoadMemory"]
    assert load_memory_input(host, file) in info["input"]["required"]["file"][1]["options"]

    def load(name):
        later = Graph()
        later.show_text(later.add("ContextForcingLoadMemory", file=name))
        return later

    for name in ("../server.log [output]", "/etc/passwd", "nothing.safetensors [output]"):
        reply = host.post("/prompt", {"prompt": load(name).prompt, "client_id": host.client_id})
        errors = str(reply.get("node_errors"))
        assert "does not exist" in errors or "Invalid" in errors
    assert "'details': 'file - nothing.safetensors [output] does not exist; select a file" in errors

    (host.base / "input" / "damaged.safetensors").write_bytes(b"\x00" * 100)
    message = failure(host, load("damaged.safetensors [input]"))["exception_message"]
    assert message.startswith("file: damaged.safetensors [input]: not a memory file")
    assert "Save Memory" in message and str(host.base) not in message


def test_a_saved_memory_has_the_permissions_of_a_new_file(host, graph, demo):
    saved = graph.save_memory(graph.sampler(demo, graph.text(demo), graph.memory(demo)))
    file = memory_file(host, succeeded(host.run(graph.prompt)), saved)
    (host.base / "new").touch()
    assert file.stat().st_mode == (host.base / "new").stat().st_mode


def test_a_broken_link_is_not_listed(host):
    link = host.base / "input" / "gone.safetensors"
    link.symlink_to(host.base / "nowhere.safetensors")
    try:
        info = host.get("/object_info/ContextForcingLoadMemory")["ContextForcingLoadMemory"]
    finally:
        link.unlink()
    assert "gone.safetensors" not in str(info)


def test_saving_outside_the_output_folder_is_refused(host, graph, demo):
    """Before anything runs."""
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo), seed=31)
    memory = graph.save_memory(sampler, prefix="../../outside")
    video = graph.add(
        "ContextForcingSaveVideo", memory=[sampler, 0], vae=[demo, 2], filename_prefix="../out", fps=16.0, scale=1
    )
    for node in (memory, video):
        prompt = {name: entry for name, entry in graph.prompt.items() if name not in {memory, video} - {node}}
        reply = host.post("/prompt", {"prompt": prompt, "client_id": host.client_id})
        (error,) = reply["node_errors"][node]["errors"]
        assert error["details"].startswith("filename_prefix - '") and error["details"].count("filename_prefix") == 1
        assert "is not a file under the output folder; give a name" in error["details"]
        assert "\n" not in error["details"] and str(host.base) not in error["details"]
    assert not list(host.base.glob("out*/*out*")) and not list(host.base.parent.glob("outside*"))


def test_branches_are_independent(host, graph, demo):
    """Three continuations of one memory; each equals the one that is generated alone."""

    def branch(graph, demo, prompt, change):
        trunk = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=3.0)
        return graph.save(graph.sampler(demo, graph.text(demo, prompt), trunk, seconds=1.5, change=change))

    branches = list(zip(PROMPTS, ("keep", "recache", "flush"), strict=True))
    trunk = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=3.0)
    ends = [
        graph.save(graph.sampler(demo, graph.text(demo, prompt), trunk, seconds=1.5, change=change))
        for prompt, change in branches
    ]
    run = succeeded(host.run(graph.prompt))
    together = [latents(host, run, end) for end in ends]
    assert not torch.equal(together[1], together[2]) and not torch.equal(together[0], together[1])
    for (prompt, change), expected in zip(branches, together, strict=True):
        host.post("/free", {"free_memory": True})
        alone = Graph()
        end = branch(alone, alone.add("ContextForcingLoadDemo"), prompt, change)
        assert torch.equal(latents(host, succeeded(host.run(alone.prompt)), end), expected)


@pytest.mark.parametrize("place", ["GPU", "compact"])
def test_where_a_memory_is_kept(host, graph, demo, place):
    text = graph.text(demo)
    ends = []
    for keep_in in ("RAM", place):
        trunk = graph.sampler(demo, text, graph.memory(demo), seconds=9.0, keep_in=keep_in)
        ends.append(graph.save(graph.sampler(demo, text, trunk)))
    run = succeeded(host.run(graph.prompt))
    ram, other = (latents(host, run, end) for end in ends)
    assert torch.equal(ram, other) == (place == "GPU")
    assert (ram - other).abs().mean() < 0.5 * ram.abs().mean()


def test_change_and_blend_are_those_of_generate(host, graph, demo, tmp_path):
    settings = [dict(), dict(change="recache", blend=2), dict(change="cut")]
    story = {"seed": 7, "segments": [{"prompt": p, "seconds": 3, **s} for p, s in zip(PROMPTS, settings)]}
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(story))
    options = ["--memory-out", "memory.safetensors", "--device", "cpu", "--dtype", "fp32"]
    command_line(tmp_path, "generate", "story.yaml", "-o", "film.mp4", *options)
    expected = load_file(tmp_path / "memory.safetensors")["film"]

    memory, saved = graph.memory(demo), []
    for prompt, each in zip(PROMPTS, settings):
        memory = graph.sampler(demo, graph.text(demo, prompt), memory, seconds=3.0, **each)
        saved.append(graph.save(memory))
    result = normalise(latents(host, succeeded(host.run(graph.prompt)), *saved))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_finished_chunks_of_an_interrupted_segment_are_saved(host, graph, demo):
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=90.0, seed=21, autosave=True)
    graph.save(sampler)
    before = set((host.base / "output" / FOLDER).glob("autosave*"))
    assert host.run(graph.prompt, interrupt_at(host, "progress", sampler, 2)).end == "execution_interrupted"
    (file,) = set((host.base / "output" / FOLDER).glob("autosave*")) - before
    finished = load_file(file)["film"].shape[2]
    assert 6 <= finished <= 15

    later = Graph()
    demo = later.add("ContextForcingLoadDemo")
    loaded = later.add("ContextForcingLoadMemory", file=load_memory_input(host, file))
    saved = later.save(later.sampler(demo, later.text(demo), loaded, seed=21))
    assert latents(host, succeeded(host.run(later.prompt)), saved).shape[2] == 3


def test_of_exact_autosaves_of_a_chain_the_newest_stays(host, graph, demo):
    """Policy released: three segments, one file, which has all of them and goes on bit for bit."""
    memory = graph.memory(demo, policy="released")
    for _ in range(3):
        memory = graph.sampler(demo, graph.text(demo), memory, seed=23, autosave=True)
    before = set((host.base / "output" / FOLDER).glob("autosave*"))
    saved = graph.save(graph.sampler(demo, graph.text(demo), memory, seed=23))
    expected = latents(host, succeeded(host.run(graph.prompt)), saved)
    (file,) = set((host.base / "output" / FOLDER).glob("autosave*")) - before
    assert load_file(file)["film"].shape[2] == 3 * CHUNK_FRAMES

    later = Graph()
    demo = later.add("ContextForcingLoadDemo")
    loaded = later.add("ContextForcingLoadMemory", file=load_memory_input(host, file))
    saved = later.save(later.sampler(demo, later.text(demo), loaded, seed=23))
    assert torch.equal(latents(host, succeeded(host.run(later.prompt)), saved), expected)


@pytest.fixture
def image(host, graph) -> str:
    """A node that loads a picture: green below, blue above."""
    pixels = np.zeros((80, 200, 3), np.uint8)
    pixels[:40], pixels[40:] = (90, 160, 230), (90, 180, 60)
    Image.fromarray(pixels).save(host.base / "input" / "start.png")
    return graph.add("LoadImage", image="start.png")


def test_a_start_image_is_the_first_frame(host, graph, demo, image):
    begun = graph.add("ContextForcingRemember", memory=[graph.memory(demo), 0], vae=[demo, 2], images=[image, 0])
    sampler = graph.sampler(demo, graph.text(demo), begun, seconds=1.5)
    saved = graph.save(sampler)
    decoded = graph.add("VAEDecode", samples=[sampler, 1], vae=[demo, 2])
    shown = graph.add("ImageFromBatch", image=[decoded, 0], batch_index=0, length=1)
    shown = graph.add("PreviewImage", images=[shown, 0])
    run = succeeded(host.run(graph.prompt))
    assert latents(host, run, saved).shape[2] == 6
    first = np.asarray(picture_shown(host, run, shown).convert("RGB")).astype(int)
    assert first.shape == (64, 128, 3)
    assert abs(first[4:24] - (90, 160, 230)).mean() < 12 and abs(first[44:60] - (90, 180, 60)).mean() < 12


def test_start_latents_are_not_decoded(host, graph, demo):
    text = graph.text(demo)
    source = graph.sampler(demo, text, graph.memory(demo), seconds=3.0, seed=5)
    begun = graph.add("ContextForcingRemember", memory=[graph.memory(demo), 0], latent=[source, 1])
    kept = graph.save_memory(graph.sampler(demo, text, begun, seconds=CHUNK_SECONDS, seed=5), prefix="start")
    saved = graph.save(source)
    run = succeeded(host.run(graph.prompt))
    result, start = film(host, run, kept), normalise(latents(host, run, saved))
    assert result.shape[2] == start.shape[2] + 3
    torch.testing.assert_close(result[:, :, : start.shape[2]], start, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (["images"], "vae: images must be encoded"),
        ([], "connect either images, with a vae, or latent"),
        (["vae", "images", "begun"], "needs an empty memory"),
    ],
)
def test_wrong_start_inputs_are_named(host, graph, demo, image, inputs, message):
    memory = graph.memory(demo)
    if "begun" in inputs:
        memory = graph.sampler(demo, graph.text(demo), memory)
    links = {"vae": [demo, 2], "images": [image, 0]}
    connected = {name: links[name] for name in inputs if name in links}
    begun = graph.add("ContextForcingRemember", memory=[memory, 0], **connected)
    graph.save(graph.sampler(demo, graph.text(demo), begun))
    assert nodes(graph.prompt, "ContextForcingRemember") == [begun]
    assert message in failure(host, graph)["exception_message"]


def test_references_are_those_of_generate(host, graph, demo, tmp_path):
    """Two pictures of the video's size, one with a prompt: the same film, through a cut; the report shows them."""
    for number, name in enumerate(("one.png", "two.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        for folder in (tmp_path, host.base / "input"):
            Image.fromarray(pixels).save(folder / name)
    segments = [{"prompt": PROMPTS[0], "seconds": 3}, {"prompt": PROMPTS[1], "seconds": 3, "change": "cut_new_sink"}]
    references = ["one.png", {"image": "two.png", "prompt": PROMPTS[2]}]
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({"seed": 7, "references": references, "segments": segments}))
    options = ["--memory-out", "memory.safetensors", "--device", "cpu", "--dtype", "fp32"]
    command_line(tmp_path, "generate", "story.yaml", "-o", "film.mp4", *options)
    expected = load_file(tmp_path / "memory.safetensors")["film"]

    memory, ends = graph.memory(demo), []
    for name, prompt in (("one.png", None), ("two.png", PROMPTS[2])):
        image = graph.add("LoadImage", image=name)
        positive = {} if prompt is None else {"positive": [graph.text(demo, prompt), 0]}
        links = {"memory": [memory, 0], "vae": [demo, 2], "images": [image, 0]}
        memory = graph.add("ContextForcingReference", **links, **positive)
    for prompt, change in ((PROMPTS[0], "keep"), (PROMPTS[1], "cut_new_sink")):
        memory = graph.sampler(demo, graph.text(demo, prompt), memory, seconds=3.0, change=change)
        ends.append(graph.save(memory))
    report = graph.add("ContextForcingMemoryReport", memory=[memory, 0], vae=[demo, 2], fps=16.0)
    text = graph.show_text(report)
    run = succeeded(host.run(graph.prompt))
    assert "sink 3 of 3 (2 references)" in text_shown(run, text)
    result = normalise(latents(host, run, *ends))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_batch_of_pictures_is_several_references(host, graph, demo, image):
    batch = graph.add("RepeatImageBatch", image=[image, 0], amount=2)
    memory = [graph.memory(demo), 0]
    begun = graph.add("ContextForcingReference", memory=memory, vae=[demo, 2], images=[batch, 0])
    kept = graph.save_memory(graph.sampler(demo, graph.text(demo), begun), prefix="pinned")
    memory = load_snapshot(memory_file(host, succeeded(host.run(graph.prompt)), kept))
    assert memory.slots.references == (-2, -1) and memory.num_frames == 3
    assert torch.equal(memory.references[0].latents, memory.references[1].latents)

    later = graph.add("ContextForcingReference", memory=[begun, 0], vae=[demo, 2], images=[batch, 0])
    graph.save(graph.sampler(demo, graph.text(demo), later))
    assert "references: 4 frames, the sink has 3" in failure(host, graph)["exception_message"]


def test_the_latent_of_an_image_is_refused(host, graph, demo):
    """It has an axis less, and would be broadcast."""
    image = graph.add("EmptyLatentImage", width=128, height=64, batch_size=1)
    begun = graph.add("ContextForcingRemember", memory=[graph.memory(demo), 0], latent=[image, 0])
    graph.save(graph.sampler(demo, graph.text(demo), begun, seconds=0.75))
    assert "a video's is" in failure(host, graph)["exception_message"]
