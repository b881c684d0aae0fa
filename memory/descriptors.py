"""Descriptors of latent frames, from their clean latents, and how alike frames are (docs/memory.md, Recall).

Likeness of two tokens: 2 a.b / (|a|^2 + |b|^2), which is 1 for equal ones and less for another direction or length.

Shapes: T latent frames, R C rows and columns of tokens (K: columns of another frame), D values of a token, S shifts.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOKENS = 512
"""Largest number of tokens of a descriptor: 64 KiB in float16 with 16 latent channels."""
PATCH = 2
"""Latent rows and columns of a token."""


def describe(latents_BCTHW: Tensor) -> Tensor:
    """Descriptors of the frames of a chunk, [T, R, C, D], float16."""
    frames = latents_BCTHW[0].movedim(1, 0).float()
    grids = (tuple(max(1, size // PATCH // n) for size in frames.shape[-2:]) for n in itertools.count(1))
    rows, columns = next(grid for grid in grids if math.prod(grid) <= MAX_TOKENS)
    patches = F.adaptive_avg_pool2d(frames, (rows * PATCH, columns * PATCH))
    patches = patches.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).half()


@dataclass(frozen=True)
class Views:
    """Frames to be compared: tokens relative to a mean token, [T, R, C, D], float32."""

    tokens_TRCD: Tensor

    @functools.cached_property
    def squares_TRC(self) -> Tensor:
        """The squared length of every token."""
        return torch.linalg.vector_norm(self.tokens_TRCD, dim=-1).square()

    def likeness(self, index: int) -> Tensor:
        """Likeness of one frame with all, place by place, [T]."""
        product_TRC = torch.einsum("rcd,trcd->trc", self.tokens_TRCD[index], self.tokens_TRCD)
        return (2 * product_TRC / (self.squares_TRC[index] + self.squares_TRC).clamp(min=1e-12)).mean((1, 2))

    def shift_from(self, earlier: "Views") -> tuple[Tensor, Tensor]:
        """By how many columns each view is further right than an earlier one, and how well they fit there, [T] each.

        One earlier view can be given for all. At least two columns overlap. The fit is the square of the likeness,
        times the root of the share of columns that overlap.
        """
        product_TRCK = earlier.tokens_TRCD.expand_as(self.tokens_TRCD) @ self.tokens_TRCD.mT
        squares_TRCK = earlier.squares_TRC[..., :, None] + self.squares_TRC[..., None, :]
        shifts, mean_at_S, overlap_S = _shifts(self.tokens_TRCD.shape[2])
        alike_TS = (2 * product_TRCK / squares_TRCK.clamp(min=1e-12)).mean(1).flatten(1) @ mean_at_S
        fit, best = (alike_TS.clamp(min=0).square() * overlap_S.sqrt()).max(dim=1)
        return shifts[best], fit


@functools.cache
def _shifts(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The shifts [S], the matrix that takes the mean of pairs of columns at each, [C C, S], and the overlaps, [S]."""
    most = max(0, columns - 2)
    shifts, column = torch.arange(-most, most + 1), torch.arange(columns)
    is_at = (column[:, None] - column)[..., None] == shifts
    overlap = 1 - shifts.abs() / columns
    return shifts, is_at.flatten(0, 1).float() / (columns * overlap), overlap
