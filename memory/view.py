"""A memory of frames laid out for attention.

Shapes: B batch, M remembered latent frames, P tokens per latent frame, N heads, E head dim, K key tokens of a pass.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .packed import Packed
from .prefetch import Prefetch

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
    """Bytes of copies while KVBuffer.rotate_keys rotates keys of frames, of `elements` each in one layer."""
    frames = min(num_frames, max(1, ROTATED_ELEMENTS // elements))
    return frames * elements * rotation_bytes(itemsize)


def rotation_bytes(itemsize: int) -> int:
    """Bytes of copies for an element that is rotated: its input and output in float32, then its own dtype again."""
    return 4 if itemsize == 4 else 2 * 4 + itemsize


class KVBuffer(NamedTuple):
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

    def copy(self, keys_BPNE: Sequence[Tensor | Packed], values_BPNE: Sequence[Tensor | Packed]) -> "KVBuffer":
        """Write raw keys and values of the remembered frames, from any device."""
        for buffer, frames in ((self.keys, keys_BPNE), (self.values, values_BPNE)):
            plain = [frame for frame in frames if isinstance(frame, Tensor) and frame.device == buffer.device]
            if len(plain) == len(frames):
                torch.stack(plain, dim=1, out=buffer[:, : len(frames)])
                continue
            is_async = buffer.is_cuda
            for place, frame in enumerate(frames):
                if isinstance(frame, Packed):
                    frame = frame.to(buffer.device, non_blocking=is_async).unpack()
                buffer[:, place].copy_(frame, non_blocking=is_async)
        return self

    def rotate_keys(self, num_frames: int, rotate: Rotate) -> "KVBuffer":
        """Rotate raw keys to positions 0 .. num_frames - 1, in place."""
        at_once = max(1, ROTATED_ELEMENTS // self.keys[:, 0].numel())
        for first in range(0, num_frames, at_once):
            positions = range(first, min(first + at_once, num_frames))
            part = self.keys[:, positions.start : positions.stop]
            part.copy_(rotate(part, positions))
        return self

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
    """Buffers that are filled at every access, and valid until the next one."""

    def __init__(self, num_layers: int, take: Callable[[int], KVBuffer]):
        self.num_layers, self.take = num_layers, take

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, layer: int) -> KVBuffer:
        return self.take(range(self.num_layers)[layer])  # IndexError after the last layer


def laid_out(
    kv_placement: str,
    num_layers: int,
    empty: Callable[[], KVBuffer],
    raw: Callable[[KVBuffer, int], KVBuffer],
    rotated: Callable[[KVBuffer], KVBuffer],
) -> Sequence[KVBuffer]:
    """The buffers of all layers in one of stores.KV_PLACEMENTS.

    `raw` writes a layer to a buffer, from RAM while another layer computes; then `rotated` rotates its keys in place.
    """
    if kv_placement == "at once":
        return [rotated(raw(empty(), layer)) for layer in range(num_layers)]
    if kv_placement == "by layer":
        buffer = empty()
        return LazyLayers(num_layers, lambda layer: rotated(raw(buffer, layer)))
    # Rotation allocates, so it is done on the stream that computes.
    prefetch = Prefetch((empty(), empty()), raw, num_layers)
    return LazyLayers(num_layers, lambda layer: rotated(prefetch.take(layer)))


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
