"""Batches of teacher forcing: clips with what each chunk remembers, drawn on the fly or from an encoded set.

Shapes: B batch, C latent channels, T latent frames, H W latent rows and columns, G texts per clip, L text tokens,
M remembered frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...memory.config import MemoryConfig
from ...model.codecs.demo_vae import DemoCodec
from ..config import NetworkConfig
from .clips import DemoClips, ShownBy, columns_shown_by, open_clips, random_clip, to_latents, to_text
from .layouts import Views, memory_layout
from .shards import EncodedSet


@dataclass(frozen=True)
class Batch:
    """The clips of one training step."""

    latents: Tensor
    """[B, C, T, H, W]"""
    text: Tensor
    """[B, G, L, 4096]: one text per chunk, or one per clip."""
    slots: Tensor
    """[B, chunks, M]: remembered frames by position, then -1."""
    shown_by: Tensor
    """[B, T, columns]: `ShownBy` of each column. A frame has VIEW_COLUMNS, or one if nothing is known of them."""
    memory: MemoryConfig = MemoryConfig()

    @property
    def chunk(self) -> int:
        """Latent frames of a chunk."""
        return self.latents.shape[2] // self.slots.shape[1]


def make_batch(
    codec: DemoCodec,
    config: MemoryConfig,
    *,
    seed: tuple[int, ...],
    size: int,
    num_chunks: int,
    text_dropout: float = 0.0,
    pacing: float = 0.0,
    long_trips: float = 0.0,
) -> Batch:
    """Clips of the demo world, drawn on the fly: a function of the seed, so that a resumed run gets the same data."""
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng, num_chunks, config.chunk, pacing, long_trips) for _ in range(size)]
    slots = _slots(rng, [clip.views for clip in clips], config)
    dropped = [rng.random() < text_dropout for _ in clips]
    captions = ["" if drop else text for clip, drop in zip(clips, dropped) for text in clip.captions]
    num_fast = config.fast - config.chunk
    shown_by = [columns_shown_by(clip, of_clip.tolist(), num_fast) for clip, of_clip in zip(clips, slots)]
    text = to_text(captions).unflatten(0, (size, num_chunks))
    return Batch(to_latents(codec, clips), text, slots, torch.from_numpy(np.stack(shown_by)), config)


def encoded_batch(
    clips: EncodedSet,
    config: MemoryConfig,
    *,
    seed: tuple[int, ...],
    numbers: range,
    num_chunks: int,
    text_dropout: float = 0.0,
) -> Batch:
    """The beginnings of clips of an encoded set, by sample number; layouts and text dropout are drawn from the seed."""
    rng = np.random.default_rng(seed)
    samples = [clips.sample(number) for number in numbers]
    latents = torch.cat([latents for latents, _ in samples])[:, :, : num_chunks * config.chunk]
    slots = _slots(rng, [Views.of_latents(latents_CTHW) for latents_CTHW in latents], config)
    texts = [clips.empty[0] if rng.random() < text_dropout else text[0] for _, text in samples]
    shown_by = torch.full((len(latents), latents.shape[2], 1), ShownBy.UNKNOWN)
    # Rows of zeros are what Wan attends to after the last token of a prompt.
    return Batch(latents, pad_sequence(texts, batch_first=True)[:, None], slots, shown_by, config)


def _slots(rng: np.random.Generator, views: Sequence[Views], config: MemoryConfig) -> Tensor:
    """`Batch.slots` of clips, no wider than the fullest memory."""
    layouts = [memory_layout(rng, of_clip, config) for of_clip in views]
    slots = torch.full((len(layouts), len(layouts[0]), config.capacity), -1)
    for b, layout in enumerate(layouts):
        for c, frames in enumerate(layout):
            slots[b, c, : len(frames)] = torch.tensor(frames, dtype=slots.dtype)
    return slots[:, :, : max(1, int((slots >= 0).sum(-1).max()))]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run."""

    clips: DemoClips | EncodedSet
    memory: MemoryConfig
    seed: int
    num_chunks: int
    text_dropout: float
    pacing: float
    long_trips: float

    def validation(self, size: int) -> Batch:
        """Long clips of their own seed; of an encoded set, clips that the run trains on too."""
        return self._make(0, 0, size, self.num_chunks, 0.0, long_trips=self.long_trips)

    def long(self, step: int, size: int) -> Batch:
        """The long clips of a step."""
        return self._make(1, step, size, self.num_chunks, self.text_dropout, self.pacing, self.long_trips)

    def openings(self, step: int, size: int) -> Batch:
        """The clips of one chunk of a step."""
        return self._make(2, step, size, 1, self.text_dropout)

    def _make(
        self, kind: int, step: int, size: int, num_chunks: int, dropout: float, pacing: float = 0, long_trips: float = 0
    ) -> Batch:
        seed = (self.seed, kind, step)
        if isinstance(self.clips, EncodedSet):
            numbers = range(step * size, (step + 1) * size)
            return encoded_batch(
                self.clips, self.memory, seed=seed, numbers=numbers, num_chunks=num_chunks, text_dropout=dropout
            )
        return make_batch(
            self.clips.codec, self.memory, seed=seed, size=size, num_chunks=num_chunks, text_dropout=dropout,
            pacing=pacing, long_trips=long_trips,
        )  # fmt: skip


def open_batches(
    config: NetworkConfig, num_chunks: int, text_dropout: float, pacing: float, long_trips: float
) -> Batches:
    """Batches of clips of `num_chunks` chunks. Raises ValueError for an encoded set that does not fit (open_clips)."""
    return Batches(
        clips=open_clips(config, num_chunks), memory=config.memory, seed=config.data_seed, num_chunks=num_chunks,
        text_dropout=text_dropout, pacing=pacing, long_trips=long_trips,
    )  # fmt: skip
