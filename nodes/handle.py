"""The memory as it travels between nodes."""

from typing import NamedTuple

from comfy_api.latest import io
from torch import Tensor

from ..memory.memory import Memory

MemoryType = io.Custom("CF_MEMORY")
"""A `MemoryHandle`. It is immutable: ComfyUI may cache it, and several nodes may use it."""


class MemoryHandle(NamedTuple):
    """A memory between two nodes.

    ComfyUI's cache measures CPU tensors in tuples. `tensors` has those that the memory does not share with the memory
    before it, so that the handles of a chain have the true size in sum.
    """

    memory: Memory
    tensors: tuple[Tensor, ...]
    clips: tuple[str, ...] = ()
    """Previews of the video's segments in order, files of the temporary folder; a segment may have none."""

    @classmethod
    def of(cls, memory: Memory, before: Memory | None = None, clips: tuple[str, ...] = ()) -> "MemoryHandle":
        """The handle of a memory that continues the memory `before`."""
        shared = {id(tensor) for tensor in before.tensors()} if before else set()
        return cls(memory, tuple(tensor for tensor in memory.tensors() if id(tensor) not in shared), clips)
