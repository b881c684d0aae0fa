"""UMT5's encoder, the text encoder of Wan 2.1 (docs/method.md, Codecs). All prompts pass one layer, then the next.

Weights stay in the file, memory-mapped. One layer at a time is copied to the device in float32 and freed again, so the
11 GB of UMT5-XXL are never in memory at once. Prompts that are encoded together or apart give the same bits.

Shapes: L tokens of a prompt, D width, N heads, E head dim.
"""

import html
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.float8 import scaled, split_scales
from ..checkpoints.locate import read_tensors, subfolder
from ..checkpoints.student import build
from ..fingerprint import fingerprint
from .demo_text import TEXT_DIM, TEXT_LEN

log = logging.getLogger("context_forcing")

Tokenize = Callable[[str], list[int]]
"""Text -> token numbers, without the end token."""

EOS = 1
EPS = 1e-6
MAX_DISTANCE = 128
"""Larger distances between tokens share one bucket."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PUBLISHED = "umt5_xxl_fp16.safetensors, models_t5_umt5-xxl-enc-bf16.pth or a diffusers folder text_encoder"


class UMT5Encoder(nn.Module):
    """The weights; their names are those of transformers' and ComfyUI's files."""

    def __init__(self, vocabulary: int, dim: int, inner: int, num_heads: int, num_buckets: int, ff: int, layers: int):
        super().__init__()
        linear = lambda in_dim, out_dim: nn.Linear(in_dim, out_dim, bias=False)
        norm = lambda: nn.RMSNorm(dim, eps=EPS)

        def block() -> nn.ModuleDict:
            attention: dict[str, Any] = {name: linear(dim, inner) for name in "qkv"} | {"o": linear(inner, dim)}
            attention["relative_attention_bias"] = nn.Embedding(num_buckets, num_heads)
            feed_forward = {"wi_0": linear(dim, ff), "wi_1": linear(dim, ff), "wo": linear(ff, dim)}
            parts = {"SelfAttention": attention, "DenseReluDense": feed_forward}
            layers = [nn.ModuleDict({name: nn.ModuleDict(part), "layer_norm": norm()}) for name, part in parts.items()]
            return nn.ModuleDict({"layer": nn.ModuleList(layers)})

        self.shared = nn.Embedding(vocabulary, dim)
        blocks = nn.ModuleList([block() for _ in range(layers)])
        self.encoder: Any = nn.ModuleDict({"block": blocks, "final_layer_norm": norm()})


@dataclass(frozen=True, kw_only=True)
class UMT5:
    """Prompts -> text embeddings. `scales` are factors of float8 weights, by the weight's name."""

    net: UMT5Encoder
    scales: Mapping[str, Tensor]
    tokenize: Tokenize
    device: torch.device

    @property
    def name(self) -> str:
        """Fingerprint of the weights."""
        return fingerprint(self.net)

    def tokens(self, prompt: str) -> list[int]:
        """Token numbers of the cleaned prompt, at most 512 with the end token."""
        tokens = self.tokenize(clean_text(prompt))
        if len(tokens) >= TEXT_LEN:
            log.warning("prompt: %d tokens, only the first %d are used: %.60s ...", len(tokens), TEXT_LEN - 1, prompt)
        return [*tokens[: TEXT_LEN - 1], EOS]

    @torch.inference_mode()
    def encode(self, prompts: Iterable[str]) -> list[Tensor]:
        """float32 rows [L, 4096] of each prompt, L <= 512, without padding, on the CPU.

        UMT5's attention mask hides padding from the words, so the rows are the same with padding.
        """
        tokens = [torch.tensor(self.tokens(prompt)) for prompt in prompts]
        embedding = self.net.shared.weight
        if max(int(number.max()) for number in tokens) >= len(embedding):
            raise ValueError("text-encoder: the tokenizer has more words than the weights; give a matching pair")
        rows = [self._ready("shared.weight", embedding[number.to(embedding.device)]) for number in tokens]
        for number, block in enumerate(self.net.encoder["block"]):
            prefix = f"encoder.block.{number}."
            weights = {name: self._ready(prefix + name, weight) for name, weight in block.named_parameters()}
            rows = [_block(weights, x) for x in rows]
        final = self._ready("encoder.final_layer_norm.weight", self.net.encoder["final_layer_norm"].weight)
        return [_norm(x, final).cpu() for x in rows]

    def _ready(self, name: str, weight: Tensor) -> Tensor:
        return scaled(weight.to(self.device), self.scales.get(name)).float()


def _norm(x_LD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_LD, weight_D.shape, weight_D, EPS)


def _block(weights: Mapping[str, Tensor], x_LD: Tensor) -> Tensor:
    attention = {name: weights[f"layer.0.SelfAttention.{name}.weight"] for name in "qkvo"}
    bias = weights["layer.0.SelfAttention.relative_attention_bias.weight"]
    num_buckets, num_heads = bias.shape
    y = _norm(x_LD, weights["layer.0.layer_norm.weight"])
    q, k, v = (rearrange(F.linear(y, attention[name]), "L (N E) -> 1 N L E", N=num_heads) for name in "qkv")
    bias_1NLL = bias[distance_buckets(len(x_LD), num_buckets).to(bias.device)].movedim(-1, 0)[None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1NLL.contiguous(), scale=1.0)
    x = x_LD + F.linear(rearrange(y, "1 N L E -> L (N E)"), attention["o"])
    wi_0, wi_1, wo = (weights[f"layer.1.DenseReluDense.{name}.weight"] for name in ("wi_0", "wi_1", "wo"))
    y = _norm(x, weights["layer.1.layer_norm.weight"])
    return x + F.linear(F.gelu(F.linear(y, wi_0), approximate="tanh") * F.linear(y, wi_1), wo)


