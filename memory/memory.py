"""Memory: an immutable value. The video so far as clean latents, and a store of keys and values of remembered frames.

Shapes: B batch (one video), C latent channels, T latent frames, H W latent rows and columns,
P tokens per latent frame, N heads, E head dim, L text tokens.
"""

import dataclasses
import functools
import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import MemoryConfig
from .fields import quoted
from .layer_store import LayerStore
from .policy import Decision, Slots
from .recall import MAX_READS, Film, Recall
from .references import Reference, reference_frames
from .stores import AddUp, FrameKV, FrameStore, KVStore
from .view import Rotate

CHANGES = ("keep", "recache", "flush", "cut", "cut_new_sink")
"""What happens to the remembered frames when a new prompt begins (docs/method.md, Prompt changes).

`keep`: nothing; the prompt acts through cross-attention alone. `recache`: keys and values are computed again under the
new prompt. `flush`: sink and the last chunk stay. `cut`: a new scene; the sink stays, and the first chunk has the
last positions of the window. `cut_new_sink`: a new scene; no frame stays, and the scene's first frames become the sink.
`recache` and `flush` act only if the prompt differs from the one before. References always stay.
"""

FORGETTING = ("flush", "cut", "cut_new_sink")
"""Changes that forget frames."""

OPERATIONS = (*CHANGES, "compact", "recommit", "attention report", "references", "several processes", "eight bits")
"""What a store may not support. `compact`: keys and values are dropped and computed again from the latents. `recommit`:
chunks of an interrupted run are committed from their latents. `attention report`: model/attention_mass.py.
`several processes`: each has a part of the heads (model/sequence.py). `eight bits`: packed.KV_DTYPES but auto."""


