"""Self-attention over the released weights' memory, whose layers change what they hold in every pass (method.md 8.1).

Shapes: B batch, T latent frames of the chunk, P tokens per latent frame, N heads, E head dim.
"""

import torch
from torch import Tensor

from ..memory.config import MemoryConfig
from ..memory.layer_store import LayerSlots
from .attention import Attention, plain
from .rope import rotary_table, rotate


class ReleasedAttention:
    """Self-attention of one chunk over `layers`, which are replaced, layer by layer, by what they hold after the pass.

    Positions are slots; the chunk being made stands in the last ones filled. `kept` is `layers` after the pass.
    """

    def __init__(
        self,
        layers: list[LayerSlots],
        config: MemoryConfig,
        first_frame: int,
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
        attention: Attention,
        attends: str,
    ):
        self.new_kv, self.config, self.first_frame = layers, config, first_frame
        self.attention, self.attends = attention, attends
        slots = torch.arange(config.sink + config.slow + config.fast, device=device)
        self.table = rotary_table(slots, *grid, head_dim)

    def __call__(self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor) -> Tensor:
        held = self.new_kv[layer].take(self.config, self.first_frame, plain(k_BTPNE), plain(v_BTPNE))
        self.new_kv[layer] = held
        num_slots, num_sink = len(held.entries), self.config.sink
        hidden = {"all": 0, "no sink": num_sink, "fast only": num_sink + held.num_slow}[self.attends]
        hidden = min(hidden, num_slots - q_BTPNE.shape[1])  # of the memory, never of the chunk itself
        seen = held.entries[hidden:]
        k = rotate(torch.stack([entry.keys.to(q_BTPNE.device) for entry in seen], dim=1), self.table[hidden:num_slots])
        v = torch.stack([entry.values.to(q_BTPNE.device) for entry in seen], dim=1)
        q = rotate(q_BTPNE, self.table[num_slots - q_BTPNE.shape[1] : num_slots])
        return self.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)).view_as(q_BTPNE)
