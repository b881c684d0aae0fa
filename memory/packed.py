"""Keys and values in one byte a number, with scales per head.

A head of a frame has one scale for its values and one for each channel of its keys: keys before rotation have channels
that are far larger than the others (docs/performance.md, Eight bits).

Shapes: B batch, P tokens per latent frame, N heads, E head dim. Leading dims, such as layers, are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = {"int8": 127, "fp8": 448}
"""By name, the largest number of each type."""
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KV_DTYPES = ("auto", *TYPES)
"""How keys and values of sink and slow frames are stored: `auto` is the dtype of the network."""


@dataclass(frozen=True)
class Packed:
    """A tensor [..., P, N, E] in one byte a number."""

    numbers: Tensor
    scales: Tensor
    """float32, [..., 1, N, E] or [..., 1, N, 1]."""
    dtype: torch.dtype
    """Of `unpack`."""

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: int | slice) -> "Packed":
        """Some of the first dimension."""
        return Packed(self.numbers[part], self.scales[part], self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "Packed":
        """The same numbers on a device; `dtype` is that of `unpack`."""
        dtype, numbers = dtype or self.dtype, self.numbers.to(device, non_blocking=non_blocking)
        if numbers is self.numbers and dtype == self.dtype:
            return self
        return Packed(numbers, self.scales.to(device, non_blocking=non_blocking), dtype)

    def unpack(self) -> Tensor:
        """The tensor. An error is at most half a step of int8, scale / 2, and 1/16 of a number in fp8."""
        return (self.numbers.float() * self.scales).to(self.dtype)


def pack(x: Tensor, kv_dtype: str, per_channel: bool) -> Packed:
    """A tensor [layers, ..., P, N, E] in one byte a number, layer by layer; `kv_dtype` is one of TYPES."""
    dims, largest = (-3,) if per_channel else (-3, -1), LARGEST[kv_dtype]
    parts = []
    for layer in x.unbind(0):
        wide = layer.float()
        most = wide.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest)
        # CUDA divides by a tensor as the CPU does; by a number it does not, and frames are packed on either.
        scales = most / torch.full_like(most, largest)
        scaled = (wide / scales).clamp(-largest, largest)
        parts.append(((scaled.round() if kv_dtype == "int8" else scaled).to(TYPES[kv_dtype]), scales))
    numbers, scales = (torch.stack(each) for each in zip(*parts))
    return Packed(numbers, scales, x.dtype)


def unpacked(x: Tensor | Packed) -> Tensor:
    """A tensor as it is, or out of one byte a number."""
    return x.unpack() if isinstance(x, Packed) else x


def copied(x: Tensor | Packed, copy: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor | Packed:
    """With its tensors copied; `dtype` is that of the tensor, or of `unpack`."""
    return Packed(copy(x.numbers), copy(x.scales), dtype) if isinstance(x, Packed) else copy(x.to(dtype))


def plain_tensors(x: Tensor | Packed) -> tuple[Tensor, ...]:
    """The tensors that are stored."""
    return (x.numbers, x.scales) if isinstance(x, Packed) else (x,)
