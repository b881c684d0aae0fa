"""Attention functions by name, each tested once before it is used.

Shapes: B batch, S queries, K keys, N heads, E head dim.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..memory.fields import brief, quoted

Attention = Callable[..., Tensor]
"""(q_BSNE, k_BKNE, v_BKNE, bias=None) -> out_BSNE. `bias` is added to the scores and broadcasts to [B, N, S, K]."""

EXACT, EIGHT_BITS, FOUR_BITS = 0.02, 0.1, 0.35
"""Largest error of a self-test by kind of arithmetic, as a share of the output's norm (docs/performance.md)."""

NUM_QUERIES, NUM_KEYS, NUM_LAST = 1097, 2309, 5
"""Sizes of a self-test. Neither is a multiple of a kernel's block, and the last keys have a block of their own."""


def sdpa(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's exact attention, for every device."""
    out = F.scaled_dot_product_attention(
        q_BSNE.transpose(1, 2), k_BKNE.transpose(1, 2), v_BKNE.transpose(1, 2), attn_mask=bias
    )
    return out.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A package with an attention function that takes no bias."""

    package: str
    function: str
    heads_first: bool = False
    """Whether its tensors are [B, N, S, E] instead of [B, S, N, E]."""
    options: Mapping[str, object] = field(default_factory=dict)
    max_head_dim: int
    tolerance: float
    install: str
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def check(self, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Raises ValueError for what the package does not take."""
        if device.type not in self.devices:
            raise ValueError(f"attention: {name} runs on CUDA, not on {device.type}; use sdpa")
        if dtype not in self.dtypes:
            shown = str(dtype).removeprefix("torch.")
            raise ValueError(f"attention: {name} takes float16 and bfloat16, not {shown}; use bf16, or sdpa")
        if head_dim > self.max_head_dim:
            raise ValueError(
                f"attention: {name} takes heads of {self.max_head_dim} channels at most, not {head_dim}; use sdpa"
            )


BACKENDS = {
    "flash": Backend(
        package="flash_attn", function="flash_attn_func", max_head_dim=256, tolerance=EXACT,
        install="pip install flash-attn --no-build-isolation",
    ),
    "sage": Backend(
        package="sageattention", function="sageattn", max_head_dim=128, tolerance=EIGHT_BITS,
        options={"tensor_layout": "NHD", "is_causal": False},
        install="pip install sageattention, or version 2 by docs/performance.md",
    ),
    "sage3": Backend(
        package="sageattn3", function="sageattn3_blackwell", heads_first=True, max_head_dim=255, tolerance=FOUR_BITS,
        options={"is_causal": False}, install="install it by docs/performance.md",
    ),
}  # fmt: skip
ATTENTIONS = ("sdpa", *BACKENDS)


def check_attention_name(name: str) -> None:
    """Raises ValueError for an unknown name. Whether the package is here is not asked."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: {quoted(name)} is not one of {', '.join(ATTENTIONS)}")


def find_attention(name: str) -> Attention:
    """An attention function by name, not tested. Raises ValueError for an unknown name or a package that is missing."""
    check_attention_name(name)
    if name == "sdpa":
        return sdpa
    backend = BACKENDS[name]
    try:
        function = getattr(importlib.import_module(backend.package), backend.function)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        needs = f"{name} needs the package {backend.package} ({brief(error)})"
        raise ValueError(f"attention: {needs}; {backend.install}, or use sdpa") from None
    return _adapted(name, function)


@functools.cache
def _adapted(name: str, function: Callable[..., Tensor]) -> Attention:
    """A package's function as an Attention. Calls with a bias, those of prompts, are exact."""
    backend = BACKENDS[name]
    turn = (lambda x: x.transpose(1, 2)) if backend.heads_first else (lambda x: x)

    def attention(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return sdpa(q_BSNE, k_BKNE, v_BKNE, bias)
        return turn(function(turn(q_BSNE), turn(k_BKNE), turn(v_BKNE), **backend.options))

    return attention


def load_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """An attention function by name, tested on this device with heads of this dtype and size.

    Raises ValueError if it is missing, does not take such heads, or fails its self-test.
    """
    attention = find_attention(name)
    if name == "sdpa":
        return attention
    backend = BACKENDS[name]
    backend.check(name, device, dtype, head_dim)
    return tested(name, attention, backend.tolerance, device, dtype, head_dim)


@functools.cache
@torch.no_grad()
def tested(
    name: str, attention: Attention, tolerance: float, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Attention:
    """An attention function that agrees with `sdpa` up to `tolerance`; it may write to the tensors it is given.

    Raises ValueError if it does not agree, fails, or leaves its work to PyTorch's attention. Each is tested once.
    """
    q, k, v = given = _test_heads(device, dtype, head_dim)
    expected = sdpa(q.float(), k.float(), v.float())
    copies = [tensor.clone() for tensor in given]
    with _SdpaCalls() as calls:
        try:
            out = attention(*copies)
            error = _largest_error(out, expected)
        except Exception as raised:  # packages of kernels have classes of their own
            problem = f"failed its self-test ({type(raised).__name__}: {brief(raised)})"
            raise ValueError(f"attention: {name} {problem}; use another version of it, or sdpa") from None
    if calls.count and name != "pytorch":
        raise ValueError(f"attention: {name} left its self-test to PyTorch's attention, see the log; use sdpa")
    if not error <= tolerance:
        problem = f"differs from sdpa by {error:.3g} of the norm in its self-test, at most {tolerance:g} is allowed"
        raise ValueError(f"attention: {name} {problem}; use another version of it, or sdpa")
    if all(map(torch.equal, copies, given)):
        return attention
    # SageAttention 1.0.6 and 3 subtract the mean of the keys in place. Keys of the memory must stay as they are.
    return lambda q, k, v, bias=None: attention(q.clone(), k.clone(), v.clone(), bias)


class _SdpaCalls(TorchFunctionMode):
    """Counts calls of PyTorch's attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _test_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of two heads. The last queries look at one of the last keys each."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda length: torch.randn((1, length, 2, head_dim), generator=generator)
    q, k, v = normal(NUM_QUERIES), normal(NUM_KEYS), normal(NUM_KEYS)
    q[:, -NUM_LAST:] = max(1, 14 / head_dim**0.5) * k[:, -NUM_LAST:]  # scores of 14 or more
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def _largest_error(out_BSNE: Tensor, expected_BSNE: Tensor) -> float:
    """The larger relative error of two parts: queries that look at many keys, and those that look at one."""
    if out_BSNE.shape != expected_BSNE.shape:
        raise ValueError(f"shape {tuple(out_BSNE.shape)} instead of {tuple(expected_BSNE.shape)}")
    parts = slice(None, -NUM_LAST), slice(-NUM_LAST, None)
    errors = [
        ((out_BSNE[:, part].float() - expected_BSNE[:, part]).norm() / expected_BSNE[:, part].norm()).item()
        for part in parts
    ]
    return max(errors, key=lambda error: (error != error, error))


def plain(tensor: Tensor) -> Tensor:
    """The tensor as a plain Tensor. Classes of quantised weights would otherwise pass on to activations."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
