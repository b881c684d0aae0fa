"""Keys and values of cross-attention are computed once per prompt.

Shapes: B batch, L text tokens.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .causal import TextContext


class _Entry(NamedTuple):
    network: Hashable
    text_BLC: Tensor
    context: TextContext


class TextCache:
    """Keys and values of the prompts that were used last.

    The weights must not change as long as it is in use: a network with other weights needs a cache of its own.
    """

    def __init__(self):
        self._entries: list[_Entry] = []
        """The one that was used last is at the end."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(entry.context.num_bytes for entry in self._entries)

    def find(self, network: Hashable, text_BLC: Tensor, limit: int, embed: Callable[[], TextContext]) -> TextContext:
        """What `embed` returns, computed only if no earlier text of this network was equal bit for bit.

        `network` names the modules, device and dtype. The prompts that were used longest ago leave until there are at
        most `limit` bytes; the newest stays.
        """
        for place, entry in enumerate(self._entries):
            if entry.network == network and _same(entry.text_BLC, text_BLC):
                del self._entries[place]
                break
        else:
            # A copy, because a caller may change its tensor.
            entry = _Entry(network, text_BLC.detach().clone(), embed())
        self._entries.append(entry)
        while len(self._entries) > 1 and self.num_bytes > limit:
            del self._entries[0]
        return entry.context


def _same(one_BLC: Tensor, other_BLC: Tensor) -> bool:
    alike = one_BLC.shape == other_BLC.shape and one_BLC.dtype == other_BLC.dtype and one_BLC.device == other_BLC.device
    return alike and torch.equal(one_BLC, other_BLC)
