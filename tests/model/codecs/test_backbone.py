"""A backbone loads the codecs of its students, or names the files that it needs."""

import pytest
import torch

from context_forcing.model.codecs.backbone import DEMO, WAN, backbone_of
from context_forcing.model.codecs.wan_vae import WanVAE

CPU = torch.device("cpu")


def test_backbones_by_name():
    assert backbone_of("demo") is DEMO
    assert all(
        backbone_of(name) is WAN for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.1", "Wan2.1-T2V-1.3B-Diffusers")
    )
    assert DEMO.preview_vae is DEMO.preview_vae and WAN.preview_vae is None


def test_the_demo_world_needs_no_files():
    codecs = DEMO.load_codecs(CPU, torch.float32, ["a meadow"])
    assert codecs.text_encoder.encode("a meadow").shape == (1, 512, 4096)
    assert codecs.vae.decode(torch.zeros(1, 16, 1, 8, 16)).shape == (1, 3, 1, 64, 128)
    with pytest.raises(ValueError, match="^--vae: wan.safetensors is not used, the student is of the demo world"):
        DEMO.load_codecs(CPU, torch.float32, vae="wan.safetensors")


def test_wan_needs_files(models_dir, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for load in (WAN.built_in_codecs, lambda device: WAN.load_codecs(device, torch.float32, ["a meadow"])):
        with pytest.raises(ValueError, match="needs a text encoder and a VAE; give .* --text-encoder and --vae"):
            load(CPU)
    codecs = WAN.load_codecs(CPU, torch.float32, vae="wan.safetensors", models_dir=models_dir)
    assert isinstance(codecs.vae, WanVAE) and codecs.text_encoder.name == "none"
    codecs = WAN.load_codecs(CPU, torch.float32, ["a meadow", "a meadow"], models_dir=models_dir)
    assert codecs.text_encoder.encode("a meadow").ndim == 3 and codecs.text_encoder.name != "none"
