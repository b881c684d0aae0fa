"""Clips and captions by sample number: of the demo world, rendered on the fly, or of an encoded set.

Shapes: B batch, T latent frames, C latent channels, H W latent rows and columns, L text tokens.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...model.codecs.backbone import DEMO, backbone_of
from ...model.codecs.demo_text import TEXT_DIM, canonical_words, concept_embedding
from ...model.codecs.demo_vae import DemoCodec, load_demo_codec
from ..config import NetworkConfig
from ..world.camera import headings, render_latent_frames
from ..world.geometry import CHUNK, RING_COLUMNS, VIEW_COLUMNS
from ..world.prompts import Style, caption
from ..world.scene import Scene
from ..world.scripts import LONG_TRIP_CHUNKS, long_trip_script, pacing_script, random_script, random_styles
from .layouts import Views
from .shards import EncodedSet


@dataclass(frozen=True)
class Clip:
    """Ground truth of one clip: scene, styles and camera moves."""

    scene: Scene
    styles: tuple[Style, ...]
    """One per chunk."""
    moves: tuple[int, ...]
    """One per chunk."""
    chunk: int
    start: int = 0
    """Heading of the first frame, in columns."""

    @property
    def headings(self) -> np.ndarray:
        return headings(self.moves, self.chunk, self.start)

    @property
    def captions(self) -> list[str]:
        return [caption(style, move) for style, move in zip(self.styles, self.moves)]

    @property
    def views(self) -> Views:
        """How far apart its frames are."""
        styles = np.array([self.styles.index(self.styles[t // self.chunk]) for t in range(len(self.headings))])
        return Views.of_world(self.headings, styles)

    def art(self) -> np.ndarray:
        """Art pixels of every latent frame, uint8."""
        return render_latent_frames(self.scene, self.styles, self.moves, self.chunk, self.start)


class ShownBy(enum.IntEnum):
    """The remembered frames that show a column of a frame."""

    FAST = 0
    """A fast frame."""
    MEMORY = 1
    """Sink or slow frames only."""
    NOTHING = 2
    UNKNOWN = 3
    """Nobody knows: the clip is not of the demo world."""


def columns_shown_by(clip: Clip, slots: Sequence[Sequence[int]], num_fast: int, first_chunk: int = 0) -> np.ndarray:
    """`ShownBy` of each column of each frame of successive chunks, int [T, VIEW_COLUMNS].

    `slots` are the frames that each chunk remembers, from `first_chunk` on, -1 for none; the `num_fast` frames before a
    chunk are fast.
    """
    columns = clip.headings[:, None] + np.arange(VIEW_COLUMNS)
    shown_by = np.full(columns.shape, ShownBy.NOTHING)
    for c, frames_of_chunk in enumerate(slots, first_chunk):
        frames = slice(c * clip.chunk, (c + 1) * clip.chunk)
        remembered = np.array([frame for frame in frames_of_chunk if frame >= 0], dtype=int)
        fast = remembered[remembered >= c * clip.chunk - num_fast]
        shown_by[frames][np.isin(columns[frames], columns[remembered])] = ShownBy.MEMORY
        shown_by[frames][np.isin(columns[frames], columns[fast])] = ShownBy.FAST
    return shown_by[first_chunk * clip.chunk : (first_chunk + len(slots)) * clip.chunk]


def random_clip(rng: np.random.Generator, num_chunks: int, chunk: int, pacing: float, long_trips: float = 0.0) -> Clip:
    """A clip whose camera leaves places and returns.

    In a share `long_trips` of the clips that are long enough it goes straight out and back; in a share `pacing` of the
    others it moves back and forth over a few views.

    The first view is at a random place of the ring. Rotary positions are relative, so the columns of a fixed first view
    could not be told apart.
    """
    long = num_chunks >= LONG_TRIP_CHUNKS and long_trips and rng.random() < long_trips
    script = long_trip_script if long else None
    script = script or (pacing_script if rng.random() < pacing else random_script)
    return Clip(
        scene=Scene.sample(rng),
        styles=tuple(random_styles(rng, num_chunks)),
        moves=tuple(script(rng, num_chunks)),
        chunk=chunk,
        start=int(rng.integers(RING_COLUMNS)),
    )


def to_latents(codec: DemoCodec, clips: list[Clip]) -> Tensor:
    """Normalised latents [B, C, T, H, W]."""
    art = torch.from_numpy(np.stack([clip.art() for clip in clips])).float() / 127.5 - 1
    return codec.encode_art(art)


def to_text(captions: list[str]) -> Tensor:
    """Text embeddings of all captions, [len(captions), L, 4096], without the padding rows of the longest caption."""
    words = [sorted(set(canonical_words(caption))) for caption in captions]
    rows = torch.zeros(len(words), max(1, *map(len, words)), TEXT_DIM)
    for i, concepts in enumerate(words):
        for j, concept in enumerate(concepts):
            rows[i, j] = concept_embedding(concept)
    return rows


@dataclass(frozen=True, kw_only=True)
class DemoPrompts:
    """Captions of the demo world along random camera moves, by sample number."""

    seed: int
    pacing: float = 0.3
    """Share of camera moves that go back and forth."""
    long_trips: float = 0.0
    """Share of camera moves that go straight out by up to 30 columns and back."""

    def clip(self, number: int, num_chunks: int) -> Clip:
        """The camera move that the captions describe."""
        rng = np.random.default_rng((self.seed, 3, number))
        return random_clip(rng, num_chunks, CHUNK, self.pacing, self.long_trips)

    def text(self, number: int, num_chunks: int) -> Tensor:
        """Text embeddings [chunks, L, 4096]."""
        return to_text(self.clip(number, num_chunks).captions)

    def shown_by(self, number: int, num_chunks: int, slots: Sequence[Sequence[int]], num_fast: int) -> Tensor:
        """`ShownBy` of each column of the last chunks of a video that follows the captions, [1, T, VIEW_COLUMNS].

        `slots` are the frames that each of these chunks remembers (columns_shown_by).
        """
        first = num_chunks - len(slots)
        return torch.from_numpy(columns_shown_by(self.clip(number, num_chunks), slots, num_fast, first))[None]

    @property
    def empty(self) -> Tensor:
        """The text of the empty prompt, [1, 1, 4096]."""
        return torch.zeros(1, 1, TEXT_DIM)

    def negative(self, prompt: str) -> Tensor:
        """The text of a negative prompt, [1, L, 4096]."""
        return to_text([prompt])

    def describe(self) -> str:
        """The `data` field of a student card."""
        return "captions of the demo world"


@dataclass(frozen=True, kw_only=True)
class DemoClips(DemoPrompts):
    """Clips of the demo world, by sample number."""

    codec: DemoCodec
    num_chunks: int
    chunk: int

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents [1, C, T, H, W], and one text per chunk [chunks, L, 4096]."""
        rng = np.random.default_rng((self.seed, 4, number))
        clip = random_clip(rng, self.num_chunks, self.chunk, self.pacing)
        return to_latents(self.codec, [clip]), to_text(clip.captions)

    def describe(self) -> str:
        return f"demo world, drawn on the fly; clips of {self.num_chunks * self.chunk} latent frames"


