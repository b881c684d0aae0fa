"""Memory Report and Consistency over Time in a real ComfyUI."""

import numpy as np
import pytest
from PIL import Image

from .graph import PROMPTS, command_line, failure, memory_file, picture_shown, succeeded, text_shown

pytestmark = [pytest.mark.host, pytest.mark.slow]


def report(graph, demo, memory, **settings):
    """The node, and one that shows its text."""
    node = graph.add("ContextForcingMemoryReport", memory=[memory, 0], vae=[demo, 2], fps=16.0, **settings)
    return node, graph.show_text(node)


def consistency(graph, every=0.5, **inputs):
    node = graph.add("ContextForcingConsistency", every=every, fps=16.0, **inputs)
    return node, graph.show_text(node)


def shares(line):
    """`...: sink 1.0%, slow 2.0%` -> {"sink": 0.01, ...}."""
    pairs = (pair.rsplit(" ", 1) for pair in line.split(": ")[1].split(", "))
    return {part: float(share.rstrip("%")) / 100 for part, share in pairs}


def test_the_report_of_a_memory(host, graph, demo):
    """With attention if a model is connected; the same text as `report --attention`."""
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=4.5)
    end = graph.sampler(demo, graph.text(demo, PROMPTS[1]), first, seconds=1.5, change="cut")
    (plain, plain_text), (with_mass, mass_text) = report(graph, demo, end), report(graph, demo, end, model=[demo, 0])
    saved = graph.save_memory(end)
    run = succeeded(host.run(graph.prompt))
    assert "forgotten: 15 frames by the cut at 4.5 s" in text_shown(run, plain_text)
    assert "attention" not in text_shown(run, plain_text)
    assert picture_shown(host, run, with_mass).height > picture_shown(host, run, plain).height
    parts = shares(text_shown(run, mass_text).splitlines()[-1])
    assert list(parts) == ["sink", "slow", "fast", "the chunk itself"]
    assert sum(parts.values()) == pytest.approx(1, abs=0.003) and parts["sink"] > 0

    file = memory_file(host, run, saved)
    done = command_line(host.base, "report", file, "-o", "report.png", "--attention", "--device", "cpu")
    assert text_shown(run, mass_text) in done.stderr


def test_the_report_of_a_compact_memory_has_attention(host, graph, demo):
    end = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=1.5, keep_in="compact")
    _, text = report(graph, demo, end, model=[demo, 0])
    assert "attention of the next chunk" in text_shown(succeeded(host.run(graph.prompt)), text)


def test_an_empty_memory_has_no_attention(host, graph, demo):
    report(graph, demo, graph.memory(demo), model=[demo, 0])
    assert "memory: it has no segment" in failure(host, graph)["exception_message"]


def test_a_memory_and_its_decoded_frames_have_the_same_consistency(host, graph, demo):
    end = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=6.0)
    decoded = graph.add("VAEDecode", samples=[end, 1], vae=[demo, 2])
    of_memory, memory_text = consistency(graph, memory=[end, 0], vae=[demo, 2])
    _, images_text = consistency(graph, images=[decoded, 0])
    run = succeeded(host.run(graph.prompt))
    text = text_shown(run, memory_text)
    assert text == text_shown(run, images_text)
    assert text.startswith("93 frames (5.8 s), 12 looked at\npalette: similarity to the first frame 0.")
    assert float(text.split("motion: ")[1].split(" %")[0]) > 0.5
    assert picture_shown(host, run, of_memory).width == 1280


def test_a_still_video_has_no_motion(host, graph, demo):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(host.base / "input" / "still.png")
    still = graph.add("LoadImage", image="still.png")
    video = graph.add("RepeatImageBatch", image=[still, 0], amount=48)
    _, node = consistency(graph, images=[video, 0])
    text = text_shown(succeeded(host.run(graph.prompt)), node)
    assert "palette: similarity to the first frame 1.000 on average, least 1.000" in text
    assert "motion: 0.00 % mean change" in text


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "connect either a memory, with a vae, or images"),
        (["memory"], "vae: the memory's video must be decoded"),
        (["memory", "vae", "images"], "connect either a memory"),
        (["images"], "too short for two samples"),
    ],
)
def test_wrong_inputs_are_named(host, graph, demo, inputs, message):
    Image.new("RGB", (64, 64)).save(host.base / "input" / "one.png")
    links = {"memory": [graph.memory(demo), 0], "vae": [demo, 2]}
    links["images"] = [graph.add("LoadImage", image="one.png"), 0]
    consistency(graph, **{name: links[name] for name in inputs})
    assert message in failure(host, graph)["exception_message"]
