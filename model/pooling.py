"""Tokens of a latent frame pooled over square cells: fewer keys for slow frames (docs/method.md, Pooled slow frames).

Shapes: P tokens per latent frame (row-major), N heads, E head dim.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANT = os.environ.get("POOL_VARIANT", "norm")
BIAS = os.environ.get("POOL_BIAS", "0")


@dataclass(frozen=True)
class Cells:
    """The cells of `size` x `size` tokens of a frame of rows x columns tokens. Those at the ends may be smaller."""

    rows: int
    columns: int
    size: int

    @property
    def count(self) -> int:
        if os.environ.get("POOL_COUNT"):
            return int(os.environ["POOL_COUNT"])
        return -(-self.rows // self.size) * -(-self.columns // self.size)

    @property
    def selects(self):
        return VARIANT.startswith("top")

    def select(self, k, v):
        """Token indices [F, count, N]."""
        n = k.shape[-2]
        kind = VARIANT[3:]
        if kind.startswith("k"):
            x = k
        else:
            x = v
        if "kv" in kind:
            a, b = k.flatten(-2).norm(dim=-1), v.flatten(-2).norm(dim=-1)
            c = (k - k.mean(-3, keepdim=True)).flatten(-2).norm(dim=-1)
            score = (b * c)[..., None]
            return score.topk(self.count, dim=-2).indices.expand(-1, -1, n)
        if "pool" in kind:  # values differ in the neighbourhood
            b = v.flatten(-2).norm(dim=-1).unflatten(-1, (self.rows, self.columns))
            b = b + 0.5 * F.avg_pool2d(b[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
            return b.flatten(1).topk(self.count, dim=-1).indices[..., None].expand(-1, -1, n)
        if kind.endswith("all"):
            x = x.flatten(-2)[..., None, :]
        if "cos" in kind:
            score = -F.cosine_similarity(x, x.mean(-3, keepdim=True), dim=-1)
        elif "dist" in kind:
            score = (x - x.mean(-3, keepdim=True)).norm(dim=-1)
        elif "global" in kind:
            score = -F.cosine_similarity(x, x.mean((0, 1), keepdim=True), dim=-1)
        elif "place" in kind:  # unlike the same token in other frames
            score = -F.cosine_similarity(x, x.mean(0, keepdim=True), dim=-1)
        elif "rand" in kind:
            score = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(0))
        else:
            score = x.norm(dim=-1)
        index = score.topk(self.count, dim=-2).indices
        return index.expand(-1, -1, n)

    def mean(self, x: Tensor, dim: int = -3) -> Tensor:
        """Means over the cells of tokens [..., P, N, E] -> [..., cells, N, E]."""
        if VARIANT == "sub":
            grid = x.unflatten(-3, (self.rows, self.columns))
            return grid[..., :: self.size, :: self.size, :, :].flatten(-4, -3)
        lead, (n, e) = x.shape[:-3], x.shape[-2:]
        planes = x.reshape(-1, self.rows * self.columns, n * e).transpose(1, 2)
        planes = planes.unflatten(2, (self.rows, self.columns))
        pooled = F.avg_pool2d(planes, self.size, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2).reshape(*lead, self.count, n, e)

    def keys(self, k: Tensor) -> Tensor:
        out = self.mean(k)
        if VARIANT == "norm":
            norms = self.mean(k.norm(dim=-1, keepdim=True))
            out = out * (norms / out.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        if VARIANT == "normall":  # over heads
            norms = self.mean(k.flatten(-2).norm(dim=-1)[..., None, None])
            out = out * (norms / out.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-6))
        return out

    def places(self) -> tuple[Tensor, Tensor]:
        """Mean row and column of each cell, float64."""
        row, column = torch.meshgrid(
            torch.arange(self.rows).double(), torch.arange(self.columns).double(), indexing="ij"
        )
        if VARIANT == "sub":
            return row[:: self.size, :: self.size].flatten(), column[:: self.size, :: self.size].flatten()
        pool = lambda x: F.avg_pool2d(x[None, None], self.size, ceil_mode=True, count_include_pad=False).flatten()
        return pool(row), pool(column)

    def bias(self) -> Tensor:
        """log of the tokens of each cell."""
        ones = torch.ones(1, 1, self.rows, self.columns)
        share = F.avg_pool2d(ones, self.size, ceil_mode=True, divisor_override=1).flatten()
        if self.selects:
            return torch.zeros(self.count)
        return share.log() * float(BIAS)
