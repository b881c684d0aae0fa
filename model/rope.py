"""Wan's 3-D rotary embedding, computed from positions of any size (docs/method.md, Rotary positions).

Shapes: T latent frames, P tokens per latent frame (row-major), N heads, E head dim.
"""

import torch
from torch import Tensor

THETA = 10000.0


def rotary_table(positions: Tensor, rows: int, columns: int, head_dim: int) -> Tensor:
    """Unit complex numbers [..., T, P, 1, E/2] for latent frames at `positions` [..., T], rows x columns tokens each.

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

    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    space = torch.cat([angles(row.flatten(), spatial_pairs), angles(column.flatten(), spatial_pairs)], dim=-1)
    time = angles(positions, temporal_pairs)
    shape = (*positions.shape, rows * columns)
    both = torch.cat([time[..., None, :].expand(*shape, -1), space.expand(*shape, -1)], dim=-1)[..., None, :]
    return torch.complex(both.cos().float(), both.sin().float())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys [..., T, P, N, E] in float32. Pairs are interleaved: values 2j and 2j + 1."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
