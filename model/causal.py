"""The forward pass over any module tree with Wan's names: WanModel, and the network inside a ComfyUI MODEL.

Self-attention is an argument of the pass: `attend_self` gets raw (not yet rotated) queries, keys and values of a layer.

Shapes: B batch, C latent channels, T latent frames, H W latent rows and columns, P tokens per latent frame,
S tokens of one text group, G text groups, N heads, E head dim, D model width, L text tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .attention import Attention, sdpa

WanNet = Any
"""A module tree with Wan's names, or one of its modules: WanModel, the network inside a ComfyUI MODEL, a wrapped one.

The type of a submodule of nn.Module is `Tensor | Module`, so this is the only type that has the names.
"""

AttendSelf = Callable[..., Tensor]
"""(layer, q_BTPNE, k_BTPNE, v_BTPNE, inside) -> out_BTPNE; `inside` is the ModuleRunner of the parts of a block."""

ModuleRunner = Callable[..., Any]
"""(module, function, *args) -> function(module, *args). The pass runs the network and its blocks through one."""


def run_directly(module: WanNet, function: Callable, *args):
    """The ModuleRunner that only calls the function."""
    return function(module, *args)


class TextContext(NamedTuple):
    """Cross-attention keys and values of a prompt per layer, [B * G, L, N, E].

    With G > 1 groups the frames of a pass are split into G equal runs with one text each.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    num_groups: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def embed_text(net: WanNet, text_BLC: Tensor, num_groups: int = 1, run: ModuleRunner = run_directly) -> TextContext:
    """Text embeddings [B * G, L, C] -> keys and values of cross-attention.

    Wan attends to zero rows up to `text_len`. Their keys and values are equal, so they are computed once and get
    log(count) as bias (docs/method.md, Text). Raises ValueError for a text longer than `text_len`, or of another width.
    """
    if (width := text_BLC.shape[2]) != (expected := net.text_embedding[0].in_features):
        raise ValueError(f"text: embeddings of width {width}, the student's is {expected}; use its text encoder")
    if text_BLC.shape[1] > net.text_len:
        raise ValueError(f"text: {text_BLC.shape[1]} rows; it must be {net.text_len} at most, shorten the prompt")
    text_BLC, bias = without_padding(text_BLC), None
    num_used = text_BLC.shape[1]
    if num_padding := net.text_len - num_used:
        weights = padding_biases(num_padding, text_BLC.dtype)
        text_BLC = F.pad(text_BLC, (0, 0, 0, len(weights)))
        bias = F.pad(weights, (num_used, 0)).to(text_BLC.device)[None, None, None]
    embedded_BLD = net.text_embedding(text_BLC)
    keys, values = zip(*(run(block, _text_keys, embedded_BLD) for block in net.blocks))
    return TextContext(keys, values, bias, num_groups)


def without_padding(text_BLC: Tensor) -> Tensor:
    """Text embeddings without the zero rows at the end."""
    used = text_BLC.ne(0).any(dim=-1).any(dim=0).nonzero()
    return text_BLC[:, : int(used[-1]) + 1 if len(used) else 0]


def _text_keys(block: WanNet, embedded_BLD: Tensor) -> tuple[Tensor, Tensor]:
    attn = block.cross_attn
    return _heads(attn, attn.norm_k(attn.k(embedded_BLD))), _heads(attn, attn.v(embedded_BLD))


def padding_biases(count: int, dtype: torch.dtype) -> Tensor:
    """Score biases of a few equal rows with the weight of `count` rows: one in float32, up to four in bf16.

    In bf16, log(count) alone has a rounding error of up to 2 % of the weight.
    """
    biases, rest = [], float(count)
    while rest > 1e-5 * count:
        log = math.log(rest)
        # Rounded down, so that the rest stays positive.
        below = torch.tensor(log - abs(log) * torch.finfo(dtype).eps, dtype=dtype)
        biases.append(below)
        rest -= math.exp(below.item())
    return torch.stack(biases)


def causal_forward(
    net: WanNet,
    x_BCTHW: Tensor,
    timestep_BT: Tensor,
    text: TextContext,
    attend_self: AttendSelf,
    attention: Attention = sdpa,
    run: ModuleRunner = run_directly,
    processes: Any = None,
) -> Tensor:
    """Predicted flow [B, C, T, H, W] of latents at `timestep_BT`, 0 .. 1000 (docs/method.md, Network).

    With `processes` (sequence.Processes) the blocks get this process's part of the tokens of each frame.
    """
    x, temb_BTD, tproj_BT6D = _embed(net, x_BCTHW, timestep_BT, processes)
    for layer, block in enumerate(net.blocks):
        x = run(block, _block, x, tproj_BT6D, layer, text, attend_self, attention)
    shift, scale = (net.head.modulation.to(x) + temb_BTD[:, :, None]).unsqueeze(-2).unbind(dim=2)
    patches = net.head.head(net.head.norm(x) * (1 + scale) + shift)
    patches = processes.whole(patches, 2) if processes else patches
    _, patch_rows, patch_columns = net.patch_size
    return rearrange(
        patches, "B T (h w) (p q C) -> B C T (h p) (w q)",
        h=x_BCTHW.shape[3] // patch_rows, w=x_BCTHW.shape[4] // patch_columns, p=patch_rows, q=patch_columns,
    )  # fmt: skip


