"""Keys and values of remembered latent frames. A store is a value: operations return a new store that shares storage.

Shapes: B batch (one video), T latent frames of a chunk, P tokens per latent frame, N heads, E head dim.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MemoryConfig
from .packed import TYPES, Packed, copied, pack, plain_tensors, unpacked
from .policy import Decision, Slots, advance
from .prefetch import in_pinned_ram
from .recall import Choose
from .view import KVBuffer, MemoryView, Rotate, laid_out, rotated_bytes

KV_PLACEMENTS = ("at once", "by layer", "from RAM")
"""How keys and values are prepared for a chunk: all layers before it, the fastest; each layer in every pass, with half
the memory; each layer in every pass from RAM, where they stay, copied while the layer before computes. The result is
the same."""

AddUp = Callable[[Tensor], Tensor]
"""The sum of a tensor over the processes of which each has a part of the heads."""


class Activations(NamedTuple):
    """Bytes of the activations of a pass."""

    attending: int
    """Those of a block while its self-attention begins."""
    most: int
    """At the peak, in the feed-forward."""


SIMILARITY_ELEMENTS = 2**24
"""Largest number of key elements compared at once; bounds the size of float32 copies."""


@dataclass(frozen=True)
class FrameKV:
    """Raw keys (before rotation) and values of a latent frame: all layers [layers, B, P, N, E], or one [B, P, N, E]."""

    keys: Tensor | Packed
    values: Tensor | Packed
    written: object = field(default_factory=object, compare=False, repr=False)
    """Identity of the pass that computed them; the same in copies on other devices."""
    pinned: bool = field(default=False, compare=False, repr=False, kw_only=True)
    """Whether they are copies for prefetch.in_pinned_ram."""

    def to(
        self, device: torch.device, dtype: torch.dtype | None, existing: "FrameKV | None", pinned: bool = False
    ) -> "FrameKV":
        """A copy on a device, `pinned` in RAM; `existing` itself if it is such a copy."""
        dtype = dtype or self.keys.dtype
        if existing and (existing.keys.device, existing.keys.dtype, existing.pinned) == (device, dtype, pinned):
            return existing
        if pinned == self.pinned and (not pinned or dtype == self.keys.dtype):
            keys, values = self.keys.to(device, dtype), self.values.to(device, dtype)
            return self if keys is self.keys else FrameKV(keys, values, self.written, pinned=pinned)
        copy = in_pinned_ram if pinned else lambda tensor: tensor.to(device, copy=True)
        keys, values = (copied(part, copy, dtype) for part in (self.keys, self.values))
        return FrameKV(keys, values, self.written, pinned=pinned)

    def tensors(self) -> list[Tensor]:
        """What is stored: keys, then values."""
        return [tensor for part in (self.keys, self.values) for tensor in plain_tensors(part)]

    def packed(self, kv_dtype: str) -> "FrameKV":
        """Keys and values of all layers in one byte a number (packed.KV_DTYPES); those that are so stay as they are."""
        if kv_dtype == "auto" or isinstance(self.keys, Packed) or isinstance(self.values, Packed):
            return self
        return FrameKV(pack(self.keys, kv_dtype, True), pack(self.values, kv_dtype, False), self.written)

    def park(self, device: torch.device) -> None:
        """Move keys and values to a device in place, for all that hold this object; the numbers stay the same.

        The tensors before are free unless someone holds them and not this object.
        """
        moved = self.to(device, None, None)
        for name in ("keys", "values", "pinned"):
            object.__setattr__(self, name, getattr(moved, name))


class NewFrames:
    """Keys and values of the frames of a chunk, written layer by layer while a pass computes them."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.frames: list[FrameKV] = []

    def write(self, layer: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> None:
        """Copy raw keys and values of a layer."""
        new = list(zip(k_BTPNE.unbind(1), v_BTPNE.unbind(1)))
        if not self.frames:
            room = lambda tensor: tensor.new_empty((self.num_layers, *tensor.shape))
            self.frames = [FrameKV(room(k), room(v)) for k, v in new]
        for frame, (k, v) in zip(self.frames, new, strict=True):
            for room, new_values in ((frame.keys, k), (frame.values, v)):
                assert isinstance(room, Tensor), "write"
                room[layer] = new_values

    def tensors(self) -> list[Tensor]:
        """Keys and values, in parts of the size that is compared at once."""
        return [part for kv in self.frames for tensor in kv.tensors() for part in tensor.split(_layers_at_once(tensor))]


@dataclass(frozen=True, kw_only=True)
class KVStore(abc.ABC):
    """Interface of stores."""

    slots: Slots = field(default_factory=Slots)
    """The remembered latent frames."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Operations (memory.OPERATIONS) that the store cannot do, each with an error message."""

    @abc.abstractmethod
    def append(
        self, config: MemoryConfig, frames: range, new_kv: Sequence[Any], choose: Choose, add_up: AddUp | None = None
    ) -> tuple["KVStore", tuple[Decision, ...]]:
        """Commit the chunk of latent `frames` with what its pass at sigma 0 left in `new_kv`.

        Policy recall chooses slow frames by `choose`. `add_up` is given if other processes have the other heads.
        """

    @abc.abstractmethod
    def view(
        self, config: MemoryConfig, next_frame: int, rotate: Rotate, device: torch.device, kv_placement: str
    ) -> Any:
        """What the chunk that begins at latent frame `next_frame` attends to on a device (model/memory_attention.py).

        But for "at once" it holds copies of one layer or two.
        """

    @abc.abstractmethod
    def frame_kvs(self) -> Iterator[tuple[int, FrameKV]]:
        """All keys and values, each with its latent frame."""

    @abc.abstractmethod
    def map(self, change: Callable[[FrameKV], FrameKV]) -> "KVStore":
        """The store with all keys and values replaced."""

    @abc.abstractmethod
    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Header fields and tensors of a memory file (memory/snapshot.py)."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, config: MemoryConfig, slots: Slots, header: dict, tensors: dict[str, Tensor]) -> "KVStore":
        """A store from a file; removes its tensors from `tensors`. Raises ValueError or KeyError for damaged ones."""

    @abc.abstractmethod
    def working_bytes(
        self,
        config: MemoryConfig,
        kv_placement: str,
        num_layers: int,
        elements: int,
        itemsize: int,
        activations: Activations,
        kv_dtype: str = "auto",
    ) -> int:
        """Largest device memory of a chunk over a full store, with the activations of its passes.

        `elements` are the key elements of one frame in one layer; scales of packed frames are not counted.
        """

    def packed(self, kv_dtype: str) -> "KVStore":
        """Frames of sink and slow in one of packed.KV_DTYPES; those that are packed stay as they are."""
        assert kv_dtype == "auto", "Memory.check_supports"
        return self

    def to(
        self, device: torch.device, dtype: torch.dtype | None, before: "KVStore | None", pinned: bool = False
    ) -> "KVStore":
        """The same keys and values on a device, `pinned` in RAM. Those that `before` has there already are shared."""
        existing = {id(kv.written): kv for _, kv in before.frame_kvs()} if before else {}
        return self.map(lambda kv: kv.to(device, dtype, existing.get(id(kv.written)), pinned))

    def park(self, device: torch.device) -> None:
        """Move keys and values to a device in place (FrameKV.park), also those of memories that share them.

        Frames that only other memories have stay where they are.
        """
        for _, kv in self.frame_kvs():
            kv.park(device)

    @property
    def unread(self) -> tuple[int, ...]:
        """Remembered frames without keys and values, in the order of their positions."""
        return ()

    @property
    def key_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of the frames' keys, [layers, B, P, N, E]."""
        return {tuple(kv.keys.shape) for _, kv in self.frame_kvs()}

    def tensors(self) -> list[Tensor]:
        """All tensors of the store."""
        return [tensor for _, kv in self.frame_kvs() for tensor in kv.tensors()]

    def restrict_to(self, frames: Collection[int]) -> "KVStore":
        """The store with only these latent frames, for `flush` and `cut`."""
        raise NotImplementedError

    def write(self, frames: Sequence[int], new_kv: Sequence[FrameKV]) -> "KVStore":
        """New keys and values for remembered frames, for `recache`."""
        raise NotImplementedError

    def compact(self) -> "KVStore":
        """The store without keys and values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FrameStore(KVStore):
    """Keys and values per latent frame, from passes over clean latents. The policy decides once per frame."""

    frames: dict[int, FrameKV] = field(default_factory=dict)
    """By absolute latent-frame index: the frames of `slots`, but those to be read (Memory.unread); none: compact.
    Never changed in place."""
    similarities: dict[tuple[int, int], float] = field(default_factory=dict)
    """Of pairs of slow frames, the older one first, where eviction compares them: a pair is compared once. Pairs that
    are missing are compared when they are needed. Never changed in place."""

    def append(
        self,
        config: MemoryConfig,
        frames: range,
        new_kv: Sequence[FrameKV],
        choose: Choose,
        add_up: AddUp | None = None,
    ) -> tuple["FrameStore", tuple[Decision, ...]]:
        """`new_kv` are the keys and values of each frame. Keys are compared on their device."""
        kvs, device = self.frames | dict(zip(frames, new_kv, strict=True)), new_kv[0].keys.device
        known = dict(self.similarities)

        def similarity(frame: int, others: Sequence[int]) -> list[float]:
            pairs = [(min(frame, other), max(frame, other)) for other in others]
            if missing := [other for pair, other in zip(pairs, others) if pair not in known]:
                keys = kvs[frame].keys.to(device)
                found = torch.stack([key_similarity(keys, kvs[other].keys, add_up) for other in missing]).tolist()
                known.update({(min(frame, other), max(frame, other)): value for other, value in zip(missing, found)})
            return [known[pair] for pair in pairs]

        slots, decisions = advance(self.slots, config, frames, similarity, choose)
        kept = {pair: known[pair] for pair in itertools.combinations(slots.slow, 2) if pair in known}
        store = FrameStore(
            slots=slots,
            frames={frame: kvs[frame] for frame in slots.all if frame in kvs},
            similarities=kept if config.evicts_redundant else {},
        )
        return store, decisions

    def view(
        self, config: MemoryConfig, next_frame: int, rotate: Rotate, device: torch.device, kv_placement: str
    ) -> MemoryView:
        kvs = [self.frames[frame] for frame in self.slots.all]
        if not kvs:
            return MemoryView()
        keys = kvs[0].keys
        layers = laid_out(
            kv_placement,
            len(keys),
            empty=lambda: KVBuffer.empty(len(kvs) + config.chunk, keys.shape[1:], keys.dtype, device),
            raw=lambda buffer, layer: buffer.copy([kv.keys[layer] for kv in kvs], [kv.values[layer] for kv in kvs]),
            rotated=lambda buffer: buffer.rotate_keys(len(kvs), rotate),
        )
        return MemoryView(layers, len(kvs), len(self.slots.sink), len(self.slots.slow))

    def frame_kvs(self) -> Iterator[tuple[int, FrameKV]]:
        yield from self.frames.items()

    @property
    def unread(self) -> tuple[int, ...]:
        return tuple(frame for frame in self.slots.all if frame not in self.frames)

    def map(self, change: Callable[[FrameKV], FrameKV]) -> "FrameStore":
        return dataclasses.replace(self, frames={frame: change(kv) for frame, kv in self.frames.items()})

    def packed(self, kv_dtype: str) -> "FrameStore":
        kept = {*self.slots.sink, *self.slots.slow}
        frames = {frame: kv.packed(kv_dtype) if frame in kept else kv for frame, kv in self.frames.items()}
        return dataclasses.replace(self, frames=frames)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        named = {}
        for n, kv in self.frames.items():
            for part in ("keys", "values"):
                tensors = plain_tensors(getattr(kv, part))
                named |= dict(zip((f"{part}.{n}", f"{part}.{n}.scales"), tensors))
        # Only where there are any: files of other policies stay as they were.
        similarities = [(*pair, value) for pair, value in self.similarities.items()]
        header = {"similarities": similarities} if similarities else {}
        return header, {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    @classmethod
    def from_state(cls, config: MemoryConfig, slots: Slots, header: dict, tensors: dict[str, Tensor]) -> "FrameStore":
        frames = slots.all if header["form"] == "exact" else ()
        kvs = {
            frame: FrameKV(*(_stored(tensors, f"{part}.{frame}") for part in ("keys", "values"))) for frame in frames
        }
        similarities = {(older, newer): value for older, newer, value in header.get("similarities", ())}
        for older, newer in similarities:
            if not (older < newer and {older, newer} <= {*slots.slow}):
                raise ValueError("damaged: similarities has an impossible value")
        return cls(slots=slots, frames=kvs, similarities=similarities)

    def working_bytes(
        self,
        config: MemoryConfig,
        kv_placement: str,
        num_layers: int,
        elements: int,
        itemsize: int,
        activations: Activations,
        kv_dtype: str = "auto",
    ) -> int:
        layer_frame = 2 * elements * itemsize
        frame, buffer = num_layers * layer_frame, config.num_slots * layer_frame
        rotated = rotated_bytes(config.capacity, elements, itemsize)
        # Keys of frames are compared in float32: two copies of other dtypes, and three tensors of the cosine.
        compared = (3 if itemsize == 4 else 5) * 4 * min(SIMILARITY_ELEMENTS, num_layers * elements)
        # The commit pass writes keys and values of the chunk before rotation.
        new = config.chunk * frame
        num_packed = 0 if kv_dtype == "auto" else config.sink + config.slow
        stored = (config.capacity - num_packed) * frame + num_packed * frame // itemsize
        if kv_placement == "at once":  # buffers are filled before the passes
            after = new + max(activations.most, compared)
            return stored + num_layers * buffer + max(rotated, after)
        # From RAM, a second buffer gets the next layer.
        held = stored + buffer if kv_placement == "by layer" else 2 * buffer
        return held + new + max(rotated + activations.attending, activations.most, compared)

    def restrict_to(self, frames: Collection[int]) -> "FrameStore":
        keep = lambda part: tuple(frame for frame in part if frame in frames)
        slots, fast = self.slots, keep(self.slots.fast)
        similarity = dict(zip(slots.fast, slots.similarity_to_previous, strict=True))
        slots = Slots(keep(slots.sink), keep(slots.slow), fast, tuple(similarity[frame] for frame in fast))
        return FrameStore(
            slots=slots,
            frames={frame: kv for frame, kv in self.frames.items() if frame in frames},
            similarities=self._similarities_of(frames),
        )

    def write(self, frames: Sequence[int], new_kv: Sequence[FrameKV]) -> "FrameStore":
        kvs = self.frames | dict(zip(frames, new_kv, strict=True))
        return dataclasses.replace(
            self,
            frames={frame: kvs[frame] for frame in self.slots.all if frame in kvs},
            similarities=self._similarities_of({*self.slots.slow} - {*frames}),
        )

    def compact(self) -> "FrameStore":
        return dataclasses.replace(self, frames={}, similarities={})

    def _similarities_of(self, frames: Collection[int]) -> dict[tuple[int, int], float]:
        """The similarities of pairs of these frames."""
        return {pair: value for pair, value in self.similarities.items() if {*pair} <= {*frames}}


def _stored(tensors: dict[str, Tensor], name: str) -> Tensor | Packed:
    """Keys or values of a file. Raises ValueError for scales that do not fit."""
    numbers, scales = tensors.pop(name), tensors.pop(f"{name}.scales", None)
    if scales is None:
        return numbers
    fits = numbers.dtype in TYPES.values() and scales.dtype == torch.float32 and scales.ndim == numbers.ndim == 5
    expected = (*numbers.shape[:2], 1, numbers.shape[3], numbers.shape[4])
    if not fits or tuple(scales.shape) not in (expected, (*expected[:-1], 1)):
        raise ValueError(f"damaged: the scales of {name} do not fit")
    return Packed(numbers, scales, torch.float32)


def key_similarity(a: Tensor | Packed, b: Tensor | Packed, add_up: AddUp | None = None) -> Tensor:
    """Cosine of raw keys [layers, B, P, N, E] per token over the full width, averaged over tokens and layers.

    It is computed on the device of `a`. A mean over tokens before the cosine would not change when the camera pans.
    `add_up` is given if other processes have the other heads.
    """
    at_once = _layers_at_once(a)
    pairs = ((a[first : first + at_once], b[first : first + at_once]) for first in range(0, len(a), at_once))
    wide = ((unpacked(x).flatten(-2).float(), unpacked(y.to(x.device)).flatten(-2).float()) for x, y in pairs)
    if add_up is None:
        return torch.cat([F.cosine_similarity(x, y, dim=-1).flatten(1) for x, y in wide]).mean()
    sums = [torch.stack([(x * y).sum(-1), x.square().sum(-1), y.square().sum(-1)]) for x, y in wide]
    product, square_a, square_b = add_up(torch.cat(sums, dim=1))
    return (product / (square_a * square_b).sqrt().clamp(min=1e-8)).mean()


def _layers_at_once(tensor: Tensor | Packed) -> int:
    """How many layers of keys [layers, B, P, N, E] have SIMILARITY_ELEMENTS at most; one or more."""
    return max(1, SIMILARITY_ELEMENTS // math.prod(tensor.shape[1:]))
