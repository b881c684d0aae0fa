"""Memory: an immutable value. The remembered frames with their keys and values, and the film so far.

Shapes: B batch (one video), C latent channels, T latent frames, H W latent rows and columns,
P tokens per latent frame, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MemoryConfig
from .policy import Decision, Slots, advance
from .view import MemoryView

SIMILARITY_ELEMENTS = 2**24
"""Keys compared at once, so that a 1.3B model's float32 copies stay small."""


@dataclass(frozen=True)
class Remembered:
    """One latent frame: raw keys (before rotation) and values per layer, [layers, B, P, N, E]."""

    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Segment:
    """A run of the film made under one prompt."""

    first_frame: int
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a video knows of itself. Never changes after it is made; `append` returns a new one that shares storage."""

    config: MemoryConfig
    latent_size: tuple[int, int, int]
    """C, H, W of one latent frame."""
    slots: Slots = Slots()
    remembered: dict[int, Remembered] = field(default_factory=dict)
    """By absolute latent-frame index; exactly the frames of `slots`. Not to be changed."""
    film: tuple[Tensor, ...] = ()
    """Clean latents of every chunk so far, [B, C, T, H, W], normalised, on the CPU."""
    decisions: tuple[Decision, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def num_frames(self) -> int:
        """Latent frames in the film; also the absolute index of the next one."""
        return sum(chunk.shape[2] for chunk in self.film)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values; the film is not counted."""
        return sum(frame.num_bytes for frame in self.remembered.values())

    def begin(self, prompt: str, seed: int) -> "Memory":
        """Note that a segment starts here."""
        segment = Segment(self.num_frames, prompt, seed)
        return dataclasses.replace(self, segments=(*self.segments, segment))

    def append(self, latents_BCTHW: Tensor, kept: Sequence[tuple[Tensor, Tensor]]) -> "Memory":
        """Commit a chunk: clean latents, and per layer the raw keys and values [B, T, P, N, E] of their pass."""
        if tuple(latents_BCTHW.shape[i] for i in (1, 3, 4)) != self.latent_size or latents_BCTHW.shape[0] != 1:
            raise ValueError(
                f"latents: shape {tuple(latents_BCTHW.shape)} does not fit a memory of one video with"
                f" C, H, W = {self.latent_size}"
            )
        first = self.num_frames
        new_frames = range(first, first + latents_BCTHW.shape[2])
        held = dict(self.remembered)
        for t, frame in enumerate(new_frames):
            held[frame] = Remembered(torch.stack([k[:, t] for k, _ in kept]), torch.stack([v[:, t] for _, v in kept]))

        def similarity(frame: int, others: Sequence[int]) -> list[float]:
            scores = [key_similarity(held[frame].keys, held[other].keys) for other in others]
            return torch.stack(scores).tolist()

        slots, decisions = advance(self.slots, self.config, new_frames, similarity)
        return dataclasses.replace(
            self,
            slots=slots,
            remembered={frame: held[frame] for frame in slots.all},
            film=(*self.film, latents_BCTHW.detach().to("cpu", copy=True)),
            decisions=self.decisions + decisions,
        )

    def view(self, rotate: Callable[[Tensor], Tensor], lazy: bool = False) -> MemoryView:
        """Keys and values for attention; `rotate` gives raw keys [B, M, P, N, E] their ranks."""
        frames = [self.remembered[frame] for frame in self.slots.all]
        return MemoryView.assemble(
            [frame.keys.unbind(0) for frame in frames], [frame.values.unbind(0) for frame in frames], rotate, lazy
        )

    def latents(self, frames: Sequence[int]) -> Tensor:
        """Clean latents [B, C, T, H, W] of absolute frames, for example `slots.slow`."""
        if not frames:
            return torch.zeros(1, self.latent_size[0], 0, *self.latent_size[1:])
        wanted, first, parts = set(frames), 0, {}
        for chunk in self.film:
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
        device = torch.device(device)
        remembered = {}
        for frame, held in self.remembered.items():
            old = before.remembered.get(frame) if before else None
            if old and old.keys.device == device and old.keys.dtype == (dtype or held.keys.dtype):
                remembered[frame] = old
            else:
                remembered[frame] = Remembered(held.keys.to(device, dtype), held.values.to(device, dtype))
        return dataclasses.replace(self, remembered=remembered)


def key_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of raw keys [layers, B, P, N, E] per token over the full width, then the mean over tokens and layers.

    A descriptor averaged over tokens first could not see the camera move (demo_world.md 1).
    """
    layers_at_once = max(1, SIMILARITY_ELEMENTS // a[0].numel())
    cosines = [
        F.cosine_similarity(x.flatten(-2).float(), y.flatten(-2).float(), dim=-1).flatten(1)
        for x, y in zip(a.split(layers_at_once), b.split(layers_at_once))
    ]
    return torch.cat(cosines).mean()
