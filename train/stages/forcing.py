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
from ...model.causal import ModuleRunner, run_directly
from ...model.rope import rotary_table, rotate, rotate_both

CLEAN, NOISY = 0, 1
MASK_BYTES = 2**28
"""Chunks attend together under a mask of this size at most; larger ones, those of Wan, attend one after the other."""


def interleave(clean_BCTHW: Tensor, noisy_BCTHW: Tensor, chunk: int) -> Tensor:
    """Two clips -> the frame axis of a teacher-forced pass."""
    pair = torch.stack([clean_BCTHW, noisy_BCTHW], dim=2)
    return rearrange(pair, "B C s (K n) H W -> B C (K s n) H W", n=chunk)


def noisy_part(flow_BCTHW: Tensor, chunk: int) -> Tensor:
    """The flow of the noisy frames, [B, C, T, H, W]."""
    return rearrange(flow_BCTHW, "B C (K s n) H W -> B C s (K n) H W", s=2, n=chunk)[:, :, NOISY]


class TeacherForcing:
    """Self-attention of a teacher-forced pass. `slots` [B, K, M] are each chunk's remembered frames, then -1."""

    def __init__(self, slots: Tensor, chunk: int, grid: tuple[int, int], head_dim: int, attention: Attention = sdpa):
        batch, num_chunks, capacity = slots.shape
        tokens = grid[0] * grid[1]
        self.chunk, self.attention = chunk, attention
        # Frame f of clip b is row b * K * n + f of the flattened clean keys.
        rows = slots.clamp(min=0) + torch.arange(batch, device=slots.device)[:, None, None] * num_chunks * chunk
        self.rows = rows.flatten(0, 1)
        present = slots >= 0
        self.memory_table = rotary_table(torch.arange(capacity, device=slots.device), *grid, head_dim)
        first = present.sum(-1)
        own = first[:, :, None] + torch.arange(chunk, device=slots.device)
        self.own_table = rotary_table(own, *grid, head_dim)[:, :, None]
        queries, self.counts, self.mask = 2 * chunk * tokens, first.flatten().tolist(), None
        if batch * num_chunks * queries * (capacity * tokens + queries) <= MASK_BYTES:
            seen = present.repeat_interleave(tokens, -1)[:, :, None, :].expand(-1, -1, queries, -1)
            stream = torch.arange(2, device=slots.device).repeat_interleave(chunk * tokens)
            own_seen = (stream[:, None] == stream[None]).expand(batch, num_chunks, -1, -1)
            self.mask = torch.cat([seen, own_seen], dim=-1).flatten(0, 1)[:, None]

    def __call__(
        self, layer: int, q_BTPNE: Tensor, k_BTPNE: Tensor, v_BTPNE: Tensor, inside: ModuleRunner = run_directly
    ) -> Tensor:
        q, k, v = (
            rearrange(x, "B (K s n) P N E -> B K s n P N E", s=2, n=self.chunk) for x in (q_BTPNE, k_BTPNE, v_BTPNE)
        )
        clean_k, clean_v = (rearrange(x[:, :, CLEAN], "B K n P N E -> (B K n) P N E") for x in (k, v))
        q, own_k = inside(None, rotate_both, q, k, self.own_table)
        attend = self._one_by_one if self.mask is None else self._together
        return attend(q, own_k, v, clean_k, clean_v).reshape(q_BTPNE.shape)

    def _together(self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor) -> Tensor:
        """All chunks in one call; the mask hides empty places and the other stream."""
        tokens = lambda x: rearrange(x, "B K s n P N E -> (B K) (s n P) N E")
        remembered = lambda x: x.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)
        keys = torch.cat([rotate(remembered(clean_k), self.memory_table).flatten(1, 2), tokens(own_k)], dim=1)
        values = torch.cat([remembered(clean_v).flatten(1, 2), tokens(own_v)], dim=1)
        return self.attention(tokens(q), keys, values, self.mask)

    def _one_by_one(self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor) -> Tensor:
        """A call per chunk and stream, which needs no mask."""
        streams = lambda x: rearrange(x, "B K s n P N E -> (B K) s 1 (n P) N E")
        out = []
        for places, count, *own in zip(self.rows, self.counts, streams(q), streams(own_k), streams(own_v)):
            past_k = rotate(clean_k[places[:count]], self.memory_table[:count]).flatten(0, 1)[None]
            past_v = clean_v[places[:count]].flatten(0, 1)[None]
            for queries, keys, values in zip(*own):
                out.append(self.attention(queries, torch.cat([past_k, keys], 1), torch.cat([past_v, values], 1)))
        return torch.cat(out)
