"""Every example workflow, as ComfyUI's page sends it, in a real ComfyUI."""

import io
import json
import urllib.parse
from itertools import pairwise

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from context_forcing.model.checkpoints.student import DEMO_STUDENT, StudentSource

from .graph import FOLDER, film, load_memory_input, memory_file, nodes, only, picture_shown, succeeded
from .host import CHECKOUT, PACK, template, to_api

pytestmark = [pytest.mark.host, pytest.mark.slow]

FILES = {path.stem: path for path in (CHECKOUT / "workflows").glob("*.json")}
SECONDS = 1.5
SHORT_FRAMES = 6


@pytest.fixture
def load(object_info):
    """A workflow as a prompt, with short segments."""

    def load(name: str) -> dict:
        prompt = to_api(template(name), object_info)
        for sampler in nodes(prompt, "ContextForcingSampler"):
            prompt[sampler]["inputs"]["seconds"] = SECONDS
        return prompt

    return load


def keep(prompt: dict, sampler: str) -> str:
    """Save the memory after a sampler, too."""
    inputs = {"memory": [sampler, 0], "filename_prefix": f"{FOLDER}/workflows", "form": "compact"}
    prompt[f"keep {sampler}"] = {"class_type": "ContextForcingSaveMemory", "inputs": inputs}
    return f"keep {sampler}"


def video(host, run, save: str) -> np.ndarray:
    """Frames of a saved video [T, H, W, 3], at the student's size again."""
    (shown,) = run.outputs[save]["images"]
    reader = imageio_ffmpeg.read_frames(str(host.output_path(shown)))
    width, height = next(reader)["size"]
    scale = width // StudentSource(DEMO_STUDENT).open().card.size[0]
    frames = np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])
    return frames[:, scale // 2 :: scale, scale // 2 :: scale]


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


def test_they_are_templates_with_a_moving_picture_and_a_note(host):
    """The page asks for NAME.jpg; a browser sees by its content that it is a WebP."""
    assert sorted(host.get("/api/workflow_templates")[PACK]) == sorted(FILES)
    for name in FILES:
        address = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}"
        workflow = host.get(f"{address}.json")
        (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
        assert note.startswith("## ") and len(note) < 1300
        data = host.get_bytes(f"{address}.jpg")
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "WEBP" and picture.n_frames > 20 and len(data) < 300_000, name


def test_three_futures_share_their_past(host, load):
    prompt = load("Tutorial 3")
    past, *futures = nodes(prompt, "ContextForcingSampler")
    assert [prompt[future]["inputs"]["memory"] for future in futures] == [[past, 0]] * 3
    kept = [keep(prompt, future) for future in futures]
    run = succeeded(host.run(prompt))
    films = [film(host, run, saved) for saved in kept]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert films[a].shape[2] == 2 * SHORT_FRAMES
        assert torch.equal(films[a][:, :, :SHORT_FRAMES], films[b][:, :, :SHORT_FRAMES])
        assert (films[a] - films[b])[:, :, SHORT_FRAMES:].abs().mean() > 0.1
    videos = [video(host, run, save) for save in nodes(prompt, "ContextForcingSaveVideo")]
    assert [len(frames) for frames in videos] == [8 * SHORT_FRAMES - 3] * 3

    text = prompt[futures[2]]["inputs"]["positive"][0]
    prompt[text]["inputs"]["text"] = "Snow under a clear sky by day. The camera stays."
    run = succeeded(host.run(prompt))
    assert {past, *futures[:2]} <= run.cached and futures[2] in run.executed


def test_a_video_begins_with_the_picture(host, load):
    prompt = load("Tutorial 4")
    run = succeeded(host.run(prompt))
    picture = np.asarray(picture_shown(host, run, only(prompt, "PreviewImage")).convert("RGB"))
    frames = video(host, run, only(prompt, "ContextForcingSaveVideo"))
    assert len(frames) == 8 * SHORT_FRAMES - 3
    assert psnr(frames[0], picture) > 30
    assert psnr(frames[len(frames) // 2], picture) < 20, "the camera does not turn away"


def test_a_continued_video_goes_on_where_the_clip_ends(host, load):
    prompt = load("Tutorial 5")
    clip, whole = nodes(prompt, "ContextForcingSaveVideo")
    run = succeeded(host.run(prompt))
    clip, whole = video(host, run, clip), video(host, run, whole)
    assert len(clip) == 4 * SHORT_FRAMES - 3 and len(whole) == 8 * SHORT_FRAMES - 3
    assert min(psnr(given, made) for given, made in zip(clip, whole)) > 30
    steps = [psnr(a, b) for a, b in pairwise(whole)]
    assert steps[len(clip) - 1] > min(steps[: len(clip) - 1]) - 2, "the picture jumps where the clip ends"


def test_a_saved_video_goes_on_to_the_bit(host, load):
    """Tomorrow's graph has no node of today's but the student's loader."""
    today, tomorrow = load("Tutorial 6"), load("Tutorial 7")
    loader, second = only(tomorrow, "ContextForcingLoadMemory"), only(tomorrow, "ContextForcingSampler")
    assert len(nodes(today, "ContextForcingSampler")) == 1 and not nodes(tomorrow, "ContextForcingMemory")
    run = succeeded(host.run(today))
    file = memory_file(host, run, only(today, "ContextForcingSaveMemory"))
    assert len(video(host, run, only(today, "ContextForcingSaveVideo"))) == 4 * SHORT_FRAMES - 3
    assert tomorrow[loader]["inputs"]["file"] == load_memory_input(host, file), "the first file that today saves"

    kept = keep(tomorrow, second)
    run = succeeded(host.run(tomorrow))
    assert len(video(host, run, only(tomorrow, "ContextForcingSaveVideo"))) == 8 * SHORT_FRAMES - 3
    resumed = film(host, run, kept)
    whole = {f"today {node}": entry for node, entry in json.loads(json.dumps(today)).items()}
    for entry in whole.values():
        wires = {name: [f"today {v[0]}", v[1]] for name, v in entry["inputs"].items() if isinstance(v, list)}
        entry["inputs"] |= wires
    tomorrow[second]["inputs"]["memory"] = [f"today {only(today, 'ContextForcingSampler')}", 0]
    tomorrow[second]["inputs"]["model"] = [f"today {only(today, 'ContextForcingLoadDemo')}", 0]
    assert torch.equal(resumed, film(host, succeeded(host.run(tomorrow | whole)), kept))
