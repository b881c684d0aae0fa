"""A memory of frames laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Rotate = Callable[[Tensor], Tensor]
"""Raw keys [B, M, P, N, E] -> keys rotated to temporal positions 0 .. M - 1."""

ATTENDS = ("all", "no sink", "fast only", "itself")
"""Parts of a memory that a pass can attend to; `itself` is none, so a chunk sees only its own frames."""


def num_hidden(attends: str, num_frames: int, num_sink: int, num_slow: int) -> int:
    """Number of the first remembered frames that a pass which attends to one of ATTENDS does not see."""
    hidden = {"all": 0, "no sink": num_sink, "fast only": num_sink + num_slow, "itself": num_frames}[attends]
    return min(hidden, num_frames)


class LazyLayers(Sequence):
    """One tensor per layer, computed at every access and not kept."""

    def __init__(self, num_layers: int, make: Callable[[int], Tensor]):
        self.num_layers, self.make = num_layers, make

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, layer: int) -> Tensor:
        return self.make(range(self.num_layers)[layer])  # IndexError after the last layer


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

    def positions(self, num_frames: int) -> range:
        """Temporal positions of the next chunk of `num_frames` latent frames."""
        return range(self.num_frames + self.gap, self.num_frames + self.gap + num_frames)

    def restrict_to(self, part: str) -> "MemoryView":
        """The frames of one of ATTENDS, at unchanged positions."""
        hidden = num_hidden(part, self.num_frames, self.num_sink, self.num_slow)
        if not self.keys or not hidden:
            return self
        if hidden == self.num_frames:
            return dataclasses.replace(self, keys=(), values=())
        cut = lambda tensor: tensor[:, hidden * (tensor.shape[1] // self.num_frames) :]
        return dataclasses.replace(
            self,
            keys=LazyLayers(len(self.keys), lambda layer: cut(self.keys[layer])),
            values=LazyLayers(len(self.values), lambda layer: cut(self.values[layer])),
        )
