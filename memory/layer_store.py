"""The memory of policy `released`: each layer keeps slots of its own (docs/method.md, Released memory).

Every pass of the network updates the slots, passes over noise included. A chunk's first frame is promoted to slow with
the keys of the first pass whose mean key differs enough from that of the pass before.

Shapes: B batch (one video), T latent frames of a chunk, P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MemoryConfig
from .policy import Decision, Slots
from .recall import Choose
from .stores import Activations, FrameKV, KVStore
from .view import KVBuffer, Rotate, rotated_bytes

FROM_NOISE = "policy released keeps keys of passes over noise, which cannot be computed from the latents"
NO_CHANGE = "change: {} is not supported by policy released; use keep"
UNSUPPORTED = {name: NO_CHANGE.format(name) for name in ("recache", "flush", "cut", "cut_new_sink")} | {
    "compact": f"compact: {FROM_NOISE}; use the exact form",
    "recommit": f"recommit: {FROM_NOISE}; generate the chunks again",
    "references": "references: policy released keeps keys of noisy passes, a reference has none; use another policy",
    "several processes": "policy: released compares whole keys in every layer; use one process, or another policy",
    "eight bits": "kv_dtype: with policy released slots change in every pass; use auto, or another policy",
    "attention report": "attention: with policy released every layer attends to other frames; leave the report out",
}


@dataclass(frozen=True, kw_only=True)
class LayerSlots:
    """The slots of one layer. A value: `take` returns the slots after one more pass."""

    frames: tuple[int, ...] = ()
    """Absolute latent frame of every filled slot: sink, slow, fast with the newest chunk last. Until all slots are
    full, slow entries overwrite the oldest frames after the sink."""
    entries: tuple[FrameKV, ...] = ()
    """Raw keys and values of every filled slot, [B, P, N, E]."""
    num_slow: int = 0
    descriptor: Tensor = field(default_factory=lambda: torch.empty(0))
    """Mean raw key of the last pass, [B, N * E], float32; empty before the first pass."""

    def take(self, config: MemoryConfig, first: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> "LayerSlots":
        """The slots after a pass over the chunk that begins at latent frame `first`."""
        descriptor = k_BTPNE.flatten(1, 2).mean(dim=1).flatten(1).float()
        chunk = [(first + t, FrameKV(k_BTPNE[:, t], v_BTPNE[:, t])) for t in range(k_BTPNE.shape[1])]
        slots, num_slow = list(zip(self.frames, self.entries)), self.num_slow
        newest_slow = self.frames[config.sink + num_slow - 1] if num_slow else None
        if newest_slow != first and self._is_new(config, first, descriptor):
            # Cloned: a slice would keep the tensor of the whole chunk alive.
            promoted = first, FrameKV(k_BTPNE[:, 0].clone(), v_BTPNE[:, 0].clone())
            if num_slow < config.slow:
                slots[config.sink + num_slow] = promoted
                num_slow += 1
            else:
                del slots[config.sink]
                slots.insert(config.sink + config.slow - 1, promoted)
        if self.frames[-len(chunk) :] == tuple(frame for frame, _ in chunk):  # a later pass over the same chunk
            del slots[-len(chunk) :]
        elif len(slots) == config.num_slots:
            oldest_fast = config.sink + config.slow
            del slots[oldest_fast : oldest_fast + len(chunk)]
        frames, entries = zip(*slots, *chunk)
        return LayerSlots(frames=frames, entries=entries, num_slow=num_slow, descriptor=descriptor)

    def _is_new(self, config: MemoryConfig, first: int, descriptor: Tensor) -> bool:
        if not config.slow or first < config.sink + config.chunk or not self.frames:
            return False
        similarity = F.cosine_similarity(descriptor, self.descriptor.to(descriptor.device), dim=-1).mean()
        return bool(similarity < config.slow_similarity_threshold)


@dataclass
class LayerView:
    """The slots of all layers during the passes over one chunk. Every pass replaces them, layer by layer."""

    layers: dict[int, LayerSlots]
    config: MemoryConfig
    first_frame: int
    buffer: KVBuffer | None = None
    """The layers are laid out here one after the other, in every pass: their slots change in every pass."""

    def positions(self, num_frames: int) -> range:
        """Temporal positions of all slots. A chunk has those of the last filled slots."""
        return range(self.config.num_slots)

    def buffer_like(self, keys_BPNE: Tensor) -> KVBuffer:
        """Room for all slots of a layer, of which each has keys like these."""
        like = keys_BPNE.shape, keys_BPNE.dtype, keys_BPNE.device
        self.buffer = self.buffer or KVBuffer.empty(self.config.num_slots, *like)
        return self.buffer

    def take(self, layer: int, k_BTPNE: Tensor, v_BTPNE: Tensor) -> LayerSlots:
        """Update the slots of one layer with raw keys and values of a pass."""
        slots = (self.layers.get(layer) or LayerSlots()).take(self.config, self.first_frame, k_BTPNE, v_BTPNE)
        self.layers[layer] = slots
        return slots


@dataclass(frozen=True, kw_only=True)
class LayerStore(KVStore):
    """Slots per layer. `slots` are the frames that any layer remembers."""

    unsupported = UNSUPPORTED
    layers: tuple[LayerSlots, ...] = ()
    """Empty before the first chunk."""

    def append(
        self, config: MemoryConfig, frames: range, new_kv: Sequence[LayerSlots], choose: Choose, add_up: None = None
    ) -> tuple["LayerStore", tuple[Decision, ...]]:
        """`new_kv` are the layers' slots after the pass at sigma 0."""
        sink = config.sink
        slow = {frame for layer in new_kv for frame in layer.frames[sink : sink + layer.num_slow]}
        fast = {frame for layer in new_kv for frame in layer.frames[sink + layer.num_slow :]} - slow
        slots = Slots(new_kv[0].frames[:sink], tuple(sorted(slow)), tuple(sorted(fast)), (None,) * len(fast))
        return LayerStore(slots=slots, layers=tuple(new_kv)), (Decision(frames[0], frames[0] in slow, None),)

    def view(
        self, config: MemoryConfig, next_frame: int, rotate: Rotate, device: torch.device, kv_placement: str
    ) -> LayerView:
        """Keys are rotated by the pass: their slots change in every pass."""
        return LayerView(dict(enumerate(self.layers)), config, next_frame)

    def frame_kvs(self) -> Iterator[tuple[int, FrameKV]]:
        for layer in self.layers:
            yield from zip(layer.frames, layer.entries)

    def map(self, change: Callable[[FrameKV], FrameKV]) -> "LayerStore":
        layers = (dataclasses.replace(layer, entries=tuple(map(change, layer.entries))) for layer in self.layers)
        return dataclasses.replace(self, layers=tuple(layers))

    def tensors(self) -> list[Tensor]:
        return [
            tensor
            for layer in self.layers
            for tensor in (*(each for kv in layer.entries for each in kv.tensors()), layer.descriptor)
        ]

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        tensors = {}
        for number, layer in enumerate(self.layers):
            for part in ("keys", "values"):
                tensors[f"{part}.{number}"] = torch.stack([getattr(entry, part) for entry in layer.entries]).cpu()
            tensors[f"descriptor.{number}"] = layer.descriptor.cpu()
        return {"layers": [[layer.frames, layer.num_slow] for layer in self.layers]}, tensors

    @classmethod
    def from_state(cls, config: MemoryConfig, slots: Slots, header: dict, tensors: dict[str, Tensor]) -> "LayerStore":
        num_filled = min(config.num_slots, sum(header["chunks"]))
        if bool(header["layers"]) != bool(num_filled):
            raise ValueError("damaged: layers has an impossible value")
        layers = []
        for number, (frames, num_slow) in enumerate(header["layers"]):
            keys, values, descriptor = (tensors.pop(f"{part}.{number}") for part in ("keys", "values", "descriptor"))
            most_slow = min(config.slow, max(0, num_filled - config.sink - config.chunk))
            if len(frames) != num_filled or num_slow > most_slow:
                raise ValueError("damaged: layers has an impossible value")
            same_length = len(frames) == len(keys) == len(values)
            if not same_length or keys.ndim != 5 or descriptor.shape != (keys.shape[1], keys[0, 0, 0].numel()):
                raise ValueError(f"damaged: the tensors of layer {number} do not fit its header")
            entries = tuple(FrameKV(k.contiguous(), v.contiguous()) for k, v in zip(keys, values))
            layers.append(LayerSlots(frames=tuple(frames), entries=entries, num_slow=num_slow, descriptor=descriptor))
        return cls(slots=slots, layers=tuple(layers))

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
        # The chunk and a promoted frame are new; the memory before the chunk stays until its end.
        frames = config.chunk + 1 + (config.num_slots if kv_placement != "from RAM" else 0)
        buffer = 2 * elements * config.num_slots * itemsize
        rotated = rotated_bytes(config.num_slots, elements, itemsize)
        in_pass = max(rotated + activations.attending, activations.most)
        return 2 * num_layers * elements * itemsize * frames + buffer + in_pass

    @property
    def key_shapes(self) -> set[tuple[int, ...]]:
        return {(len(self.layers), *shape) for shape in super().key_shapes}
