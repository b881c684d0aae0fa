"""Attention functions by name.

Shapes: B batch, S queries, K keys, N heads, E head dim.
"""

import importlib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..memory.fields import quoted

Attention = Callable[..., Tensor]
"""(q_BSNE, k_BKNE, v_BKNE, bias=None) -> out_BSNE. `bias` is added to the scores and broadcasts to [B, N, S, K]."""


def sdpa(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's exact attention, for every device."""
    out = F.scaled_dot_product_attention(
        q_BSNE.transpose(1, 2), k_BKNE.transpose(1, 2), v_BKNE.transpose(1, 2), attn_mask=bias
    )
    return out.transpose(1, 2)


ATTENTIONS = ("sdpa", "sage")


def load_attention(name: str) -> Attention:
    """An attention function by name. Raises ValueError for an unknown name, or if its package is not installed."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: {quoted(name)} is not one of {', '.join(ATTENTIONS)}")
    return sdpa if name == "sdpa" else _load_sage()


def _load_sage() -> Attention:
    try:
        sageattn = importlib.import_module("sageattention").sageattn
    except ImportError:
        problem = "attention: sage needs the package sageattention; pip install sageattention, or use sdpa"
        raise ValueError(problem) from None

    def sage(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:  # sageattn takes none
            return sdpa(q_BSNE, k_BKNE, v_BKNE, bias)
        if not q_BSNE.is_cuda:
            raise ValueError(f"attention: sage runs on CUDA, not on {q_BSNE.device.type}; use sdpa")
        return sageattn(q_BSNE, k_BKNE, v_BKNE, tensor_layout="NHD", is_causal=False)

    return sage


def plain(tensor: Tensor) -> Tensor:
    """The tensor as a plain Tensor. Classes of quantised weights would otherwise pass on to activations."""
    return tensor.as_subclass(Tensor)
