"""A memory of frames laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim, K key tokens of a pass.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Packed, unpacked

Rotate = Callable[[Tensor, range], Tensor]
"""(raw keys [B, n, P, N, E] of n remembered frames, their temporal positions) -> rotated keys."""

ATTENDS = ("all", "no sink", "fast only", "itself")
"""Parts of a memory that a pass can attend to; `itself` is none, so a chunk sees only its own frames."""

ROTATED_ELEMENTS = 2**23
"""Largest number of key elements rotated at once; bounds the size of float32 copies."""


def num_hidden(attends: str, num_frames: int, num_sink: int, num_slow: int) -> int:
    """Number of the first remembered frames that a pass which attends to one of ATTENDS does not see."""
    hidden = {"all": 0, "no sink": num_sink, "fast only": num_sink + num_slow, "itself": num_frames}[attends]
    return min(hidden, num_frames)


def rotated_bytes(num_frames: int, elements: int, itemsize: int) -> int:
    """Bytes of copies while KVBuffer.fill rotates keys of frames, of `elements` each in one layer."""
    frames = min(num_frames, max(1, ROTATED_ELEMENTS // elements))
    return frames * elements * rotation_bytes(itemsize)


def rotation_bytes(itemsize: int) -> int:
    """Bytes of copies for an element that is rotated: its input and output in float32, then its own dtype again."""
    return 4 if itemsize == 4 else 2 * 4 + itemsize


@dataclass(frozen=True)
class KVBuffer:
    """Rotated keys and values of one layer, [B, frames, P, N, E]: the remembered frames, then room for a chunk.

    Every pass over the chunk overwrites the room, so that no pass copies the memory.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, num_frames: int, shape_BPNE: Sequence[int], dtype: torch.dtype, device: torch.device) -> "KVBuffer":
        """A buffer of `num_frames` frames, those of the chunk included; `shape_BPNE` of one frame."""
        batch, *token_shape = shape_BPNE
        shape = batch, num_frames, *token_shape
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return cls(*(torch.empty(shape, device=device, dtype=dtype) for _ in "kv"))

    def fill(
        self, keys_BPNE: Sequence[Tensor | Packed], values_BPNE: Sequence[Tensor | Packed], rotate: Rotate
    ) -> None:
        """Write raw keys, rotated to positions 0 .. M - 1, and values of the remembered frames."""
        for buffer, frames in ((self.keys, keys_BPNE), (self.values, values_BPNE)):
            if not any(isinstance(frame, Packed) for frame in frames):
                plain = (frame for frame in frames if isinstance(frame, Tensor))
                torch.stack([frame.to(buffer.device) for frame in plain], dim=1, out=buffer[:, : len(frames)])
                continue
            for place, frame in enumerate(frames):
                buffer[:, place].copy_(unpacked(frame.to(buffer.device)))
        at_once = max(1, ROTATED_ELEMENTS // self.keys[:, 0].numel())
        for first in range(0, len(keys_BPNE), at_once):
            positions = range(first, min(first + at_once, len(keys_BPNE)))
            part = self.keys[:, positions.start : positions.stop]
            part.copy_(rotate(part, positions))

    def with_chunk(
        self, seen: range, k_BTPNE: Tensor, v_BTPNE: Tensor, has_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the remembered frames `seen`, then those of a chunk, [B, K, N, E].

        They are views of the buffer, valid until the next pass, unless the chunk has gradients or no room.
        """
        stop, pairs = seen.stop + k_BTPNE.shape[1], ((self.keys, k_BTPNE), (self.values, v_BTPNE))
        if has_grad or stop > self.keys.shape[1]:
            # What the backward pass reads must not be overwritten.
            k, v = (torch.cat([buffer[:, seen.start : seen.stop], new], dim=1) for buffer, new in pairs)
        else:
            for buffer, new in pairs:
                buffer[:, seen.stop : stop].copy_(new)
            k, v = (buffer[:, seen.start : stop] for buffer, _ in pairs)
        return k.flatten(1, 2), v.flatten(1, 2)


class LazyLayers(Sequence):
    """One buffer for all layers, filled at every access."""

    def __init__(self, num_layers: int, buffer: KVBuffer, fill: Callable[[KVBuffer, int], None]):
        self.num_layers, self.buffer, self.fill = num_layers, buffer, fill

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, layer: int) -> KVBuffer:
        self.fill(self.buffer, range(self.num_layers)[layer])  # IndexError after the last layer
        return self.buffer


@dataclass(frozen=True)
class MemoryView:
    """Remembered frames in the order sink, slow, fast, and room for the next chunk."""

    layers: Sequence[KVBuffer] = ()
    """Empty: nothing is remembered, or it is not seen."""
    num_frames: int = 0
    """Remembered frames have temporal positions 0 .. num_frames - 1."""
    num_sink: int = 0
    num_slow: int = 0
    gap: int = 0
    """Temporal positions between the last remembered frame and the next chunk."""
    hidden: int = 0
    """The first remembered frames that are not seen."""

    def positions(self, num_frames: int) -> range:
        """Temporal positions of the next chunk of `num_frames` latent frames."""
        return range(self.num_frames + self.gap, self.num_frames + self.gap + num_frames)

    def restrict_to(self, part: str) -> "MemoryView":
        """The frames of one of ATTENDS, at unchanged positions, in the same buffers."""
        hidden = max(self.hidden, num_hidden(part, self.num_frames, self.num_sink, self.num_slow))
        return dataclasses.replace(self, hidden=hidden, layers=self.layers if hidden < self.num_frames else ())

    def with_chunk(self, layer: int, k_BTPNE: Tensor, v_BTPNE: Tensor, has_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, N, E] that a chunk with rotated keys attends to in a layer (KVBuffer.with_chunk)."""
        if not self.layers:
            return k_BTPNE.flatten(1, 2), v_BTPNE.flatten(1, 2)
        return self.layers[layer].with_chunk(range(self.hidden, self.num_frames), k_BTPNE, v_BTPNE, has_grad)
