"""Wan's 3-D rotary embedding, computed from positions of any size (docs/method.md, Rotary positions).

Shapes: T latent frames, P tokens per latent frame (row-major), N heads, E head dim.
"""

import torch
from torch import Tensor

from .pooling import Cells

THETA = 10000.0


def rotary_table(positions: Tensor, rows: int, columns: int, head_dim: int, cell: int = 1) -> Tensor:
    """Cosines and sines [..., T, P, 1, E/2, 2] for latent frames at `positions` [..., T], rows x columns tokens each.

    The E/2 complex pairs of a head are split into time, row, column: 22 + 21 + 21 at head dim 128. Angles are float64
    where the device supports it.
    """
    pairs = head_dim // 2
    spatial_pairs = pairs // 3
    temporal_pairs = pairs - 2 * spatial_pairs
    device = positions.device
    real = torch.float32 if device.type == "mps" else torch.float64

    def angles(position: Tensor, num_pairs: int) -> Tensor:
        exponent = torch.arange(num_pairs, device=device, dtype=real) / num_pairs
        return position.to(real)[..., None] * THETA**-exponent

    if cell > 1:
        row, column = (x.to(device) for x in Cells(rows, columns, cell).places())
    else:
        row, column = torch.meshgrid(
            torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
        )
    space = torch.cat([angles(row.flatten(), spatial_pairs), angles(column.flatten(), spatial_pairs)], dim=-1)
    time = angles(positions, temporal_pairs)
    shape = (*positions.shape, row.numel())
    both = torch.cat([time[..., None, :].expand(*shape, -1), space.expand(*shape, -1)], dim=-1)[..., None, :]
    return torch.stack([both.cos().float(), both.sin().float()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys [..., T, P, N, E] in float32. Pairs are interleaved: values 2j and 2j + 1."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler fuses real arithmetic. Complex arithmetic, which it does not fuse, is faster without it.
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def rotate_both(_: None, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys. A part of a block that can be compiled (causal.ModuleRunner)."""
    return rotate(q, table), rotate(k, table)