@dataclass(frozen=True)
class Segment:
    """A part of the video generated under one prompt."""

    first_frame: int
    prompt: str
    seed: int
    change: str = "keep"
    """One of CHANGES, done when the segment began."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A video so far and what is remembered of it. Operations return a new memory that shares storage."""

    config: MemoryConfig
    latent_size: tuple[int, int, int]
    """C, H, W of one latent frame."""
    store: KVStore
    """Keys and values of the remembered frames."""
    latent_chunks: tuple[Tensor, ...] = ()
    """Clean latents of every chunk, [1, C, T, H, W], normalised, on the CPU."""
    decisions: tuple[Decision, ...] = ()
    recalls: tuple[Recall, ...] = ()
    """What policy recall chose for every chunk."""
    film: Film = dataclasses.field(default_factory=Film, repr=False, compare=False)
    """The latent chunks described, for policy recall. A file does not have it: it is found again when it is needed."""
    segments: tuple[Segment, ...] = ()
    student: str = ""
    """Fingerprint of the network that computed the keys; empty while there are none."""
    text: Tensor | None = None
    """Embedding of the last prompt, [1, L, 4096], without padding rows."""
    texts: tuple[Tensor | None, ...] = ()
    """The embedding of every segment's prompt, or of the prompt of a later recache; for policy recall."""
    start_latents: Tensor | None = None
    """Clean latents that the next chunks begin with, [1, C, T, H, W], on the CPU: a start image, a clip to continue."""
    scene_begins: bool = False
    """Whether the next chunk is the first of a new scene."""
    references: tuple[Reference, ...] = ()
    """Remembered latent frames that are not in the film. They are the first ones of the sink."""

    @property
    def slots(self) -> Slots:
        """The remembered latent frames."""
        return self.store.slots

    @functools.cached_property
    def num_frames(self) -> int:
        """Latent frames of the video so far; also the absolute index of the next one."""
        return self._ends[-1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        """0, and the absolute index of the frame after every chunk."""
        return list(itertools.accumulate((chunk.shape[2] for chunk in self.latent_chunks), initial=0))

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """[1, C, T, H, W] of the next chunk."""
        channels, height, width = self.latent_size
        return 1, channels, self.config.chunk, height, width

    @property
    def num_start_frames(self) -> int:
        """Frames of the next chunk that come from the start latents."""
        return 0 if self.start_latents is None else min(self.start_latents.shape[2], self.config.chunk)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values. The latents are not counted."""
        return sum(tensor.nbytes for tensor in self.store.tensors())

    def num_bytes_on(self, device: torch.device) -> int:
        """Bytes of keys and values that are on a type of device."""
        return sum(tensor.nbytes for tensor in self.store.tensors() if tensor.device.type == device.type)

    def tensors(self) -> list[Tensor]:
        """All tensors of the memory."""
        optional = (self.text, *self.texts[:-1], self.start_latents, *(each.text for each in self.references))
        pictures = (each.latents for each in self.references)
        given = (tensor for tensor in optional if tensor is not None)
        return [*self.latent_chunks, *self.store.tensors(), *pictures, *given]

    @property
    def is_compact(self) -> bool:
        """Whether keys and values of the film must be computed from the latents first (CausalSampler.restore)."""
        return bool(self.slots.film) and not self.store.tensors()

    def compact(self) -> "Memory":
        """The memory without keys and values. Raises ValueError if the store does not support it."""
        self.check_supports("compact")
        return dataclasses.replace(self, store=self.store.compact())

    def supports(self, operation: str) -> bool:
        """Whether the store supports one of OPERATIONS."""
        return operation not in self.store.unsupported

    def check_supports(self, operation: str) -> None:
        """Raises ValueError if the store does not support one of OPERATIONS."""
        if not self.supports(operation):
            raise ValueError(self.store.unsupported[operation])

    def check_change(self, change: str) -> None:
        """Raises ValueError for an unknown change, and for one that the store does not support."""
        if change not in CHANGES:
            raise ValueError(f"change: {quoted(change)} is not one of {', '.join(CHANGES)}")
        self.check_supports(change)

    def begin(self, prompt: str, seed: int, text: Tensor | None = None, change: str = "keep") -> "Memory":
        """Begin a segment, and forget the frames that `change` forgets (CHANGES)."""
        self.check_change(change)
        segment = Segment(self.num_frames, prompt, seed, change)
        texts = ()
        if self.config.recalls:
            texts = (*((text,) * len(self.texts) if change == "recache" else self.texts), text)
        begun = dataclasses.replace(
            self,
            segments=(*self.segments, segment),
            text=text,
            texts=texts,
            references=tuple(
                each if each.text is not None else dataclasses.replace(each, text=text) for each in self.references
            ),
        )
        slots = self.slots
        if change == "flush":
            return begun.restrict_to(slots.sink + slots.fast[-self.config.chunk :])
        if change in ("cut", "cut_new_sink") and self.latent_chunks:
            kept = slots.sink if change == "cut" else slots.references
            return dataclasses.replace(begun.restrict_to(kept), scene_begins=True)
        return begun

    def restrict_to(self, frames: Collection[int]) -> "Memory":
        """The memory with only these remembered frames."""
        return dataclasses.replace(self, store=self.store.restrict_to(frames))

    def with_start_latents(self, latents_BCTHW: Tensor) -> "Memory":
        """Begin the video with clean latents: whole chunks become its first chunks, the rest begins the chunk after.

        Raises ValueError if the video has begun, and for latents that do not fit or are not finite.
        """
        if self.latent_chunks:
            raise ValueError(f"memory: it has {self.num_frames} frames; a start image or clip needs an empty memory")
        if self.start_latents is not None:
            raise ValueError("memory: it has a start image or clip already; use one")
        self._check_fits(latents_BCTHW)
        if not all_finite([latents_BCTHW]):
            raise ValueError("latents: NaN or infinity in the start image or clip; check it, or run the VAE in fp32")
        return dataclasses.replace(self, start_latents=latents_BCTHW.detach().to("cpu", torch.float32, copy=True))

    def with_references(self, references: Sequence[Reference]) -> "Memory":
        """Pin latent frames that are not in the film. They take the first slots of the sink, after earlier references.

        Their keys and values are computed when the first segment begins (CausalSampler.prepare).

        Raises ValueError if the video has begun, if the sink is too small, if the policy does not support it, and for
        latents or texts that do not fit or are not finite.
        """
        self.check_supports("references")
        if self.latent_chunks:
            raise ValueError(f"references: the memory has {self.num_frames} frames; references need an empty memory")
        on_cpu = lambda latents: latents.detach().to("cpu", torch.float32, copy=True).contiguous()
        references = [dataclasses.replace(each, latents=on_cpu(each.latents)) for each in references]
        pinned = (*self.references, *references)
        if len(pinned) > self.config.sink:
            sizes = f"{len(pinned)} frames, the sink has {self.config.sink}"
            raise ValueError(f"references: {sizes}; give fewer, or use a memory with a larger sink")
        for number, each in enumerate(references, len(self.references) + 1):
            self._check_fits(each.latents)
            if (count := each.latents.shape[2]) != 1:
                raise ValueError(f"references: number {number} has {count} latent frames; give one each")
            if not all_finite([each.latents, *([] if each.text is None else [each.text])]):
                raise ValueError(f"references: NaN or infinity in number {number}; check it, or encode it in fp32")
        slots = dataclasses.replace(self.slots, sink=reference_frames(pinned))
        store = dataclasses.replace(self.store.compact(), slots=slots)
        # The film is a new scene after the references: next to them, its first chunk would repeat the last one.
        return dataclasses.replace(self, references=pinned, store=store, scene_begins=bool(pinned))

    def _check_fits(self, latents_BCTHW: Tensor) -> None:
        shape = tuple(latents_BCTHW.shape)
        if len(shape) != 5 or not shape[2] or (shape[0], shape[1], *shape[3:]) != (1, *self.latent_size):
            raise ValueError(f"latents: shape {shape} does not fit [1, C, T, H, W] with C, H, W = {self.latent_size}")

    def append(self, latents_BCTHW: Tensor, new_kv: Sequence[Any], add_up: AddUp | None = None) -> "Memory":
        """Commit a chunk: clean latents, and what the pass over them left for the store (KVStore.append)."""
        self._check_fits(latents_BCTHW)
        if add_up:
            self.check_supports("several processes")
        num_new, start = latents_BCTHW.shape[2], self.start_latents
        frames = range(self.num_frames, self.num_frames + num_new)
        chunks = (*self.latent_chunks, latents_BCTHW.detach().to("cpu", copy=True))
        film = self.film
        for chunk in chunks[len(film.starts) :] if self.config.recalls and self.config.slow else ():
            film = film.extended(chunk)
        choose = functools.partial(self._choose, film)
        store, decisions = self.store.append(self.config, frames, new_kv, choose, add_up)
        return dataclasses.replace(
            self,
            store=store,
            decisions=self.decisions + decisions,
            latent_chunks=chunks,
            film=film,
            recalls=(*self.recalls, self._recalled(frames.stop, store)) if self.config.recalls else (),
            start_latents=start[:, :, num_new:] if start is not None and start.shape[2] > num_new else None,
            scene_begins=False,
        )

    @property
    def first_recalled(self) -> int:
        """The first latent frame that policy recall can choose. Frames forgotten at a flush or cut stay forgotten."""
        return max((segment.first_frame for segment in self.segments if segment.change in FORGETTING), default=0)

    def chunks(self) -> list[range]:
        """The latent frames of every chunk."""
        return [range(first, end) for first, end in itertools.pairwise(self._ends)]

    def _choose(self, film: Film, held: tuple[int, ...], remembered: tuple[int, ...]) -> tuple[int, ...]:
        """What policy recall chooses after a commit; `film` includes the new chunk."""
        # A read for every chunk of the film, saved up while nothing has to be read.
        reads = max(0, min(MAX_READS, len(film.starts) - sum(recall.num_reads for recall in self.recalls)))
        of_film = [frame for frame in remembered if frame >= 0]
        return film.choose(self.config.slow, held, of_film, range(self.first_recalled, self.num_frames), reads)

    @property
    def unread(self) -> tuple[int, ...]:
        """Remembered frames whose keys and values must be computed from their latents (CausalSampler.read)."""
        return self.store.unread

    def run_of(self, frame: int) -> range:
        """The frames whose keys and values are computed together with those of `frame`: its chunk, or a reference."""
        if frame < 0:
            return range(frame, frame + 1)
        chunk = bisect_right(self._ends, frame)
        return range(self._ends[chunk - 1], self._ends[chunk])

    def _recalled(self, frame: int, store: KVStore) -> Recall:
        return Recall(frame, store.slots.slow, len({self.run_of(unread) for unread in store.unread}))

    def text_of(self, frame: int) -> Tensor | None:
        """The embedding of the prompt that keys and values of a latent frame are computed under."""
        if frame < 0:
            return self.references[frame].text
        number = sum(segment.first_frame <= frame for segment in self.segments) - 1
        return self.texts[number] if 0 <= number < len(self.texts) else self.text

    def with_slow(self, frames: Collection[int]) -> "Memory":
        """The memory with other frames of the film as slow memory; some of them may be unread."""
        slots = dataclasses.replace(self.slots, slow=tuple(sorted(frames)))
        kvs = {frame: kv for frame, kv in self.store.frame_kvs() if frame in slots.all}
        return dataclasses.replace(self, store=dataclasses.replace(self.store, slots=slots, frames=kvs))

    def write(self, frames: Sequence[int], new_kv: Sequence[FrameKV]) -> "Memory":
        """The memory with new keys and values of remembered frames."""
        return dataclasses.replace(self, store=self.store.write(frames, new_kv))

    def packed(self, kv_dtype: str) -> "Memory":
        """The memory with sink and slow frames in one of packed.KV_DTYPES; those that are packed stay as they are."""
        return self if kv_dtype == "auto" else dataclasses.replace(self, store=self.store.packed(kv_dtype))

    def view(self, rotate: Rotate, device: torch.device, kv_placement: str) -> Any:
        """What the next chunk attends to on a device (KVStore.view); `rotate` rotates raw keys to their ranks."""
        view = self.store.view(self.config, self.num_frames, rotate, device, kv_placement)
        if not self.scene_begins:
            return view
        # The first chunk of a scene has the last positions of the window (docs/method.md, Prompt changes).
        return dataclasses.replace(view, gap=self.config.window - self.config.chunk - view.num_frames)

    def latents_of(self, frames: Sequence[int]) -> Tensor:
        """Clean latents [1, C, T, H, W] of absolute frames, for example `slots.slow`."""
        if not frames:
            return torch.zeros(1, self.latent_size[0], 0, *self.latent_size[1:])

        def of_frame(frame: int) -> Tensor:
            if frame < 0:
                return self.references[frame].latents
            chunk = bisect_right(self._ends, frame) - 1
            return self.latent_chunks[chunk][:, :, frame - self._ends[chunk]].unsqueeze(2)

        return torch.cat([of_frame(frame) for frame in frames], dim=2)

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        before: "Memory | None" = None,
        pinned: bool = False,
    ) -> "Memory":
        """The memory with keys and values on a device, `pinned` in RAM for copies to CUDA. The latents stay on the CPU.

        Keys and values that the memory `before` has there already are shared and not copied.
        """
        store = self.store.to(torch.device(device), dtype, before.store if before else None, pinned)
        return dataclasses.replace(self, store=store)


def store_class(config: MemoryConfig) -> type[KVStore]:
    """The kind of store that a policy needs."""
    return LayerStore if config.per_layer else FrameStore


def empty_memory(config: MemoryConfig, latent_size: tuple[int, int, int]) -> Memory:
    """The memory of a video that has not begun; C, H, W of a latent frame."""
    return Memory(config=config, latent_size=latent_size, store=store_class(config)())


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value of any tensor is NaN or infinite. The host waits for the device once."""
    # Zero times such a value is NaN, and a sum of zeros cannot overflow.
    wide = (tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in tensors)
    return not bool(torch.stack([(tensor * 0).sum().float() for tensor in wide]).sum().isnan())
