"""A memory of frames laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rotate = Callable[[Tensor], Tensor]
"""Raw keys [B, M, P, N, E] -> keys rotated to temporal positions 0 .. M - 1."""

ATTENDS = ("all", "no sink", "fast only")
"""Parts of a memory that a pass can attend to."""


class LazyLayers(Sequence):
    """One tensor per layer, computed at every access and not kept."""

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
    """Rotated keys and values per layer, [B, M * P, N, E], in the order sink, slow, fast."""

    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()
    num_frames: int = 0
    """Remembered frames have temporal positions 0 .. num_frames - 1."""
    num_sink: int = 0
    num_slow: int = 0
    gap: int = 0
    """Temporal positions between the last remembered frame and the next chunk."""

    @classmethod
    def assemble(
        cls, keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], rotate: Rotate, lazy: bool = False
    ) -> "MemoryView":
        """A view of raw keys and values [B, P, N, E], as `keys[frame][layer]`.

        A `lazy` view computes a layer at every access and holds only the frames.
        """
        num_frames = len(keys)
        num_layers = len(keys[0]) if num_frames else 0
        layers = (
            LazyLayers(num_layers, lambda n: rotate(torch.stack([frame[n] for frame in keys], 1)).flatten(1, 2)),
            LazyLayers(num_layers, lambda n: torch.cat([frame[n] for frame in values], dim=1)),
        )
        return cls(*(layers if lazy else map(tuple, layers)), num_frames)

    def positions(self, num_frames: int) -> range:
        """Temporal positions of the next chunk of `num_frames` latent frames."""
        return range(self.num_frames + self.gap, self.num_frames + self.gap + num_frames)

    def restrict_to(self, part: str) -> "MemoryView":
        """The frames of one of ATTENDS, at unchanged positions."""
        return self.without_first(
            {"all": 0, "no sink": self.num_sink, "fast only": self.num_sink + self.num_slow}[part]
        )

    def without_first(self, num_frames: int) -> "MemoryView":
        """The same view without its first `num_frames` frames; the others keep their positions."""
        if not self.keys or not num_frames:
            return self
        cut = lambda tensor: tensor[:, num_frames * (tensor.shape[1] // self.num_frames) :]
        return dataclasses.replace(
            self,
            keys=LazyLayers(len(self.keys), lambda n: cut(self.keys[n])),
            values=LazyLayers(len(self.values), lambda n: cut(self.values[n])),
        )
