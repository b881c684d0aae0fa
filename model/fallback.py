"""Out of memory in the middle of a video: the work begins again with the next smaller placement of keys and values."""

import dataclasses
import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..memory.fields import brief
from ..memory.memory import Memory
from ..memory.stores import KV_PLACEMENTS
from .device import is_out_of_memory
from .sampler import CausalSampler

log = logging.getLogger("context_forcing")

T = TypeVar("T")
MakeRoom = Callable[[Memory, str], None]
"""Frees device memory for work on a memory in a placement."""


def empty_cache(memory: Memory, kv_placement: str) -> None:
    """Give the memory that torch keeps for later back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Fallback:
    """The placement of keys and values over a video: as requested, and a smaller one after an out-of-memory.

    All placements make the same memory. An out-of-memory in the smallest one is an error.
    """

    def __init__(self, kv_placement: str | None, option: str = "--kv-placement", make_room: MakeRoom = empty_cache):
        """None: the samplers' own placement; every out-of-memory is an error. `option` is its name for the user."""
        self.kv_placement, self.option, self.make_room = kv_placement, option, make_room

    def placed(self, sampler: CausalSampler) -> CausalSampler:
        """A sampler with the placement in effect."""
        if self.kv_placement is None:
            return sampler
        return dataclasses.replace(
            sampler, options=dataclasses.replace(sampler.options, kv_placement=self.kv_placement)
        )

    def attempt(self, work: Callable[[], T], memory: Memory) -> T:
        """The result of `work`, which continues a memory with samplers that it has `placed`.

        If memory is at its end, the work begins again in the next placement, and a warning says so.
        """
        smaller = ""
        while True:
            try:
                if smaller:
                    self._free(memory, smaller)
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.kv_placement in (None, KV_PLACEMENTS[-1]):
                    raise
                failed, reason = self.kv_placement, brief(str(error) or type(error).__name__)
            # After the handler: the error has the frames of the work, and they have the view of the memory.
            self.kv_placement = smaller = KV_PLACEMENTS[KV_PLACEMENTS.index(failed) + 1]
            log.warning(
                "out of memory with keys and values '%s' (%s): the chunk begins again with '%s' and is the same;"
                " %s '%s' begins so", failed, reason, smaller, self.option, smaller,
            )  # fmt: skip

    def _free(self, memory: Memory, kv_placement: str) -> None:
        if kv_placement == KV_PLACEMENTS[-1]:
            # In place: whoever waits for the next chunk holds the memory before it.
            memory.store.park(torch.device("cpu"))
        gc.collect()
        self.make_room(memory, kv_placement)


NO_FALLBACK = Fallback(None)
