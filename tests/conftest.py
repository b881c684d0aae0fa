import importlib
import io
import os
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from safetensors.torch import save_file

from context_forcing.benchmark.random_net import random_net
from context_forcing.memory import Memory, MemoryConfig
from context_forcing.memory import empty_memory as new_empty_memory
from context_forcing.model.checkpoints.student import write_student
from context_forcing.model.codecs.umt5 import UMT5Encoder
from context_forcing.model.codecs.wan_vae import WanVAE
from context_forcing.model.config import WanConfig
from context_forcing.model.network import Network
from context_forcing.model.sampler import CausalSampler, SamplerOptions
from context_forcing.model.wan import WanModel

collect_ignore = ["host"]
"""ComfyUI's Python runs these (tests/nodes/test_inside_comfyui.py)."""

# The networks here are so small that threads only wait for each other.
torch.set_num_threads(1)

LATENT_SIZE = (16, 4, 6)
"""2 x 3 tokens a frame: not square, so that rows and columns cannot be mistaken for each other."""


@pytest.fixture(autouse=True)
def _no_global_randomness():
    torch.manual_seed(0)


def _make_net(seed: int = 0, **sizes) -> WanModel:
    """A tiny random network in which every part matters: nothing is zero, no gate is shut."""
    defaults = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16)
    return random_net(WanConfig(**{**defaults, **sizes}), seed)


@pytest.fixture(scope="session")
def make_net():
    """(seed, **sizes) -> a tiny random network."""
    return _make_net


@pytest.fixture(scope="session")
def save_student():
    """(path, net, card) -> the network written as a student file."""
    return lambda path, net, card: write_student(path, net.state_dict(), net.config.num_heads, card)


@pytest.fixture(scope="session")
def net():
    return _make_net()


@pytest.fixture(scope="session")
def make_sampler():
    """(net, prompt seed, **options) -> a sampler under `text`, or a random prompt of five rows, on the CPU.

    Options are those of Network, SamplerOptions and CausalSampler.
    """

    def make(net, prompt: int = 0, text=None, dtype=torch.float32, **options) -> CausalSampler:
        if text is None:
            text = torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(prompt))
        pick = lambda *names: {name: options.pop(name) for name in names if name in options}
        network = Network(net, torch.device("cpu"), dtype, **pick("attention", "run", "on_pass"))
        how = SamplerOptions(**pick("kv_placement", "check_finite"))
        return CausalSampler(network=network, text=network.embed_text(text), options=how, **options)

    return make


@pytest.fixture(scope="session")
def empty_memory():
    """(**settings) -> an empty memory of tiny latents."""

    def make(**settings) -> Memory:
        return new_empty_memory(MemoryConfig(**settings), LATENT_SIZE)

    return make


@pytest.fixture(scope="session")
def same_memory():
    """(a, b) -> True where two memories are equal in every field, bit for bit."""

    def same(a: Memory, b: Memory) -> bool:
        plain = ("config", "latent_size", "slots", "decisions", "recalls", "segments", "student", "scene_begins")
        alike = lambda x, y: x is y if x is None or y is None else torch.equal(x, y)
        return (
            all(getattr(a, name) == getattr(b, name) for name in plain)
            and all(alike(getattr(a, name), getattr(b, name)) for name in ("text", "start_latents"))
            and a.store.state()[0] == b.store.state()[0]
            and [frame for frame, _ in a.store.frame_kvs()] == [frame for frame, _ in b.store.frame_kvs()]
            and len(a.tensors()) == len(b.tensors())
            and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors()))
        )

    return same


