"""What a chunk sees of a memory: keys and values laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryView:
    """Per layer, values and keys rotated to their ranks 0 .. num_frames - 1, [B, M * P, N, E]; sink, slow, fast.

    `num_frames` is also the position of the next chunk's first frame (method.md 3.5).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_frames: int

    @classmethod
    def assemble(
        cls,
        keys: Sequence[Sequence[Tensor]],
        values: Sequence[Sequence[Tensor]],
        rotate: Callable[[Tensor], Tensor],
    ) -> "MemoryView":
        """From per-frame, per-layer tensors [B, P, N, E]: `keys[frame][layer]`.

        `rotate` gives raw keys [B, M, P, N, E] their ranks as temporal positions.
        """
        num_frames = len(keys)
        num_layers = len(keys[0]) if num_frames else 0
        return cls(
            keys=tuple(
                rotate(torch.stack([frame[layer] for frame in keys], dim=1)).flatten(1, 2)
                for layer in range(num_layers)
            ),
            values=tuple(torch.cat([frame[layer] for frame in values], dim=1) for layer in range(num_layers)),
            num_frames=num_frames,
        )

    def without_first(self, num_frames: int) -> "MemoryView":
        """The same frames at the same positions, less the first `num_frames`."""
        if not self.keys or not num_frames:
            return self
        skip = num_frames * (self.keys[0].shape[1] // self.num_frames)
        return MemoryView(
            keys=tuple(k[:, skip:] for k in self.keys),
            values=tuple(v[:, skip:] for v in self.values),
            num_frames=self.num_frames,
        )
