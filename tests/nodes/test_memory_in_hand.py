"""Memories kept, forked, steered and begun in a real ComfyUI."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from .graph import CHUNK_SECONDS, PROMPTS, Graph, failure, latents, nodes, succeeded

pytestmark = [pytest.mark.host, pytest.mark.slow]

FOLDER = "context_forcing"


def saved_memory(host, run, node) -> str:
    """What Load Memory is told of a file that Save Memory wrote."""
    name = run.outputs[node]["text"][0].split(",")[0]
    assert (host.base / "output" / name).is_file()
    return f"{name} [output]"


def test_a_saved_memory_goes_on_to_the_bit(host, graph, demo):
    # Long enough to forget: a compact memory that never did is the same to the bit.
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=9.0)
    second = graph.sampler(demo, graph.text(demo, PROMPTS[1]), first, seconds=1.5)
    at_once = graph.save(second)
    kept = {
        form: graph.add("ContextForcingSaveMemory", memory=[first, 0], filename_prefix=f"{FOLDER}/{form}", form=form)
        for form in ("exact", "compact")
    }
    run = succeeded(host.run(graph.prompt))
    expected = latents(host, run, at_once)
    files = {form: saved_memory(host, run, node) for form, node in kept.items()}

    host.post("/free", {"unload_models": True, "free_memory": True})
    found = {}
    for form, file in files.items():
        later = Graph()
        demo = later.add("ContextForcingLoadDemo")
        loaded = later.add("ContextForcingLoadMemory", file=file)
        later.add("PreviewAny", source=[loaded, 1])
        on = later.sampler(demo, later.text(demo, PROMPTS[1]), loaded, seconds=1.5)
        saved = later.save(on)
        found[form] = latents(host, succeeded(host.run(later.prompt)), saved)
    assert torch.equal(found["exact"], expected)
    difference = (found["compact"] - expected).abs().mean() / expected.abs().mean()
    assert 0 < difference < 0.5
    sizes = [(host.base / "output" / file.removesuffix(" [output]")).stat().st_size for file in files.values()]
    assert sizes[1] < sizes[0] / 3


def test_load_memory_lists_the_files_and_refuses_others(host, graph, demo):
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo))
    kept = graph.add("ContextForcingSaveMemory", memory=[first, 0], filename_prefix=f"{FOLDER}/listed", form="exact")
    file = saved_memory(host, succeeded(host.run(graph.prompt)), kept)
    info = host.get("/object_info/ContextForcingLoadMemory")["ContextForcingLoadMemory"]
    assert file in info["input"]["required"]["file"][1]["options"]

    def refusal(name):
        later = Graph()
        later.add("PreviewAny", source=[later.add("ContextForcingLoadMemory", file=name), 1])
        reply = host.post("/prompt", {"prompt": later.prompt, "client_id": host.client_id})
        return str(reply.get("node_errors"))

    for name in ("../server.log [output]", "/etc/passwd", "nothing.safetensors [output]"):
        assert "does not exist" in refusal(name) or "Invalid" in refusal(name)

    (host.base / "input" / "damaged.safetensors").write_bytes(b"\x00" * 100)
    broken = Graph()
    broken.add("PreviewAny", source=[broken.add("ContextForcingLoadMemory", file="damaged.safetensors [input]"), 1])
    assert "not a whole safetensors file" in failure(host, broken)["exception_message"]


def test_saving_outside_the_output_folder_is_refused(host, graph, demo):
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo))
    graph.add("ContextForcingSaveMemory", memory=[first, 0], filename_prefix="../outside", form="exact")
    assert "outside the output folder" in failure(host, graph)["exception_message"]
    assert not list(host.base.glob("outside*"))


def test_branches_do_not_touch(host, graph, demo):
    """Three futures of one memory; each equals the one it would be alone."""
    text = graph.text(demo)
    trunk = graph.sampler(demo, text, graph.memory(demo), seconds=3.0)
    ends = [
        graph.save(graph.sampler(demo, graph.text(demo, prompt), trunk, seconds=1.5, change=change))
        for prompt, change in zip(PROMPTS, ("keep", "recache", "flush"))
    ]
    run = succeeded(host.run(graph.prompt))
    together = [latents(host, run, end) for end in ends]
    assert not torch.equal(together[1], together[2]) and not torch.equal(together[0], together[1])
    for prompt, change, expected in zip(PROMPTS, ("keep", "recache", "flush"), together):
        host.post("/free", {"free_memory": True})
        alone = Graph()
        demo = alone.add("ContextForcingLoadDemo")
        trunk = alone.sampler(demo, alone.text(demo), alone.memory(demo), seconds=3.0)
        end = alone.save(alone.sampler(demo, alone.text(demo, prompt), trunk, seconds=1.5, change=change))
        assert torch.equal(latents(host, succeeded(host.run(alone.prompt)), end), expected)


@pytest.mark.parametrize("place", ["GPU", "compact"])
def test_where_a_memory_rests(host, graph, demo, place):
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
    command = [sys.executable, "-c", "from context_forcing.cli import main; main()", "generate", "story.yaml"]
    command += ["-o", "film.mp4", "--memory-out", "memory.safetensors", "--device", "cpu", "--dtype", "fp32"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path)
    film = load_file(tmp_path / "memory.safetensors")["film"]

    memory, saved = graph.memory(demo), []
    for prompt, each in zip(PROMPTS, settings):
        memory = graph.sampler(demo, graph.text(demo, prompt), memory, seconds=3.0, **each)
        saved.append(graph.save(memory))
    from context_forcing.model.codecs.base import normalise

    made = normalise(latents(host, succeeded(host.run(graph.prompt)), *saved))
    torch.testing.assert_close(made, film, rtol=0, atol=1e-5 * film.abs().max().item())


def test_an_interrupted_segment_is_saved_as_far_as_it_came(host, graph, demo):
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=90.0, seed=21, autosave=True)
    graph.save(sampler)

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == sampler and data["value"] == 2:
            host.post("/interrupt", {})

    before = set((host.base / "output" / FOLDER).glob("autosave*"))
    assert host.run(graph.prompt, interrupt).end == "execution_interrupted"
    (file,) = set((host.base / "output" / FOLDER).glob("autosave*")) - before
    finished = load_file(file)["film"].shape[2]
    assert 6 <= finished <= 15

    later = Graph()
    demo = later.add("ContextForcingLoadDemo")
    loaded = later.add("ContextForcingLoadMemory", file=f"{FOLDER}/{file.name} [output]")
    saved = later.save(later.sampler(demo, later.text(demo), loaded, seed=21))
    assert latents(host, succeeded(host.run(later.prompt)), saved).shape[2] == 3


def picture(host, name="start.png"):
    """A flat picture in the input folder: green below, blue above."""
    pixels = np.zeros((80, 200, 3), np.uint8)
    pixels[:40], pixels[40:] = (90, 160, 230), (90, 180, 60)
    Image.fromarray(pixels).save(host.base / "input" / name)
    return name


def test_a_start_image_is_the_first_frame(host, graph, demo):
    image = graph.add("LoadImage", image=picture(host))
    begun = graph.add("ContextForcingRemember", memory=[graph.memory(demo), 0], vae=[demo, 2], images=[image, 0])
    sampler = graph.sampler(demo, graph.text(demo), begun, seconds=1.5)
    saved = graph.save(sampler)
    decoded = graph.add("VAEDecode", samples=[sampler, 1], vae=[demo, 2])
    shown = graph.add("PreviewImage", images=[decoded, 0])
    run = succeeded(host.run(graph.prompt))
    assert latents(host, run, saved).shape[2] == 6
    first = np.asarray(Image.open(host.output_path(run.outputs[shown]["images"][0])).convert("RGB")).astype(int)
    assert first.shape == (64, 128, 3)
    assert abs(first[4:24] - (90, 160, 230)).mean() < 12 and abs(first[44:60] - (90, 180, 60)).mean() < 12


def test_latents_are_taken_over_without_decoding(host, graph, demo):
    text = graph.text(demo)
    source = graph.sampler(demo, text, graph.memory(demo), seconds=3.0, seed=5)
    begun = graph.add("ContextForcingRemember", memory=[graph.memory(demo), 0], latent=[source, 1])
    on = graph.sampler(demo, text, begun, seconds=CHUNK_SECONDS, seed=5)
    kept = graph.add("ContextForcingSaveMemory", memory=[on, 0], filename_prefix=f"{FOLDER}/taken", form="exact")
    saved = graph.save(source)
    run = succeeded(host.run(graph.prompt))
    from context_forcing.model.codecs.base import normalise

    film = load_file(host.base / "output" / saved_memory(host, run, kept).removesuffix(" [output]"))["film"]
    given = normalise(latents(host, run, saved))
    assert film.shape[2] == given.shape[2] + 3
    torch.testing.assert_close(film[:, :, : given.shape[2]], given, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "inputs, words",
    [
        (["images"], "vae: images must be encoded"),
        ([], "connect either images, with a vae, or latent"),
        (["vae", "images", "begun"], "goes into an empty memory"),
    ],
)
def test_what_cannot_be_remembered_is_named(host, graph, demo, inputs, words):
    memory = graph.memory(demo)
    if "begun" in inputs:
        memory = graph.sampler(demo, graph.text(demo), memory)
    wires = {"vae": [demo, 2], "images": [graph.add("LoadImage", image=picture(host)), 0]}
    given = {name: wires[name] for name in inputs if name in wires}
    begun = graph.add("ContextForcingRemember", memory=[memory, 0], **given)
    graph.save(graph.sampler(demo, graph.text(demo), begun))
    assert nodes(graph.prompt, "ContextForcingRemember") == [begun]
    assert words in failure(host, graph)["exception_message"]


def test_a_picture_s_latent_is_no_clip(host, graph, demo):
    """It has an axis less, and would be spread over the missing one."""
    picture = graph.add("EmptyLatentImage", width=128, height=64, batch_size=1)
    begun = graph.add("ContextForcingRemember", memory=graph.memory(demo), latent=[picture, 0])
    graph.save(graph.sampler(demo, graph.text(demo), begun, seconds=0.75))
    assert "a video's is" in failure(host, graph)["exception_message"]


def test_a_link_that_leads_nowhere_is_no_memory(host):
    link = host.base / "input" / "gone.safetensors"
    link.symlink_to(host.base / "nowhere.safetensors")
    try:
        info = host.get("/object_info/ContextForcingLoadMemory")["ContextForcingLoadMemory"]
    finally:
        link.unlink()
    assert "gone.safetensors" not in str(info)
