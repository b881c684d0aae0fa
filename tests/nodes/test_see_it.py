"""What a memory holds and how a video keeps, drawn in a real ComfyUI."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from .graph import PROMPTS, failure, succeeded
from .test_memory_in_hand import FOLDER, saved_memory

pytestmark = [pytest.mark.host, pytest.mark.slow]


def report(graph, demo, memory, **settings):
    """The node, and one that shows its text."""
    node = graph.add("ContextForcingMemoryReport", memory=[memory, 0], vae=[demo, 2], fps=16.0, **settings)
    return node, graph.add("PreviewAny", source=[node, 1])


def consistency(graph, every=0.5, **inputs):
    node = graph.add("ContextForcingConsistency", every=every, fps=16.0, **inputs)
    return node, graph.add("PreviewAny", source=[node, 1])


def picture(host, run, node):
    (shown,) = run.outputs[node]["images"]
    return Image.open(io.BytesIO(host.view(shown)))


def text(run, node):
    return run.outputs[node]["text"][0]


def shares(line):
    """`...: sink 1.0%, slow 2.0%` -> {"sink": 0.01, ...}."""
    pairs = (pair.rsplit(" ", 1) for pair in line.split(": ")[1].split(", "))
    return {part: float(share.rstrip("%")) / 100 for part, share in pairs}


def test_the_report_says_what_happened(host, graph, demo):
    """Attention when a model is connected; and what `report --attention` says of the same memory."""
    first = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=4.5)
    end = graph.sampler(demo, graph.text(demo, PROMPTS[1]), first, seconds=1.5, change="cut")
    (plain, plain_text), (looking, looking_text) = report(graph, demo, end), report(graph, demo, end, model=[demo, 0])
    kept = graph.add("ContextForcingSaveMemory", memory=[end, 0], filename_prefix=f"{FOLDER}/seen", form="exact")
    run = succeeded(host.run(graph.prompt))
    assert "forgotten: 15 frames by the cut at 4.5 s" in text(run, plain_text)
    assert "attention" not in text(run, plain_text)
    assert picture(host, run, looking).height > picture(host, run, plain).height
    found = shares(text(run, looking_text).splitlines()[-1])
    assert list(found) == ["sink", "slow", "fast", "the chunk itself"]
    assert sum(found.values()) == pytest.approx(1, abs=0.003) and found["sink"] > 0

    file = host.base / "output" / saved_memory(host, run, kept).removesuffix(" [output]")
    command = [sys.executable, "-c", "from context_forcing.cli import main; main()", "report", str(file), "-o"]
    command += [str(host.base / "report.png"), "--attention", "--device", "cpu"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert text(run, looking_text) in done.stderr


def test_the_report_looks_into_a_compact_memory(host, graph, demo):
    end = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=1.5, keep_in="compact")
    _, said = report(graph, demo, end, model=[demo, 0])
    assert "attention of the next chunk" in text(succeeded(host.run(graph.prompt)), said)


def test_an_empty_memory_has_no_attention(host, graph, demo):
    report(graph, demo, graph.memory(demo), model=[demo, 0])
    assert "nothing was made on it yet" in failure(host, graph)["exception_message"]


def test_a_memory_and_its_decoded_frames_are_as_consistent_as_each_other(host, graph, demo):
    end = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=6.0)
    decoded = graph.add("VAEDecode", samples=[end, 1], vae=[demo, 2])
    (of_memory, said), (_, said_of_images) = (
        consistency(graph, memory=[end, 0], vae=[demo, 2]),
        consistency(graph, images=[decoded, 0]),
    )
    run = succeeded(host.run(graph.prompt))
    assert text(run, said) == text(run, said_of_images)
    assert text(run, said).startswith("93 frames (5.8 s), 12 looked at\npalette: similarity to the first frame 0.")
    moved = float(text(run, said).split("motion: ")[1].split(" %")[0])
    assert moved > 0.5
    assert picture(host, run, of_memory).width == 1280


def test_a_still_picture_is_said_not_to_move(host, graph, demo):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(host.base / "input" / "still.png")
    still = graph.add("LoadImage", image="still.png")
    film = graph.add("RepeatImageBatch", image=[still, 0], amount=48)
    _, said = consistency(graph, images=[film, 0])
    found = text(succeeded(host.run(graph.prompt)), said)
    assert "palette: similarity to the first frame 1.000 on average, least 1.000" in found
    assert "motion: 0.00 % mean change" in found


@pytest.mark.parametrize(
    "inputs, words",
    [
        ([], "connect either a memory, with a vae, or images"),
        (["memory"], "vae: the memory's video must be decoded"),
        (["memory", "vae", "images"], "connect either a memory"),
        (["images"], "too short for two looks"),
    ],
)
def test_what_cannot_be_compared_is_named(host, graph, demo, inputs, words):
    Image.new("RGB", (64, 64)).save(host.base / "input" / "one.png")
    wires = {"memory": [graph.memory(demo), 0], "vae": [demo, 2]}
    wires["images"] = [graph.add("LoadImage", image="one.png"), 0]
    consistency(graph, **{name: wires[name] for name in inputs})
    assert words in failure(host, graph)["exception_message"]
