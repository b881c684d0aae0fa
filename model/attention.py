"""One attention function, several backends.

Shapes: B batch, S queries, K keys, N heads, E head dim.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]
"""(q_BSNE, k_BKNE, v_BKNE, bias=None) -> out_BSNE. `bias` is added to the scores and broadcasts to [B, N, S, K]."""


def sdpa(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own: exact, everywhere, the default."""
    out = F.scaled_dot_product_attention(
        q_BSNE.transpose(1, 2), k_BKNE.transpose(1, 2), v_BKNE.transpose(1, 2), attn_mask=bias
    )
    return out.transpose(1, 2)


def plain(tensor: Tensor) -> Tensor:
    """The same as a Tensor: quantised weights may have a class of their own, that is passed on to what they touch."""
    return tensor.as_subclass(Tensor)
