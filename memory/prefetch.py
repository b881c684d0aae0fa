"""What does not fit on a device waits in RAM, and is copied ahead: the next part while the one before is used."""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .fields import brief

log = logging.getLogger("context_forcing")

Slot = TypeVar("Slot", bound=Sequence[Tensor])
"""Tensors on a device with room for one part."""


class Prefetch(Generic[Slot]):
    """Parts 0 .. count - 1 that are used in turn, again and again, on a device with room for two.

    On CUDA a part is copied on a stream of its own: after what used its slot before, and before what uses it next.
    """

    def __init__(self, slots: Sequence[Slot], copy: Callable[[Slot, int], object], count: int):
        """`copy(slot, number)` writes a part to one of two slots. It must not allocate what outlives the call."""
        self.copy, self.count, self.device = copy, count, slots[0][0].device
        self.slots = list(slots)
        """The first one gets the next part."""
        self.ahead: int | None = None
        """The part in the second slot, or on its way there."""
        self.stream = copy_stream(self.device)
        self.copied: Any = None
        """An event: the part `ahead` is there."""
        if self.stream is not None:
            for tensor in itertools.chain(*slots):
                # Its memory may be given away only after the last copy, also if nobody waits for that copy.
                tensor.record_stream(self.stream)

    def take(self, number: int) -> Slot:
        """The slot with a part, valid until the next call. The part after it is on its way to the other slot."""
        if number != self.ahead:
            self._fetch(number)
        slot = self.slots[1]
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        self._fetch((number + 1) % self.count)
        return slot

    def _fetch(self, number: int) -> None:
        """Begin to copy a part to the first slot, then exchange the slots. An error leaves the other slot as it is."""
        slot = self.slots[0]
        if self.stream is None:
            self.copy(slot, number)
        else:
            # The last pass that used this slot must end first.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.copy(slot, number)
            self.copied = self.stream.record_event()
        self.slots, self.ahead = self.slots[::-1], number


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that copies to a CUDA device; None for other devices.

    There is one, because torch keeps the memory of every stream apart.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def in_pinned_ram(tensor: Tensor) -> Tensor:
    """A copy in RAM from which CUDA copies while it computes.

    Where RAM cannot be pinned, the copy is in other RAM, the log says so once, and copies are slower.
    """
    try:
        room = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _say_unpinned(brief(error))
        room = torch.empty_like(tensor, device="cpu")
    return room.copy_(tensor)


@functools.cache
def _say_unpinned(reason: str) -> None:
    log.warning("RAM cannot be pinned (%s): copies to the device are slower, and the results are the same", reason)
