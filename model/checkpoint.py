"""Files on disk -> networks ready to run. Reading never executes code; every refusal is one line with a remedy."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .codec import DemoCodec
from .config import CARD_KEY, PRESETS, StudentCard, WanConfig
from .wan import WanModel

ASSETS = Path(__file__).parent / "assets"
DEMO_STUDENT = ASSETS / "demo_student.safetensors"
DEMO_CODEC = ASSETS / "demo_codec.safetensors"


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises ValueError for a missing, truncated or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def save_student(path: str | Path, net: nn.Module, card: StudentCard) -> None:
    """A student in Wan's layout with its card; ComfyUI's UNETLoader reads it too."""
    write_student(path, net.state_dict(), net.blocks[0].self_attn.num_heads, card)


def write_student(path: str | Path, state: dict[str, Tensor], num_heads: int, card: StudentCard) -> None:
    """The same from a state dict."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        CARD_KEY: card.to_json(),
        # What ComfyUI cannot guess from shapes: heads other than dim / 128, and that the model is causal.
        "config": json.dumps({"transformer": {"num_heads": num_heads, "causal_ar": True}}),
    }
    part = path.with_name(path.name + ".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, part, metadata)
    part.replace(path)


def infer_config(state: dict[str, Tensor], num_heads: int | None, path: str | Path) -> WanConfig:
    """Sizes of the network whose state dict this is. Raises ValueError when it is not a Wan 2.1 text-to-video model."""
    needed = ("patch_embedding.weight", "head.modulation", "head.head.weight", "blocks.0.ffn.0.weight",
              "text_embedding.0.weight", "time_embedding.0.weight")  # fmt: skip
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"{path}: not a Wan 2.1 model, {missing[0]} is missing; give a student in Wan's own layout")
    for key in needed:
        if key != "head.modulation" and state[key].ndim != (5 if key == needed[0] else 2):
            raise ValueError(f"{path}: not a Wan 2.1 model, {key} has shape {tuple(state[key].shape)}")
    dim, channels = state["patch_embedding.weight"].shape[:2]
    if "img_emb.proj.0.weight" in state or channels != PRESETS["wan2.1-1.3b"].channels:
        raise ValueError(
            f"{path}: a Wan model with {channels} input channels or image inputs; only text-to-video Wan 2.1"
            " (16 channels) can be rolled out"
        )
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.") and key.split(".")[1].isdigit()}
    return WanConfig(
        dim=dim,
        ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
        num_heads=num_heads or max(1, dim // 128),
        num_layers=max(layers) + 1,
        channels=channels,
        freq_dim=state["time_embedding.0.weight"].shape[1],
        text_dim=state["text_embedding.0.weight"].shape[1],
    )


def check_tensors(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, one line, unless the names and shapes are exactly the network's."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(
            f"{path}: {len(wrong)} of {len(expected)} tensors missing, extra or of another shape, first {wrong[0]}"
            f" (expected {expected.get(wrong[0])}, found {found.get(wrong[0])})"
        )


def read_card(path: str | Path | None = None) -> StudentCard:
    """The card of a student file, without its weights; None is the built-in one. Raises ValueError for a file that has
    none."""
    path = Path(path or DEMO_STUDENT)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return _card(metadata, path)


def _card(metadata: dict[str, str], path: str | Path) -> StudentCard:
    if CARD_KEY not in metadata:
        raise ValueError(
            f"{path}: no student card in its metadata; it was not exported by `context-forcing train`."
            " In ComfyUI, Load Diffusion Model reads plain Wan files"
        )
    try:
        return StudentCard.from_json(metadata[CARD_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_student(path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[WanModel, StudentCard]:
    """A student of our own export, strict; None is the built-in one.

    Raises ValueError, one line, for a file that is not such a student.
    """
    path = Path(path or DEMO_STUDENT)
    state, metadata = read_safetensors(path)
    try:
        num_heads = metadata_num_heads(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = infer_config(state, num_heads, path)
    card = _card(metadata, path)
    with torch.device("meta"):
        net = WanModel(config)
    check_tensors(net, state, path)
    net.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=True, assign=True)
    return net.eval().requires_grad_(False), card


def metadata_num_heads(metadata: dict[str, str]) -> int | None:
    """Heads as ComfyUI's `config` metadata gives them, or None where it does not. Raises ValueError for nonsense."""
    try:
        num_heads = json.loads(metadata.get("config", "{}")).get("transformer", {}).get("num_heads")
    except (json.JSONDecodeError, AttributeError):
        return None
    if num_heads is not None and (type(num_heads) is not int or num_heads < 1):
        raise ValueError(f"num_heads: {num_heads!r} in the metadata is not a number of heads")
    return num_heads


def load_demo_codec(path: str | Path | None = None) -> DemoCodec:
    """The demo codec from a file; None is the built-in one."""
    path = Path(path or DEMO_CODEC)
    state, _ = read_safetensors(path)
    if "stem.weight" not in state or "mean" not in state:
        raise ValueError(f"{path}: not a demo codec")
    width = state["stem.weight"].shape[0]
    num_blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    codec = DemoCodec(width, num_blocks)
    check_tensors(codec, state, path)
    codec.load_state_dict(state, strict=True)
    return codec.eval().requires_grad_(False)


SIGNS = 4096
"""Weights of a tensor, evenly spread, that its student is told from others by."""


def fingerprint(net: nn.Module, instead: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Short name of a network's weights: equal keys mean equal fingerprints. Works on any tree with Wan's names.

    `instead` are weights that count in place of those in the tree.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(net.named_parameters()):
        parameter = instead.get(name, parameter)
        flat = parameter.detach().flatten()
        # Signs: a student has one name in every precision it is stored or run in.
        sample = flat[:: max(1, flat.numel() // SIGNS)].float().signbit().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
