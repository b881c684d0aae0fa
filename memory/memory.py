"""Memory: an immutable value. The remembered frames with their keys and values, and the film so far.

Shapes: B batch (one video), C latent channels, T latent frames, H W latent rows and columns,
P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CLEAN_POLICIES, MemoryConfig
from .policy import Decision, Slots, advance
from .view import MemoryView

SIMILARITY_ELEMENTS = 2**24
"""Keys compared at once, so that a 1.3B model's float32 copies stay small."""


@dataclass(frozen=True)
class FrameKV:
    """One latent frame: raw keys (before rotation) and values per layer, [layers, B, P, N, E]."""

    keys: Tensor
    values: Tensor
    written: object = field(default_factory=object, compare=False, repr=False)
    """Which pass wrote them: copies on other devices share it, keys that were written anew do not."""

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype | None, there: "FrameKV | None") -> "FrameKV":
        """The same on a device; `there` is what may be it already, then it is shared and not copied again."""
        device, dtype = torch.device(device), dtype or self.keys.dtype
        same = there and there.written is self.written
        if same and there.keys.device == device and there.keys.dtype == dtype:
            return there
        return FrameKV(self.keys.to(device, dtype), self.values.to(device, dtype), self.written)


CHANGES = ("keep", "recache", "flush", "cut", "cut_new_sink")
"""How a new prompt takes over from the one before.

`keep`: through cross-attention alone. `recache`: what is remembered is written anew under the new prompt. `flush`:
sink and last chunk stay, all else is forgotten. `cut`: a new scene; only the sink stays, and the first chunk stands as
far from it as the window allows. `cut_new_sink`: nothing stays, the new scene's first frames become the sink.
`recache` and `flush` act only where the prompt differs from the one before. So a segment may be split anywhere, if a
cut's second part says `keep`.
"""


