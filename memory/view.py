"""What a chunk sees of a memory: keys and values laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Layers(Sequence):
    """A tensor per layer, made anew each time it is asked for: for passes that recompute, so that nothing is kept."""

    def __init__(self, num_layers: int, make: Callable[[int], Tensor]):
        self.num_layers, self.make = num_layers, make

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, layer: int) -> Tensor:
        if not 0 <= layer < self.num_layers:
            raise IndexError(layer)
        return self.make(layer)


@dataclass(frozen=True)
class MemoryView:
    """Per layer, values and keys rotated to their ranks 0 .. num_frames - 1, [B, M * P, N, E]; sink, slow, fast.

    `num_frames` is also the position of the next chunk's first frame (method.md 3.5).
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    num_frames: int

    @classmethod
    def assemble(
        cls,
        keys: Sequence[Sequence[Tensor]],
        values: Sequence[Sequence[Tensor]],
        rotate: Callable[[Tensor], Tensor],
        lazy: bool = False,
    ) -> "MemoryView":
        """From per-frame, per-layer tensors [B, P, N, E]: `keys[frame][layer]`.

        `rotate` gives raw keys [B, M, P, N, E] their ranks as temporal positions. A `lazy` view lays a layer out each
        time it is asked for, and holds nothing but the frames.
        """
        num_frames = len(keys)
        num_layers = len(keys[0]) if num_frames else 0
        layers = (
            Layers(num_layers, lambda layer: rotate(torch.stack([frame[layer] for frame in keys], 1)).flatten(1, 2)),
            Layers(num_layers, lambda layer: torch.cat([frame[layer] for frame in values], dim=1)),
        )
        return cls(*(layers if lazy else map(tuple, layers)), num_frames)

    def without_first(self, num_frames: int) -> "MemoryView":
        """The same frames at the same positions, less the first `num_frames`."""
        if not self.keys or not num_frames:
            return self
        less = lambda tensor: tensor[:, num_frames * (tensor.shape[1] // self.num_frames) :]
        return MemoryView(
            keys=Layers(len(self.keys), lambda layer: less(self.keys[layer])),
            values=Layers(len(self.values), lambda layer: less(self.values[layer])),
            num_frames=self.num_frames,
        )
