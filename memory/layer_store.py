"""The memory of the released Context Forcing weights, policy `released` (method.md 8.1): a second kind of Memory.

Every layer keeps slots of its own and decides for itself, in every pass of the network and not only in the one over
clean latents: a chunk's first frame goes into slow memory as it stands in the first pass whose keys differ enough from
those of the pass before, as a rule pure noise. That is what the weights were trained with; `clean` and `novel` are
what this software holds for right.

Shapes: B batch (one video), T latent frames of a chunk, P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RELEASED, MemoryConfig
from .memory import FrameKV, Memory
from .policy import Decision, Slots


@dataclass(frozen=True, kw_only=True)
class LayerSlots:
    """What one layer holds. Never changes; `take` returns what it holds after one more pass."""

    frames: tuple[int, ...] = ()
    """Absolute latent frame in every filled slot: sink, slow, fast with the newest chunk last; before all slots are
    full, slow entries lie on the oldest frames after the sink."""
    entries: tuple[FrameKV, ...] = ()
    """Raw keys and values of every filled slot, [B, P, N, E]."""
    num_slow: int = 0
    descriptor: Tensor | None = None
    """Mean raw key of the last pass, [B, N * E]."""

    def take(self, config: MemoryConfig, first: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> "LayerSlots":
        """After a pass over the chunk that begins at latent frame `first`, whichever pass over it that is."""
        descriptor = k_BTPNE.flatten(1, 2).mean(dim=1).flatten(1).float()
        chunk = tuple(FrameKV(k_BTPNE[:, t], v_BTPNE[:, t]) for t in range(k_BTPNE.shape[1]))
        frames, entries, num_slow = list(self.frames), list(self.entries), self.num_slow
        newest_slow = frames[config.sink + num_slow - 1] if num_slow else None
        if newest_slow != first and self._stands_out(config, first, descriptor):
            if num_slow < config.slow:
                num_slow += 1
            else:
                for part in (frames, entries):
                    part[config.sink : config.sink + config.slow - 1] = part[
                        config.sink + 1 : config.sink + config.slow
                    ]
            slot = config.sink + num_slow - 1
            # A copy: a slice would hold the whole chunk's tensor for as long as it is remembered.
            frames[slot], entries[slot] = first, FrameKV(chunk[0].keys.clone(), chunk[0].values.clone())
        new_frames, num_new = range(first, first + len(chunk)), len(chunk)
        if self.frames[-num_new:] == tuple(new_frames):  # a later pass over the same chunk
            del frames[-num_new:], entries[-num_new:]
        elif len(frames) == config.sink + config.slow + config.fast:
            oldest_fast = config.sink + config.slow
            del frames[oldest_fast : oldest_fast + num_new], entries[oldest_fast : oldest_fast + num_new]
        return LayerSlots(
            frames=(*frames, *new_frames), entries=(*entries, *chunk), num_slow=num_slow, descriptor=descriptor
        )

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        new_kv = [tensor for entry in self.entries for tensor in (entry.keys, entry.values)]
        return new_kv if self.descriptor is None else [*new_kv, self.descriptor]

    def _stands_out(self, config: MemoryConfig, first: int, descriptor: Tensor) -> bool:
        if not config.slow or first < config.sink + config.chunk or self.descriptor is None:
            return False
        similarity = F.cosine_similarity(descriptor, self.descriptor.to(descriptor.device), dim=-1).mean()
        return bool(similarity < config.slow_similarity_threshold)


@dataclass(frozen=True, kw_only=True)
class ReleasedMemory(Memory):
    """A memory whose layers keep slots of their own. `slots` says which frames any of them holds."""

    policies: ClassVar[tuple[str, ...]] = (RELEASED,)
    can_be_compact: ClassVar[bool] = False
    layers: tuple[LayerSlots, ...] = ()
    """Empty before the first chunk."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    @property
    def key_shapes(self) -> set[tuple[int, ...]]:
        return {(len(self.layers), *entry.keys.shape) for layer in self.layers for entry in layer.entries}

    @property
    def is_compact(self) -> bool:
        return False

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(tensor for layer in self.layers for tensor in layer.tensors())]

    def compact(self) -> "Memory":
        raise ValueError(
            "compact: a memory of policy released keeps keys of passes over noise, which cannot be made anew from the"
            " film; keep it exact"
        )

    def check_change(self, change: str) -> None:
        """Only `keep`: what is held cannot be written anew, and its slots are counted from the film's first frame."""
        super().check_change(change)
        if change != "keep":
            raise ValueError(
                f"change: {change} is not there for a memory of policy released; its prompts take over by keep"
            )

    def append(self, latents_BCTHW: Tensor, new_kv: Sequence[LayerSlots]) -> "Memory":
        """Commit a chunk: clean latents, and what every layer holds after the pass over them."""
        self._check_fits(latents_BCTHW)
        first, sink = self.num_frames, self.config.sink
        slow = {frame for layer in new_kv for frame in layer.frames[sink : sink + layer.num_slow]}
        plain = {frame for layer in new_kv for frame in layer.frames[sink + layer.num_slow :]} - slow
        grown = dataclasses.replace(
            self,
            slots=Slots(new_kv[0].frames[:sink], tuple(sorted(slow)), tuple(sorted(plain)), (None,) * len(plain)),
            layers=tuple(new_kv),
            decisions=(*self.decisions, Decision(first, first in slow, None)),
        )
        return grown.with_latents(latents_BCTHW)

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, before: "Memory | None" = None
    ) -> "Memory":
        """Descriptors stay where they are."""
        held = [entry for layer in before.layers for entry in layer.entries] if isinstance(before, type(self)) else []
        there = {id(entry.written): entry for entry in held}
        layers = tuple(
            dataclasses.replace(
                layer, entries=tuple(entry.to(device, dtype, there.get(id(entry.written))) for entry in layer.entries)
            )
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)


def empty_memory(config: MemoryConfig, latent_size: tuple[int, int, int]) -> Memory:
    """The memory of a video that has not begun, of the kind that the policy asks for; C, H, W of a latent frame."""
    kind = ReleasedMemory if config.policy == RELEASED else Memory
    return kind(config=config, latent_size=latent_size)
