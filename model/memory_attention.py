"""Self-attention of one chunk over a memory, one class for each kind of store.

Shapes: B batch, T latent frames of the chunk, P tokens per latent frame, N heads, E head dim.
"""

from typing import Any

from torch import Tensor

from ..memory.layer_store import LayerSlots, LayerView
from ..memory.stores import FrameKV, NewFrames
from ..memory.view import MemoryView, num_hidden
from .attention import Attention, plain
from .causal import ModuleRunner, run_directly
from .rope import rotate, rotate_both


class MemoryAttention:
    """Over the frames of a MemoryView and over the chunk itself, in both directions.

    It is called with raw (not rotated) queries, keys and values of a layer. The keys and values of a pass go to `new`.
    """

    def __init__(
        self,
        view: MemoryView,
        table: Tensor,
        attention: Attention,
        attends: str = "all",
        new: NewFrames | None = None,
    ):
        self.view, self.table, self.attention, self.new = view.restrict_to(attends), table, attention, new

    def __call__(
        self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor, inside: ModuleRunner = run_directly
    ) -> Tensor:
        has_grad = any(tensor.requires_grad for tensor in (q_BTPNE, k_BTPNE, v_BTPNE))
        self.keep(layer, k_BTPNE, v_BTPNE)
        q, k = inside(None, rotate_both, q_BTPNE, k_BTPNE, self.table)
        keys, values = self.view.with_chunk(layer, plain(k), plain(v_BTPNE), has_grad)
        return self.attention(q.flatten(1, 2), keys, values).view_as(q_BTPNE)

    def keep(self, layer: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> None:
        """Take raw keys and values that a pass has computed."""
        if self.new:
            self.new.write(layer, plain(k_BTPNE), plain(v_BTPNE))

    @property
    def new_kv(self) -> list[FrameKV]:
        """Raw keys and values of each frame of the chunk."""
        return self.new.frames if self.new else []

    def new_tensors(self) -> list[Tensor]:
        """Keys and values that the passes over the chunk computed."""
        return self.new.tensors() if self.new else []


class LayerAttention:
    """Over the slots of a LayerView, which every pass updates (docs/method.md, Released memory).

    Positions are slots; the chunk is in the last ones filled.
    """

    def __init__(self, view: LayerView, table: Tensor, attention: Attention, attends: str = "all"):
        self.view, self.table, self.attention, self.attends = view, table, attention, attends

    def __call__(
        self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor, inside: ModuleRunner = run_directly
    ) -> Tensor:
        slots = self.keep(layer, k_BTPNE, v_BTPNE)
        num_slots, num_frames = len(slots.entries), q_BTPNE.shape[1]
        hidden = num_hidden(self.attends, num_slots - num_frames, self.view.config.sink, slots.num_slow)
        seen, table = slots.entries[hidden:], self.table[hidden:num_slots]
        buffer = self.view.buffer_like(plain(k_BTPNE)[:, 0])
        of_rank = lambda keys, ranks: rotate(keys, table[ranks.start : ranks.stop])
        buffer.copy([kv.keys for kv in seen], [kv.values for kv in seen]).rotate_keys(len(seen), of_rank)
        k, v = (part[:, : len(seen)].flatten(1, 2) for part in (buffer.keys, buffer.values))
        q = rotate(q_BTPNE, table[-num_frames:])
        return self.attention(q.flatten(1, 2), k, v).view_as(q_BTPNE)

    def keep(self, layer: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> LayerSlots:
        """The slots of a layer after they took raw keys and values of a pass."""
        return self.view.take(layer, plain(k_BTPNE), plain(v_BTPNE))

    @property
    def new_kv(self) -> list[LayerSlots]:
        """The slots of all layers after the last pass."""
        return list(self.view.layers.values())

    def new_tensors(self) -> list[Tensor]:
        """Keys and values that the passes over the chunk computed."""
        slots = [pair for layer in self.new_kv for pair in zip(layer.frames, layer.entries)]
        return [tensor for frame, kv in slots if frame >= self.view.first_frame for tensor in kv.tensors()]


ChunkAttention = MemoryAttention | LayerAttention


def attention_over(
    view: Any, table: Tensor, attention: Attention, attends: str, new: NewFrames | None
) -> ChunkAttention:
    """The attention over one kind of view. `table` rotates to `view.positions`; `attends` is one of view.ATTENDS.

    The keys and values of a pass go to `new`. KVStore.append takes them, or the slots of a LayerView, as `new_kv`.
    """
    if isinstance(view, LayerView):
        return LayerAttention(view, table, attention, attends)
    return MemoryAttention(view, table, attention, attends, new)