def open_clips(config: NetworkConfig, num_chunks: int) -> DemoClips | EncodedSet:
    """Training clips of `num_chunks` chunks."""
    chunk = config.memory.chunk
    if config.data == "demo":
        codec = load_demo_codec(config.codec_path)
        return DemoClips(seed=config.data_seed, codec=codec, num_chunks=num_chunks, chunk=chunk)
    return _open_set(config, num_chunks * chunk)


def open_prompts(config: NetworkConfig, **moves: float) -> DemoPrompts | EncodedSet:
    """The prompts of a stage's rollouts. `moves` are shares of camera moves in the demo world (DemoPrompts)."""
    return DemoPrompts(seed=config.data_seed, **moves) if config.data == "demo" else _open_set(config, None)


def _open_set(config: NetworkConfig, num_frames: int | None) -> EncodedSet:
    """Raises ValueError for a set of another model or size, of shorter clips, or of prompts where clips are needed."""
    encoded, folder = EncodedSet(config.data, config.data_seed, num_frames), config.data
    header, backbone = encoded.header, backbone_of(config.preset)
    if backbone_of(header.model) is not backbone:
        raise ValueError(
            f"data: {folder} was encoded by {header.model}, preset {config.preset} cannot read it; encode"
            f" {'without --model' if backbone is DEMO else 'with --model, a copy of Wan'}"
        )
    if num_frames is None:
        return encoded
    if header.frames is None:
        raise ValueError(f"data: {folder} holds prompts only; this stage learns from videos")
    if header.frames < num_frames:
        raise ValueError(
            f"data: clips of {folder} have {header.frames} latent frames, {num_frames} are needed; encode with"
            f" --frames {num_frames}, or lower num_chunks"
        )
    if header.size != tuple(config.size):
        raise ValueError(f"size: {tuple(config.size)}, but {folder} was encoded at {header.size}")
    return encoded
