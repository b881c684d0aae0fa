"""Self-attention of one chunk over a memory, one class for each kind of store.

Shapes: B batch, T latent frames of the chunk, P tokens per latent frame, N heads, E head dim.
"""

from typing import Any

import torch
from torch import Tensor

from ..memory.layer_store import LayerSlots, LayerView
from ..memory.view import MemoryView, num_hidden
from .attention import Attention, plain
from .rope import rotate


class MemoryAttention:
    """Over the frames of a MemoryView and over the chunk itself, in both directions.

    It is called with raw (not rotated) queries, keys and values of a layer.
    """

    def __init__(self, view: MemoryView, table: Tensor, attention: Attention, attends: str = "all", keep: bool = False):
        self.view, self.table, self.attention, self.keep = view.restrict_to(attends), table, attention, keep
        self.new_kv: list[tuple[Tensor, Tensor]] = []
        """Raw keys and values per layer, [B, T, P, N, E], if `keep`."""

    def __call__(self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor) -> Tensor:
        if self.keep and len(self.new_kv) == layer:  # a recomputed pass comes here twice
            self.new_kv.append((plain(k_BTPNE), plain(v_BTPNE)))
        q = rotate(q_BTPNE, self.table).flatten(1, 2)
        k = rotate(k_BTPNE, self.table).flatten(1, 2)
        v = v_BTPNE.flatten(1, 2)
        if self.view.keys:
            k = torch.cat([self.view.keys[layer], k], dim=1)
            v = torch.cat([self.view.values[layer].to(v.device), v], dim=1)
        return self.attention(q, k, v).view_as(q_BTPNE)

    def new_tensors(self) -> list[Tensor]:
        """Keys and values that the passes over the chunk computed."""
        return [tensor for kv in self.new_kv for tensor in kv]


class LayerAttention:
    """Over the slots of a LayerView, which every pass updates (docs/method.md, Released memory).

    Positions are slots; the chunk is in the last ones filled.
    """

    def __init__(self, view: LayerView, table: Tensor, attention: Attention, attends: str = "all"):
        self.view, self.table, self.attention, self.attends = view, table, attention, attends

    def __call__(self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor) -> Tensor:
        slots = self.view.take(layer, plain(k_BTPNE), plain(v_BTPNE))
        num_slots, num_frames = len(slots.entries), q_BTPNE.shape[1]
        hidden = num_hidden(self.attends, num_slots - num_frames, self.view.config.sink, slots.num_slow)
        entries = slots.entries[hidden:]
        k = torch.stack([entry.keys.to(q_BTPNE.device) for entry in entries], dim=1)
        v = torch.stack([entry.values.to(q_BTPNE.device) for entry in entries], dim=1)
        k = rotate(k, self.table[hidden:num_slots])
        q = rotate(q_BTPNE, self.table[num_slots - num_frames : num_slots])
        return self.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)).view_as(q_BTPNE)

    @property
    def new_kv(self) -> list[LayerSlots]:
        """The slots of all layers after the last pass."""
        return list(self.view.layers.values())

    def new_tensors(self) -> list[Tensor]:
        """Keys and values that the passes over the chunk computed."""
        slots = [pair for layer in self.new_kv for pair in zip(layer.frames, layer.entries)]
        return [tensor for frame, kv in slots if frame >= self.view.first_frame for tensor in (kv.keys, kv.values)]


ChunkAttention = MemoryAttention | LayerAttention


def attention_over(view: Any, table: Tensor, attention: Attention, attends: str, keep: bool) -> ChunkAttention:
    """The attention over one kind of view. `table` rotates to `view.positions`; `attends` is one of view.ATTENDS.

    With `keep` the keys and values of a pass stay in `new_kv`, for KVStore.append.
    """
    if isinstance(view, LayerView):
        return LayerAttention(view, table, attention, attends)
    return MemoryAttention(view, table, attention, attends, keep)