def distance_buckets(num_tokens: int, num_buckets: int) -> Tensor:
    """Bucket of the distance from each token (row) to each other token (column).

    One half of the buckets is for earlier tokens, one for later. In each, the first half are single distances; the rest
    grow with the logarithm up to MAX_DISTANCE.
    """
    position = torch.arange(num_tokens)
    distance = position[None] - position[:, None]
    half = num_buckets // 2
    single = half // 2
    far = distance.abs().clamp(min=1).float() / single
    far = single + (far.log() / math.log(MAX_DISTANCE / single) * (half - single)).long()
    near = torch.where(distance.abs() < single, distance.abs(), far.clamp(max=half - 1))
    return near + half * (distance > 0)


def clean_text(prompt: str) -> str:
    """A prompt cleaned as in Wan's own code; ComfyUI does not clean prompts (docs/method.md, Text)."""
    ftfy, *_ = _libraries()
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _libraries():
    try:
        import ftfy
        import sentencepiece
        import tokenizers
    except ImportError as error:
        raise ValueError(f"text-encoder: {error.name} is not installed; pip install 'context-forcing[wan]'") from None
    return ftfy, sentencepiece, tokenizers


def load_umt5(path: str | Path, device: torch.device, tokenizer: Path | None = None, resident: bool = False) -> UMT5:
    """UMT5 from ComfyUI's files, also float8, from Wan's own, or from a folder in diffusers' layout.

    The tokenizer is the one inside ComfyUI's file, else that of the folder `tokenizer`, else one beside the file.
    `resident` keeps the weights on the device, for many calls. Raises ValueError, one line.
    """
    _libraries()
    path = subfolder(Path(path), "text_encoder")
    state = read_tensors(path)
    state.pop("encoder.embed_tokens.weight", None)
    spiece = state.pop("spiece_model", None)
    state, scales = ({from_wan(key): value for key, value in part.items()} for part in split_scales(state, {}, path))
    if reason := why_no_umt5(state):
        raise ValueError(f"{path}: {reason}; give {PUBLISHED}")
    if other := [key for key, value in state.items() if value.dtype not in FLOATS]:
        raise ValueError(f"{path}: {other[0]} is stored as {state[other[0]].dtype}; give fp32, fp16, bf16 or fp8")
    net = build(lambda: UMT5Encoder(*_sizes(state)), state, path)
    tokenize = find_tokenizer(path, tokenizer) if spiece is None else _sentencepiece(spiece.numpy().tobytes(), path)
    return UMT5(net=net.to(device) if resident else net, scales=scales, tokenize=tokenize, device=device)


def why_no_umt5(state: Mapping[str, Tensor]) -> str:
    """Why tensors are not those of UMT5-XXL's encoder, by names and width; empty if they may be."""
    keys = {from_wan(key): key for key in state}
    for name in ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"):
        if name not in keys:
            return f"not a UMT5 encoder, {name} is missing (its first tensor is {next(iter(state), 'nothing')})"
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    blocks = {key.split(".")[2] for key in keys if key.startswith("encoder.block.")}
    if any(bias.format(number) not in keys for number in blocks):
        return "a T5 without relative positions in every layer, not UMT5"
    if (width := state[keys["shared.weight"]].shape[-1]) != TEXT_DIM:
        return f"has width {width}, Wan 2.1 takes {TEXT_DIM}"
    return ""


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    block = "encoder.block.0.layer."
    num_buckets, num_heads = state[block + "0.SelfAttention.relative_attention_bias.weight"].shape
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.block."))
    inner = len(state[block + "0.SelfAttention.q.weight"])
    ff = len(state.get(block + "1.DenseReluDense.wo.weight", torch.empty(0, 0)).T)
    return (*state["shared.weight"].shape, inner, num_heads, num_buckets, ff, layers)


FROM_WAN = {
    "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm", "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k", "attn.v": "layer.0.SelfAttention.v", "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0", "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}  # fmt: skip
FROM_WAN_OUTER = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


def from_wan(key: str) -> str:
    """The name in transformers' layout of a tensor in Wan's own; an unknown name is unchanged."""
    start, _, rest = key.partition(".")
    number, _, name = rest.partition(".")
    name = FROM_WAN.get(name.removesuffix(".weight"))
    return f"encoder.block.{number}.{name}.weight" if start == "blocks" and name else FROM_WAN_OUTER.get(key, key)


def find_tokenizer(weights: Path, folder: Path | None) -> Tokenize:
    """The tokenizer in a folder, else one beside the weights as in Wan's repository. Raises ValueError."""
    parent = weights.parent
    folders = [folder] if folder else [weights, parent / "tokenizer", parent / "google" / "umt5-xxl", parent]
    for path in (place / name for place in folders for name in ("tokenizer.json", "spiece.model")):
        if path.is_file():
            return _json_tokenizer(path) if path.suffix == ".json" else _sentencepiece(path.read_bytes(), path)
    raise ValueError(
        f"{weights}: no tokenizer inside, and no tokenizer.json or spiece.model in {', '.join(map(str, folders))}; copy"
        " them from google/umt5-xxl, or give ComfyUI's umt5_xxl_fp16.safetensors"
    )


def _sentencepiece(proto: bytes, path: Path) -> Tokenize:
    _, library, _ = _libraries()
    try:
        return library.SentencePieceProcessor(model_proto=proto).encode
    except RuntimeError as error:
        raise ValueError(f"{path}: the tokenizer is not a SentencePiece model ({error})") from None


def _json_tokenizer(path: Path) -> Tokenize:
    *_, library = _libraries()
    text = path.read_text(encoding="utf-8")
    if not text.startswith("{"):
        raise ValueError(f"{path}: not the JSON of a tokenizer; download it again")
    tokenizer = library.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