def _draw(net, seed: int, gain: float = 0.7) -> dict[str, torch.Tensor]:
    """A state dict of random weights, scaled so that what goes through stays near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in net.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        is_norm = "norm" in key or key.endswith("gamma")
        state[key] = 1 + 0.1 * drawn if is_norm else drawn * gain / max(1, value[0].numel()) ** 0.5
    return state


def make_wan_vae() -> dict[str, torch.Tensor]:
    """A Wan VAE of width 8, names as in Wan2.1_VAE.pth."""
    return _draw(WanVAE(8), 0)


def make_tiny_decoder(widths=(12, 8, 6, 4), strides=(1, 2, 2), channels=16) -> dict[str, torch.Tensor]:
    """A tiny decoder, names and shapes as in taew2_1.safetensors but for the widths; of its encoder one tensor."""
    shapes = {"encoder.0.weight": (64, 3, 3, 3), "decoder.1": (widths[0], channels, 3), "decoder.22": (3, widths[3], 3)}
    for level, (dim, out_dim, stride) in enumerate(zip(widths, widths[1:], strides)):
        first = 3 + 6 * level
        for block in range(first, first + 3):
            shapes |= {f"decoder.{block}.conv.{i}": (dim, 2 * dim if i == 0 else dim, 3) for i in (0, 2, 4)}
        shapes[f"decoder.{first + 4}.conv.weight"] = (dim * stride, dim, 1, 1)
        shapes[f"decoder.{first + 5}.weight"] = (out_dim, dim, 3, 3)
    state, generator = {}, torch.Generator().manual_seed(3)
    for name, (out_dim, dim, *sides) in shapes.items():
        weight = (
            torch.randn(out_dim, dim, sides[0], sides[0], generator=generator) * (1.4 / (dim * sides[0] ** 2)) ** 0.5
        )
        if name.endswith(".weight"):
            state[name] = weight
        else:
            state |= {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(out_dim, generator=generator)}
    state["decoder.22.bias"] += 0.5
    return state


def make_umt5() -> dict[str, torch.Tensor]:
    """A UMT5 encoder of two thin layers, names as in ComfyUI's umt5_xxl_fp16.safetensors."""
    state = _draw(UMT5Encoder(256, 4096, 16, 2, 32, 16, 2), 1)
    return {key: 30 * value if "relative" in key else value for key, value in state.items()}


def scaled_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear weights of a text encoder as ComfyUI's published scaled float8 files keep them."""
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        scaled[key] = value
        if value.ndim == 2 and "layer." in key and "relative" not in key:
            scale = value.abs().max() / 448
            scaled[key] = (value / scale).to(torch.float8_e4m3fn)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale
    return scaled


@pytest.fixture(scope="session")
def wan_vae_state():
    return make_wan_vae()


@pytest.fixture(scope="session")
def tiny_decoder_state():
    return make_tiny_decoder()


@pytest.fixture(scope="session")
def umt5_state():
    return make_umt5()


def make_spiece() -> bytes:
    """A SentencePiece model of few words, ends and padding numbered as UMT5's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = ["a meadow by day, the camera pans right", "snow at night; fog over a desert", "it turns slowly left"] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="session")
def spiece() -> bytes:
    return make_spiece()


@pytest.fixture(scope="session")
def models_dir(wan_vae_state, umt5_state, spiece, tmp_path_factory) -> Path:
    """A ComfyUI models folder with a tiny VAE and text encoder in ComfyUI's files, and other files beside them."""
    root = tmp_path_factory.mktemp("models")
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (root / folder).mkdir()
    with_words = {**umt5_state, "spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    save_file(with_words, root / "text_encoders" / "umt5.safetensors")
    save_file({"text_model.embeddings": torch.zeros(2, 2)}, root / "text_encoders" / "clip_l.safetensors")
    (root / "text_encoders" / "put_text_encoders_here").write_text("")
    save_file(wan_vae_state, root / "vae" / "wan.safetensors")
    wan22 = {**wan_vae_state, "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}
    save_file(wan22, root / "vae" / "wan2.2_vae.safetensors")
    (root / "vae" / "broken.pt").write_bytes(b"not a pickle")
    return root


@pytest.fixture
def ffmpeg_that(tmp_path_factory, monkeypatch):
    """(before, after) -> ffmpeg runs these shell commands before and after it encodes; $file is its output."""
    if os.name == "nt":
        pytest.skip("a shell script stands in for ffmpeg")
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()

    def stand_in(before=":", after=":"):
        script = tmp_path_factory.mktemp("ffmpeg") / "ffmpeg"
        script.write_text(
            f"""#!/bin/sh
            ffmpeg='{ffmpeg}'
            case "$*" in *"-i - "*) ;; *) exec "$ffmpeg" "$@" ;; esac
            for file; do :; done
            file="${{file#file:}}"
            {before}
            "$ffmpeg" "$@"
            status=$?
            {after}
            exit $status
            """
        )
        script.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))

    return stand_in


@pytest.fixture(scope="session")
def node_module():
    """(name) -> a module of nodes/, imported with stubs in place of ComfyUI's modules; empty for nodes/ itself."""
    from .nodes import comfyui_stub  # ComfyUI's Python loads this file by its path

    finder = comfyui_stub.install()
    comfyui_stub.define_types()
    yield lambda name: importlib.import_module(f"context_forcing.nodes.{name}".rstrip("."))
    sys.meta_path.remove(finder)
    for name in list(sys.modules):
        if name.split(".")[0] in comfyui_stub.PACKAGES or name.startswith("context_forcing.nodes"):
            del sys.modules[name]