@dataclass(frozen=True)
class Segment:
    """A run of the film made under one prompt."""

    first_frame: int
    prompt: str
    seed: int
    change: str = "keep"
    """What was done to the memory when it began: one of CHANGES."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a video knows of itself. Never changes after it is made; `append` returns a new one that shares storage."""

    policies: ClassVar[tuple[str, ...]] = CLEAN_POLICIES
    """Those that this kind of memory follows."""
    can_be_compact: ClassVar[bool] = True
    """Whether its keys and values can be made anew from the film; then chunks made before may be committed again."""
    config: MemoryConfig
    latent_size: tuple[int, int, int]
    """C, H, W of one latent frame."""
    slots: Slots = Slots()
    remembered: dict[int, FrameKV] = field(default_factory=dict)
    """By absolute latent-frame index; exactly the frames of `slots`. Not to be changed."""
    latent_chunks: tuple[Tensor, ...] = ()
    """Clean latents of every chunk so far, [B, C, T, H, W], normalised, on the CPU."""
    decisions: tuple[Decision, ...] = ()
    segments: tuple[Segment, ...] = ()
    student: str = ""
    """Fingerprint of the network whose keys these are; empty while there are none."""
    text: Tensor | None = None
    """The prompt the film ends under, [1, L, 4096], without padding rows."""
    start_latents: Tensor | None = None
    """Clean latents that the film must go on with, [1, C, T, H, W], on the CPU: a start image, a clip to continue."""
    scene_begins: bool = False
    """The next chunk is the first of a new scene."""

    def __post_init__(self):
        assert self.config.policy in self.policies, f"{type(self).__name__} cannot follow {self.config.policy}"

    @property
    def num_frames(self) -> int:
        """Latent frames in the film; also the absolute index of the next one."""
        return sum(chunk.shape[2] for chunk in self.latent_chunks)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """[1, C, T, H, W] of a chunk that is made for it."""
        channels, height, width = self.latent_size
        return 1, channels, self.config.chunk, height, width

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values; the film is not counted."""
        return sum(frame.num_bytes for frame in self.remembered.values())

    @property
    def key_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of the frames' keys: [layers, B, P, N, E], one shape in a memory of one student."""
        return {tuple(held.keys.shape) for held in self.remembered.values()}

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        keys = [tensor for held in self.remembered.values() for tensor in (held.keys, held.values)]
        return [
            *self.latent_chunks,
            *keys,
            *(tensor for tensor in (self.text, self.start_latents) if tensor is not None),
        ]

    @property
    def num_start_frames(self) -> int:
        """Frames of the next chunk that are given."""
        return 0 if self.start_latents is None else min(self.start_latents.shape[2], self.config.chunk)

    @property
    def is_compact(self) -> bool:
        """Whether its keys and values are yet to be made from the film (CausalSampler.recache)."""
        return bool(self.slots.all) and not self.remembered

    def compact(self) -> "Memory":
        """The same without keys and values: a fraction of the size, and close to it once they are made anew."""
        return dataclasses.replace(self, remembered={})

    def check_change(self, change: str) -> None:
        """Raises ValueError for a change that there is not, or not for this kind of memory."""
        if change not in CHANGES:
            raise ValueError(f"change: {change!r} is not one of {', '.join(CHANGES)}")

    def begin(self, prompt: str, seed: int, text: Tensor | None = None, change: str = "keep") -> "Memory":
        """Note that a segment starts here, and forget what `change` forgets (CHANGES)."""
        self.check_change(change)
        segment = Segment(self.num_frames, prompt, seed, change)
        told = dataclasses.replace(self, segments=(*self.segments, segment), text=text)
        slots = self.slots
        if change == "flush":
            return told.restrict_to(slots.sink + slots.fast[-self.config.chunk :])
        if change in ("cut", "cut_new_sink") and self.latent_chunks:
            return dataclasses.replace(told.restrict_to(slots.sink if change == "cut" else ()), scene_begins=True)
        return told

    def restrict_to(self, frames: Collection[int]) -> "Memory":
        """Remembering no other than these latent frames."""
        sink, slow = (tuple(frame for frame in part if frame in frames) for part in (self.slots.sink, self.slots.slow))
        fast = [
            pair for pair in zip(self.slots.fast, self.slots.similarity_to_previous, strict=True) if pair[0] in frames
        ]
        slots = Slots(
            sink,
            slow,
            tuple(frame for frame, _ in fast),
            tuple(similarity_to_previous for _, similarity_to_previous in fast),
        )
        remembered = {frame: held for frame, held in self.remembered.items() if frame in frames}
        return dataclasses.replace(self, slots=slots, remembered=remembered)

    def with_start_latents(self, latents_BCTHW: Tensor) -> "Memory":
        """Have the film begin with clean latents: whole chunks are taken over, the rest is held in the chunk after.

        Raises ValueError where the film has begun, or the latents do not fit or are not finite.
        """
        if self.latent_chunks:
            raise ValueError(
                f"memory: its film has {self.num_frames} latent frames already; a start image or clip goes into an"
                " empty memory"
            )
        if self.start_latents is not None:
            raise ValueError("memory: it was given what its video begins with already; give it one start image or clip")
        self._check_fits(latents_BCTHW)
        if not all_finite([latents_BCTHW]):
            raise ValueError(
                "latents: NaN or infinity in those of the start image or clip; check the file, or run the VAE in fp32"
            )
        return dataclasses.replace(self, start_latents=latents_BCTHW.detach().to("cpu", torch.float32, copy=True))

    def _check_fits(self, latents_BCTHW: Tensor) -> None:
        shape = tuple(latents_BCTHW.shape)
        if len(shape) != 5 or not shape[2] or (shape[0], shape[1], *shape[3:]) != (1, *self.latent_size):
            raise ValueError(
                f"latents: shape {shape} does not fit a memory of one video, [1, C, T, H, W] with C, H, W ="
                f" {self.latent_size}"
            )

    def append(self, latents_BCTHW: Tensor, new_kv: Sequence[tuple[Tensor, Tensor]]) -> "Memory":
        """Commit a chunk: clean latents, and per layer the raw keys and values [B, T, P, N, E] of their pass.

        Keys are compared where those of the pass are.
        """
        self._check_fits(latents_BCTHW)
        first, num_new = self.num_frames, latents_BCTHW.shape[2]
        new_frames = range(first, first + num_new)
        held = self.remembered | _remember(new_frames, new_kv)

        def similarity(frame: int, others: Sequence[int]) -> list[float]:
            here = held[frame].keys.to(new_kv[0][0].device)
            scores = [key_similarity(here, held[other].keys) for other in others]
            return torch.stack(scores).tolist()

        slots, decisions = advance(self.slots, self.config, new_frames, similarity)
        grown = dataclasses.replace(
            self,
            slots=slots,
            remembered={frame: held[frame] for frame in slots.all},
            decisions=self.decisions + decisions,
            scene_begins=False,
        )
        return grown.with_latents(latents_BCTHW)

    def with_latents(self, latents_BCTHW: Tensor) -> "Memory":
        """The film a chunk longer, what was given for it taken off."""
        num_new = latents_BCTHW.shape[2]
        return dataclasses.replace(
            self,
            latent_chunks=(*self.latent_chunks, latents_BCTHW.detach().to("cpu", copy=True)),
            start_latents=self.start_latents[:, :, num_new:]
            if self.start_latents is not None and self.start_latents.shape[2] > num_new
            else None,
        )

    def write(self, frames: Sequence[int], new_kv: Sequence[tuple[Tensor, Tensor]]) -> "Memory":
        """Keys and values of frames anew, per layer [B, T, P, N, E]."""
        return dataclasses.replace(self, remembered=self.remembered | _remember(frames, new_kv))

    def view(self, rotate: Callable[[Tensor], Tensor], lazy: bool = False) -> MemoryView:
        """Keys and values for attention; `rotate` gives raw keys [B, M, P, N, E] their ranks."""
        frames = [self.remembered[frame] for frame in self.slots.all]
        return MemoryView.assemble(
            [frame.keys.unbind(0) for frame in frames], [frame.values.unbind(0) for frame in frames], rotate, lazy
        )

    def latents_of(self, frames: Sequence[int]) -> Tensor:
        """Clean latents [B, C, T, H, W] of absolute frames, for example `slots.slow`."""
        if not frames:
            return torch.zeros(1, self.latent_size[0], 0, *self.latent_size[1:])
        wanted, first, parts = set(frames), 0, {}
        for chunk in self.latent_chunks:
            for t in range(chunk.shape[2]):
                if first + t in wanted:
                    parts[first + t] = chunk[:, :, t : t + 1]
            first += chunk.shape[2]
        return torch.cat([parts[frame] for frame in frames], dim=2)

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, before: "Memory | None" = None
    ) -> "Memory":
        """The same memory with keys and values on a device; the film stays on the CPU.

        Frames that the memory `before` this one holds there already are shared with it, not copied again.
        """
        there = before.remembered if before else {}
        remembered = {frame: held.to(device, dtype, there.get(frame)) for frame, held in self.remembered.items()}
        return dataclasses.replace(self, remembered=remembered)


def _remember(frames: Sequence[int], new_kv: Sequence[tuple[Tensor, Tensor]]) -> dict[int, FrameKV]:
    return {
        frame: FrameKV(torch.stack([k[:, t] for k, _ in new_kv]), torch.stack([v[:, t] for _, v in new_kv]))
        for t, frame in enumerate(frames)
    }


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value of any tensor is NaN or infinite; the host waits for the device once."""
    # Zero times such a value is NaN, and a sum of zeros cannot overflow.
    return not bool(torch.stack([(tensor * 0).sum().float() for tensor in tensors]).sum().isnan())


def key_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of raw keys [layers, B, P, N, E] per token over the full width, then the mean over tokens and layers.

    It is taken where `a` is. A descriptor averaged over tokens first could not see the camera move (demo_world.md 1).
    """
    layers_at_once = max(1, SIMILARITY_ELEMENTS // a[0].numel())
    cosines = [
        F.cosine_similarity(x.flatten(-2).float(), y.to(x.device).flatten(-2).float(), dim=-1).flatten(1)
        for x, y in zip(a.split(layers_at_once), b.split(layers_at_once))
    ]
    return torch.cat(cosines).mean()
