"""The templates for published students in a real ComfyUI, on tiny files of the same layouts under the same names."""

import re
from pathlib import Path

import pytest
import torch

from .graph import film, only, succeeded
from .host import CHECKOUT, Host, template, to_api
from .test_blueprints import unpacked
from .tiny_models import LORA, write_tiny_models

pytestmark = [pytest.mark.host, pytest.mark.slow]

NAMES = sorted(path.stem for path in (CHECKOUT / "workflows").glob("*.json") if not path.stem.startswith("Tutorial"))
LOADERS = {
    "ContextForcingLoadStudent": ("student", "diffusion_models"),
    "UNETLoader": ("unet_name", "diffusion_models"),
    "CLIPLoader": ("clip_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
}
SEGMENT_SECONDS, FPS = 2.25, 16


@pytest.fixture(scope="module")
def student_host(comfyui, tmp_path_factory):
    """A server with the files; its Load CLIP takes a tiny UMT5."""
    base = tmp_path_factory.mktemp("comfyui")
    write_tiny_models(base)
    server = Host(comfyui, base, packs=[Path(__file__).parent / "tiny_umt5"])
    server.start()
    yield server
    server.stop()


def short(prompt: dict) -> int:
    """Make a prompt small and its segments short; its prompts and options stay. Returns the seconds of the video."""
    prompt[only(prompt, "ContextForcingMemory")]["inputs"] |= {"width": 64, "height": 32}
    inputs = prompt[only(prompt, "ContextForcingStoryboard")]["inputs"]
    lines = [line for line in inputs["text"].splitlines() if line and not line.startswith("#")]
    times = [SEGMENT_SECONDS * number for number in range(len(lines))]
    inputs["text"] = "\n".join(f"{time} {line.partition(' ')[2]}" for time, line in zip(times, lines))
    return times[-1]


def files_of(prompt: dict) -> dict[str, str]:
    """Folder of each model file that a prompt names."""
    entries = [entry for entry in prompt.values() if entry["class_type"] in LOADERS]
    named = [(entry["inputs"], *LOADERS[entry["class_type"]]) for entry in entries]
    return {inputs[name]: folder for inputs, name, folder in named}


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_its_video(student_host, name):
    prompt = to_api(template(name), student_host.get("/object_info"))
    seconds = short(prompt)
    story = only(prompt, "ContextForcingStoryboard")
    keep = {"memory": [story, 0], "filename_prefix": f"context_forcing/{name}", "form": "exact"}
    prompt["keep"] = {"class_type": "ContextForcingSaveMemory", "inputs": keep}
    run = succeeded(student_host.run(prompt))
    (shown,) = run.outputs[only(prompt, "ContextForcingSaveVideo")]["images"]
    assert student_host.output_path(shown).stat().st_size > 1000
    latents = film(student_host, run, "keep")
    assert latents.shape == (1, 16, seconds * FPS / 4, 4, 8) and torch.isfinite(latents).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(host, object_info, name):
    """On a server without models."""
    prompt = to_api(template(name), object_info)
    reply = str(host.post("/prompt", {"prompt": prompt})["node_errors"])
    for file in [*files_of(prompt), *([LORA] if "LoRA" in name else [])]:
        assert file in reply


@pytest.mark.parametrize("name", NAMES)
def test_the_note_and_the_page_know_every_file(object_info, name):
    """The page offers files that a node lists in its properties."""
    workflow = template(name)
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    files = files_of(to_api(workflow, object_info))
    offered = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert {model["name"]: model["directory"] for model in offered} == files
    for file, folder in files.items():
        assert file in note and f"`models/{folder}`" in note
    assert all(re.match(r"https://huggingface\.co/\w", model["url"]) for model in offered)


def test_the_blueprint_of_a_long_video_runs(student_host):
    files = {"student": "self_forcing_dmd.pt", "card": "self-forcing", "vae": "wan_2.1_vae.safetensors"}
    encoder = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    values = {"width": 64, "height": 32, "text": "0:00 A boat.\n0:01.5", "seed": 7, "filename_prefix": "video/one_node"}
    info = student_host.get("/object_info")
    prompt, outputs = unpacked("Long Video from a Storyboard", {**files, **values, "text_encoder": encoder}, info)
    keep = {"memory": outputs["memory"], "filename_prefix": "context_forcing/one_node", "form": "compact"}
    prompt["keep"] = {"class_type": "ContextForcingSaveMemory", "inputs": keep}
    run = succeeded(student_host.run(prompt))
    assert run.outputs[outputs["video"][0]]["images"]
    assert film(student_host, run, "keep").shape == (1, 16, 6, 4, 8)
