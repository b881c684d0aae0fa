"""The memory as it travels between nodes, and what samplers made of it."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io
from torch import Tensor

from ..memory.memory import Memory

MemoryType = io.Custom("CF_MEMORY")
"""A `MemoryHandle`. Its memory is immutable: ComfyUI may cache it, and several nodes may use it."""


class Autosave(NamedTuple):
    """A memory file that a sampler wrote. Another file can get its name after a user has deleted it."""

    path: str
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: str) -> "Autosave":
        """The file that is there now. Raises OSError if there is none."""
        found = os.stat(path)
        return cls(path, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """All that a sampler's result depends on, beside the memory that it continues."""

    model: weakref.ref[Any]
    """The MODEL. It is compared by identity."""
    text: Tensor
    """Embedding of the prompt, [1, L, 4096]."""
    settings: Mapping[str, str | float | bool]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Inputs):
            return NotImplemented
        is_same_model = self.model() is not None and self.model() is other.model()
        return is_same_model and self.settings == other.settings and torch.equal(self.text, other.text)


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """What a sampler made of a memory. It keeps nothing alive that is large: ComfyUI's cache does, or a later node."""

    inputs: Inputs
    memory: weakref.ref[Memory]
    samples: weakref.ref[Tensor]
    """Latents of the segment as ComfyUI has them, [1, C, T, H, W]."""
    clips: tuple[str, ...]
    autosave: Autosave | None
    continuations: "list[Continuation]"
    ui: Mapping[str, Any]

    @property
    def is_alive(self) -> bool:
        return self.memory() is not None and self.samples() is not None


class MemoryHandle(NamedTuple):
    """A memory between two nodes.

    ComfyUI's cache measures CPU tensors in tuples, no others. `tensors` has those that the memory does not share with
    the memory before it, so that the handles of a chain have the true size in sum. Tensors on a GPU are not in it: they
    must be free after an out-of-memory has moved their values to RAM (KVStore.park).
    """

    memory: Memory
    tensors: tuple[Tensor, ...]
    continuations: list[Continuation]
    """Results of samplers that continued this memory. ComfyUI's cache knows nodes by their places in a graph, so the
    same segment in another storyboard, for example a branch, would be made again."""
    clips: tuple[str, ...] = ()
    """Previews of the video's segments in order, files of the temporary folder; a segment may have none."""
    autosave: Autosave | None = None
    """File of this memory, or of one before it, that the next segment's autosave replaces."""

    @classmethod
    def of(
        cls,
        memory: Memory,
        before: Memory | None = None,
        clips: tuple[str, ...] = (),
        autosave: Autosave | None = None,
    ) -> "MemoryHandle":
        """The handle of a memory that continues the memory `before`."""
        shared = {id(tensor) for tensor in before.tensors()} if before else set()
        in_ram = (tensor for tensor in memory.tensors() if tensor.device.type == "cpu")
        return cls(memory, tuple(tensor for tensor in in_ram if id(tensor) not in shared), [], clips, autosave)

    def remember(self, inputs: Inputs, after: "MemoryHandle", samples: Tensor, ui: Mapping[str, Any]) -> None:
        """A sampler with these inputs made the memory `after` of this one."""
        self.continuations[:] = [each for each in self.continuations if each.is_alive]
        refs = {"memory": weakref.ref(after.memory), "samples": weakref.ref(samples)}
        more = {"clips": after.clips, "autosave": after.autosave, "continuations": after.continuations, "ui": ui}
        self.continuations.append(Continuation(inputs=inputs, **refs, **more))

    def find(self, inputs: Inputs) -> "tuple[MemoryHandle, Tensor, Mapping[str, Any]] | None":
        """(handle, samples, ui) of a sampler with the same inputs, if its result is still there."""
        for each in self.continuations:
            memory, samples = each.memory(), each.samples()
            if memory is not None and samples is not None and each.inputs == inputs:
                # Its tensors count for the handle that was there first.
                handle = MemoryHandle(memory, (), each.continuations, each.clips, each.autosave)
                return handle, samples, each.ui
        return None
