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
from ...model.pooling import Cells
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

    def __init__(
        self, slots: Tensor, chunk: int, grid: tuple[int, int], head_dim: int, attention: Attention = sdpa, memory=None
    ):
        batch, num_chunks, capacity = slots.shape
        self.cells = None
        if memory is not None and memory.slow_pool > 1:
            return self.init_pooled(slots, chunk, grid, head_dim, attention, memory)
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
        attend = self.pooled if self.cells else self._one_by_one if self.mask is None else self._together
        return attend(q, own_k, v, clean_k, clean_v).reshape(q_BTPNE.shape)

    def _together(self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor) -> Tensor:
        """All chunks in one call; the mask hides empty places and the other stream."""
        tokens = lambda x: rearrange(x, "B K s n P N E -> (B K) (s n P) N E")
        remembered = lambda x: x.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)
        keys = torch.cat([rotate(remembered(clean_k), self.memory_table).flatten(1, 2), tokens(own_k)], dim=1)
        values = torch.cat([remembered(clean_v).flatten(1, 2), tokens(own_v)], dim=1)
        return self.attention(tokens(q), keys, values, self.mask)

    def init_pooled(self, slots, chunk, grid, head_dim, attention, memory):
        batch, num_chunks, capacity = slots.shape
        self.chunk, self.attention = chunk, attention
        tokens = grid[0] * grid[1]
        self.cells = cells = Cells(*grid, memory.slow_pool)
        first = torch.arange(num_chunks, device=slots.device)[:, None] * chunk
        present = slots >= 0
        slow = present & (slots >= memory.sink) & (slots < first - (memory.fast - chunk))
        place = torch.arange(capacity, device=slots.device).expand_as(slots)
        offset = torch.arange(batch, device=slots.device)[:, None, None] * num_chunks * chunk

        def packed(which):
            order = which.int().sort(dim=-1, descending=True, stable=True).indices
            order = order[..., : max(1, int(which.sum(-1).max()))]
            rows = (slots.clamp(min=0) + offset).gather(-1, order).flatten(0, 1)
            return rows, place.gather(-1, order).flatten(0, 1), which.gather(-1, order).flatten(0, 1)

        self.full_rows, full_places, full_seen = packed(present & ~slow)
        self.slow_rows, slow_places, slow_seen = packed(slow)
        self.whole_table = rotary_table(slow_places, *grid, head_dim)
        self.full_table = rotary_table(full_places, *grid, head_dim)
        self.slow_table = rotary_table(slow_places, *grid, head_dim, memory.slow_pool)
        own = present.sum(-1)[:, :, None] + torch.arange(chunk, device=slots.device)
        self.own_table = rotary_table(own, *grid, head_dim)[:, :, None]
        stream = torch.arange(2, device=slots.device).repeat_interleave(chunk * tokens)
        own_seen = (stream[:, None] == stream[None]).expand(batch * num_chunks, -1, -1)
        queries = 2 * chunk * tokens
        value = lambda seen, bias: torch.where(seen, bias, -torch.inf)
        full = value(full_seen.repeat_interleave(tokens, -1), torch.zeros(()))
        small = value(slow_seen.repeat_interleave(cells.count, -1), cells.bias().repeat(slow_seen.shape[-1]))
        seen = torch.cat([full, small], -1)[:, None].expand(-1, queries, -1)
        self.mask = torch.cat([seen, value(own_seen, torch.zeros(()))], -1)[:, None]
        if not cells.bias().any():
            self.mask = self.mask == 0

    def selected(self, q, own_k, own_v, clean_k, clean_v, full_k, take):
        cells = self.cells
        index = cells.select(clean_k, clean_v)  # [F, count] or [F, N, count]
        idx = take(index, self.slow_rows)  # [BK, M, c, N]
        pick = lambda x: x.gather(2, idx[..., None].expand(*idx.shape, x.shape[-1]))
        slow_k = pick(rotate(take(clean_k, self.slow_rows), self.whole_table)).flatten(1, 2)
        slow_v = pick(take(clean_v, self.slow_rows)).flatten(1, 2)
        keys = torch.cat([full_k, slow_k, own_k], dim=1)
        values = torch.cat([take(clean_v, self.full_rows).flatten(1, 2), slow_v, own_v], dim=1)
        return self.attention(rearrange(q, "B K s n P N E -> (B K) (s n P) N E"), keys, values, self.mask)

    def pooled(self, q, own_k, own_v, clean_k, clean_v):
        tokens = lambda x: rearrange(x, "B K s n P N E -> (B K) (s n P) N E")
        take = lambda x, rows: x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        cells = self.cells
        full_k = rotate(take(clean_k, self.full_rows), self.full_table).flatten(1, 2)
        if cells.selects:
            return self.selected(q, tokens(own_k), tokens(own_v), clean_k, clean_v, full_k, take)
        slow_k = rotate(take(cells.keys(clean_k), self.slow_rows), self.slow_table).flatten(1, 2)
        keys = torch.cat([full_k, slow_k, tokens(own_k)], dim=1)
        parts = [take(clean_v, self.full_rows), take(cells.mean(clean_v), self.slow_rows)]
        values = torch.cat([*(x.flatten(1, 2) for x in parts), tokens(own_v)], dim=1)
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