def last_keys(
    net: WanNet,
    x_BCTHW: Tensor,
    timestep_BT: Tensor,
    text: TextContext,
    attend_self: AttendSelf,
    attention: Attention = sdpa,
    run: ModuleRunner = run_directly,
    processes: Any = None,
) -> tuple[Tensor, Tensor]:
    """Raw keys and values [B, T, P, N, E] of the last layer, where `causal_forward` would go on to a flow.

    `attend_self` gets those of the other layers.
    """
    x, _, tproj_BT6D = _embed(net, x_BCTHW, timestep_BT, processes)
    *others, last = net.blocks
    for layer, block in enumerate(others):
        x = run(block, _block, x, tproj_BT6D, layer, text, attend_self, attention)
    k, v = run(last, _keys, x, tproj_BT6D)
    return processes.of_heads(k, v) if processes else (k, v)


def _embed(net: WanNet, x_BCTHW: Tensor, timestep_BT: Tensor, processes: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T, P, D], of which each process has a part, time embedding [B, T, D] and projection [B, T, 6, D]."""
    dtype = x_BCTHW.dtype
    tokens = net.patch_embedding(x_BCTHW.to(_patch_dtype(net.patch_embedding.weight))).to(dtype)
    x = rearrange(tokens, "B D T h w -> B T (h w) D")
    temb_BTD = net.time_embedding(sinusoid(timestep_BT, net.time_embedding[0].in_features).to(dtype))
    tproj_BT6D = net.time_projection(temb_BTD).unflatten(-1, (6, -1))
    return processes.part(x, 2) if processes else x, temb_BTD, tproj_BT6D


def _patch_dtype(weight: Tensor) -> torch.dtype:
    """The input dtype of the patch embedding. Layers with weights below 16 bits cast the weights to their input."""
    return weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.float32


def _block(
    block: WanNet,
    x_BTPD: Tensor,
    tproj_BT6D: Tensor,
    layer: int,
    text: TextContext,
    attend_self: AttendSelf,
    attention: Attention,
    inside: ModuleRunner = run_directly,
) -> Tensor:
    q, k, v, modulation = inside(block, _until_attention, x_BTPD, tproj_BT6D)
    y = attend_self(layer, q, k, v, inside)
    del q, k, v  # the feed-forward needs their room
    x, q_BSNE = inside(block, _until_text, x_BTPD, y, modulation)
    q_BSNE = rearrange(q_BSNE, "B (G S) N E -> (B G) S N E", G=text.num_groups)
    y = attention(q_BSNE, text.keys[layer], text.values[layer], text.bias)
    del q_BSNE
    return inside(block, _after_text, x, y, modulation)


def _keys(
    block: WanNet, x_BTPD: Tensor, tproj_BT6D: Tensor, inside: ModuleRunner = run_directly
) -> tuple[Tensor, Tensor]:
    _, k, v, _ = inside(block, _until_attention, x_BTPD, tproj_BT6D)
    return k, v


# Layers get [B, S, D]: ComfyUI's fast fp8 layers take no other shape.


def _until_attention(block: WanNet, x_BTPD: Tensor, tproj_BT6D: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    modulation_BT61D = (block.modulation.to(x_BTPD) + tproj_BT6D).unsqueeze(-2)
    attn, shift, scale = block.self_attn, modulation_BT61D[:, :, 0], modulation_BT61D[:, :, 1]
    y = (block.norm1(x_BTPD) * (1 + scale) + shift).flatten(1, 2)
    qkv = attn.norm_q(attn.q(y)), attn.norm_k(attn.k(y)), attn.v(y)
    q, k, v = (_heads(attn, tokens).unflatten(1, x_BTPD.shape[1:3]) for tokens in qkv)
    return q, k, v, modulation_BT61D


def _until_text(block: WanNet, x_BTPD: Tensor, y_BTPNE: Tensor, modulation_BT61D: Tensor) -> tuple[Tensor, Tensor]:
    y = block.self_attn.o(y_BTPNE.flatten(-2).flatten(1, 2))
    x = x_BTPD + modulation_BT61D[:, :, 2] * y.view_as(x_BTPD)
    attn = block.cross_attn
    return x, _heads(attn, attn.norm_q(attn.q(block.norm3(x).flatten(1, 2))))


def _after_text(block: WanNet, x_BTPD: Tensor, y_BSNE: Tensor, modulation_BT61D: Tensor) -> Tensor:
    shift, scale, gate = modulation_BT61D[:, :, 3:].unbind(dim=2)
    x = x_BTPD + block.cross_attn.o(y_BSNE.reshape(x_BTPD.shape).flatten(1, 2)).view_as(x_BTPD)
    y = (block.norm2(x) * (1 + scale) + shift).flatten(1, 2)
    return x + gate * block.ffn(y).view_as(x)


def compiled(**options) -> ModuleRunner:
    """A ModuleRunner that compiles the parts of a block around attention; `options` are those of torch.compile.

    Attention is not compiled because the memory grows. The other parts have the same shapes in every chunk and compile
    once for all blocks.
    """
    part_of = functools.cache(lambda part: torch.compile(part, **options))
    inside = lambda block, part, *args: part_of(part)(block, *args)

    def run(module: WanNet, function: Callable, *args):
        return function(module, *args, inside) if function in (_block, _keys) else function(module, *args)

    return run


def _heads(attn: WanNet, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.num_heads, -1))


def sinusoid(timestep_BT: Tensor, width: int) -> Tensor:
    """[cos(all), sin(all)] of t * 10000^(-i / half), [B, T, width]; float64 inside where the device has it."""
    half = width // 2
    real = torch.float32 if timestep_BT.device.type == "mps" else torch.float64
    frequency = 10000.0 ** (-torch.arange(half, device=timestep_BT.device, dtype=real) / half)
    angle = timestep_BT.to(real)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
