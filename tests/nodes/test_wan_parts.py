"""Our Wan VAE and UMT5 read ComfyUI's files, and compute what ComfyUI computes with them."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from context_forcing.model.codecs.umt5 import load_umt5
from context_forcing.model.codecs.wan_vae import load_wan_vae
from safetensors.torch import load_file

pytestmark = pytest.mark.host

PROMPTS = ["a meadow by day, the camera pans right", "snow", "fog over a desert " * 12]


@pytest.fixture(scope="module")
def folder(comfyui, spiece, tmp_path_factory):
    pytest.importorskip("ftfy")
    folder = tmp_path_factory.mktemp("parts")
    (folder / "spiece.model").write_bytes(spiece)
    (folder / "prompts.json").write_text(json.dumps([prompt.strip() for prompt in PROMPTS]))
    script = Path(__file__).with_name("wan_parts_check.py")
    done = subprocess.run([comfyui.python, script, comfyui.path, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_vae(folder):
    vae, made = load_wan_vae(folder / "vae.safetensors"), load_file(folder / "made.safetensors")
    assert made["decoded"].std() > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(made["pixels"]), made["encoded"], atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(made["raw"]), made["decoded"].clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["umt5", "umt5_fp8"])
def test_the_text_encoder(folder, name):
    """ComfyUI pads to 512 rows, those of padding zero."""
    encoder = load_umt5(folder / f"{name}.safetensors", torch.device("cpu"))
    made = load_file(folder / "made.safetensors")
    for number, rows in enumerate(encoder.encode(PROMPTS)):
        tokens = encoder.tokens(PROMPTS[number])
        assert made[f"tokens.{number}"].tolist() == tokens + [0] * (512 - len(tokens))
        expected = made[f"{name}.{number}"][0]
        assert expected.shape == (512, 4096) and not expected[len(rows) :].any() and rows.std() > 0.3
        torch.testing.assert_close(rows, expected[: len(rows)].float(), atol=1e-5, rtol=1e-5)
