"""Teacher forcing over the Slow-Fast layout: all chunks of a clip in one pass (docs/method.md, Training).

A pass contains every frame twice: clean (what is remembered) and noisy (the target). Every chunk, clean or noisy,
attends to the clean keys of its remembered frames, at the positions they have in the memory, and to itself. It attends
to no other noisy chunk and to no later one.

Shapes: B batch, K chunks, n frames per chunk, M remembered frames, P tokens per latent frame, N heads, E head dim.
The frame axis of a pass is (K, 2, n): per chunk the clean frames, then the noisy ones.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...model.attention import Attention, sdpa
from ...model.rope import rotary_table, rotate

CLEAN, NOISY = 0, 1


def interleave(clean_BCTHW: Tensor, noisy_BCTHW: Tensor, chunk: int) -> Tensor:
    """Two clips -> the frame axis of a teacher-forced pass."""
    pair = torch.stack([clean_BCTHW, noisy_BCTHW], dim=2)
    return rearrange(pair, "B C s (K n) H W -> B C (K s n) H W", n=chunk)


def noisy_part(flow_BCTHW: Tensor, chunk: int) -> Tensor:
    """The flow of the noisy frames, [B, C, T, H, W]."""
    return rearrange(flow_BCTHW, "B C (K s n) H W -> B C s (K n) H W", s=2, n=chunk)[:, :, NOISY]


class TeacherForcing:
    """Self-attention of a teacher-forced pass. `slots` [B, K, M] are each chunk's remembered frames, -1 for none."""

    def __init__(self, slots: Tensor, chunk: int, grid: tuple[int, int], head_dim: int, attention: Attention = sdpa):
        batch, num_chunks, capacity = slots.shape
        tokens = grid[0] * grid[1]
        self.num_chunks, self.chunk, self.attention = num_chunks, chunk, attention
        # Frame f of clip b is row b * K * n + f of the flattened clean keys.
        rows = slots.clamp(min=0) + torch.arange(batch, device=slots.device)[:, None, None] * num_chunks * chunk
        self.rows = rows.flatten()
        present = slots >= 0
        self.memory_table = rotary_table(torch.arange(capacity, device=slots.device), *grid, head_dim)
        first = present.sum(-1)
        own = first[:, :, None] + torch.arange(chunk, device=slots.device)
        self.own_table = rotary_table(own, *grid, head_dim)[:, :, None]
        seen = present.repeat_interleave(tokens, -1)[:, :, None, :].expand(-1, -1, 2 * chunk * tokens, -1)
        stream = torch.arange(2, device=slots.device).repeat_interleave(chunk * tokens)
        own_seen = (stream[:, None] == stream[None]).expand(batch, num_chunks, -1, -1)
        self.mask = torch.cat([seen, own_seen], dim=-1).flatten(0, 1)[:, None]

    def __call__(self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor) -> Tensor:
        q, k, v = (
            rearrange(x, "B (K s n) P N E -> B K s n P N E", s=2, n=self.chunk) for x in (q_BTPNE, k_BTPNE, v_BTPNE)
        )
        batch = q.shape[0]

        def remembered(x: Tensor) -> Tensor:
            clean = rearrange(x[:, :, CLEAN], "B K n P N E -> (B K n) P N E")
            return clean.index_select(0, self.rows).view(batch * self.num_chunks, -1, *clean.shape[1:])

        def tokens(x: Tensor) -> Tensor:
            return rearrange(x, "B K s n P N E -> (B K) (s n P) N E")

        keys = torch.cat(
            [rotate(remembered(k), self.memory_table).flatten(1, 2), tokens(rotate(k, self.own_table))], dim=1
        )
        values = torch.cat([remembered(v).flatten(1, 2), tokens(v)], dim=1)
        out = self.attention(tokens(rotate(q, self.own_table)), keys, values, self.mask)
        return out.reshape(q_BTPNE.shape)
