"""Clips of the demo world as latents, rendered on the fly: a function of (data seed, step) or of a sample number.

Shapes: B batch, T latent frames, C latent channels, H W latent rows and columns, L text tokens, M remembered frames.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...memory.config import MemoryConfig
from ...memory.policy import Slots, advance
from ...model.codecs.backbone import DEMO, backbone_of
from ...model.codecs.demo_text import TEXT_DIM, canonical_words, concept_embedding
from ...model.codecs.demo_vae import DemoCodec, load_demo_codec
from ..config import NetworkConfig
from ..world.camera import headings, render_latent_frames
from ..world.geometry import CHUNK, RING_COLUMNS, VIEW_COLUMNS
from ..world.prompts import Style, caption
from ..world.scene import Scene
from ..world.scripts import long_trip_script, pacing_script, random_script, random_styles
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

    def art(self) -> np.ndarray:
        """Art pixels of every latent frame, uint8."""
        return render_latent_frames(self.scene, self.styles, self.moves, self.chunk, self.start)


def random_clip(
    rng: np.random.Generator, num_chunks: int, chunk: int, pacing: float, long_trips: float = 0.0
) -> Clip:
    """A clip whose camera leaves places and returns.

    In a share `long_trips` of the clips it goes straight out and back; in a share `pacing` of the others it moves back
    and forth over a few views.

    The first view is at a random place of the ring. Rotary positions are relative, so the columns of a fixed first view
    could not be told apart.
    """
    script = long_trip_script if long_trips and rng.random() < long_trips else None
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


LAYOUTS = {"full": 0.8, "sink and fast": 0.1, "fast": 0.1}
"""Parts of the memory that a clip has, with the share of clips."""
RULES = {"recall": 0.45, "cover": 0.2, "novel": 0.12, "clean": 0.1, "uniform": 0.05, "random": 0.08}
"""How the slow frames of a clip are chosen, with the share of clips that have slow memory."""
COVER_THRESHOLDS = (0.97, 0.92, 0.85)
COLUMN_SIMILARITY = 0.045
"""Two views lose this much similarity per column between them."""
STYLE_SIMILARITY = 0.12


def memory_layout(rng: np.random.Generator, clip: Clip, config: MemoryConfig) -> list[tuple[int, ...]]:
    """The frames that each chunk of a clip remembers, in the order of their positions.

    Layouts are mixed, so that a student works with any policy (docs/method.md, Training). The similarity of two frames
    is that of their views in the world.
    """
    layout, rule = _draw(rng, LAYOUTS), _draw(rng, RULES)
    config = dataclasses.replace(
        config,
        sink=0 if layout == "fast" else config.sink,
        slow=config.slow if layout == "full" else 0,
        policy={"recall": "fifo", "cover": "novel", "random": "clean"}.get(rule, rule),
        eviction="redundant" if rule == "cover" else config.eviction,
        uniform_stride=config.chunk,
    )
    if rule == "cover":
        config = dataclasses.replace(config, slow_similarity_threshold=float(rng.choice(COVER_THRESHOLDS)))
    heading = clip.headings
    style = np.array([clip.styles.index(clip.styles[t // clip.chunk]) for t in range(len(heading))])

    def distance(frame: int, others: Sequence[int]) -> np.ndarray:
        columns = (heading[list(others)] - heading[frame]) % RING_COLUMNS
        return np.minimum(columns, RING_COLUMNS - columns)

    def similarity(frame: int, others: Sequence[int]) -> list[float]:
        other_style = style[list(others)] != style[frame]
        return (1 - COLUMN_SIMILARITY * distance(frame, others) - STYLE_SIMILARITY * other_style).clip(0).tolist()

    at_random = lambda frame, others: [float(rng.integers(2)) for _ in others]
    blur = float(rng.choice((0, 1, 3)))
    slots, remembered = Slots(), []
    for first in range(0, len(heading), clip.chunk):
        frames = range(first, first + clip.chunk)
        slow = slots.slow
        if rule == "recall" and config.slow and first:
            archive = [t for t in range(first) if t not in slots.sink + slots.fast]
            # Around the latest frame, as the policy sees it, or around the coming views.
            around = first - 1 if rng.random() < 0.5 else first + clip.chunk - 1
            slow = _nearest(rng, archive, distance(around, archive), heading, config.slow, blur) if archive else ()
        remembered.append(slots.sink + slow + slots.fast)
        slots, _ = advance(slots, config, frames, at_random if rule == "random" else similarity)
    return remembered


def _draw(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _nearest(
    rng: np.random.Generator, archive: list[int], distance: np.ndarray, heading: np.ndarray, count: int, blur: float
) -> tuple[int, ...]:
    """Frames of the nearest views, one per view, in the order of the film; `blur` is an error in columns."""
    order = np.argsort(distance + blur * rng.standard_normal(len(archive)), kind="stable")
    by_view: dict[int, int] = {}
    for place in order:
        frame = archive[place]
        by_view.setdefault(int(heading[frame]) % RING_COLUMNS, frame)
    return tuple(sorted(list(by_view.values())[:count]))


class ShownBy(enum.IntEnum):
    """The remembered frames that show a column of the world."""

    FAST = 0
    """A fast frame."""
    MEMORY = 1
    """Sink or slow frames only."""
    NOTHING = 2


def columns_shown_by(clip: Clip, slots: np.ndarray, num_fast: int) -> np.ndarray:
    """`ShownBy` of each column of each frame, int [T, VIEW_COLUMNS].

    `slots` [chunks, M] are the remembered frames, -1 for none; the `num_fast` frames before a chunk are fast.
    """
    columns = clip.headings[:, None] + np.arange(VIEW_COLUMNS)
    shown_by = np.full(columns.shape, ShownBy.NOTHING)
    for c, remembered in enumerate(slots):
        frames = slice(c * clip.chunk, (c + 1) * clip.chunk)
        remembered = remembered[remembered >= 0]
        fast = remembered[remembered >= c * clip.chunk - num_fast]
        shown_by[frames][np.isin(columns[frames], columns[remembered])] = ShownBy.MEMORY
        shown_by[frames][np.isin(columns[frames], columns[fast])] = ShownBy.FAST
    return shown_by


@dataclass(frozen=True)
class Batch:
    """The clips of one training step."""

    latents: Tensor
    """[B, C, T, H, W]"""
    text: Tensor
    """[B, chunks, L, 4096]"""
    slots: Tensor
    """[B, chunks, M]: remembered frames by position, -1 for none."""
    shown_by: Tensor
    """[B, T, VIEW_COLUMNS]: `ShownBy` of each column."""


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
    """The batch of a seed; a resumed run gets the same data."""
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng, num_chunks, config.chunk, pacing, long_trips) for _ in range(size)]
    slots = torch.full((size, num_chunks, config.capacity), -1)
    for b, clip in enumerate(clips):
        for c, frames in enumerate(memory_layout(rng, clip, config)):
            slots[b, c, : len(frames)] = torch.tensor(frames, dtype=slots.dtype)
    dropped = [rng.random() < text_dropout for _ in clips]
    captions = ["" if drop else text for clip, drop in zip(clips, dropped) for text in clip.captions]
    slots = slots[:, :, : max(1, int((slots >= 0).sum(-1).max()))]
    shown_by = [columns_shown_by(clip, slots[b].numpy(), config.fast - config.chunk) for b, clip in enumerate(clips)]
    text = to_text(captions).unflatten(0, (size, num_chunks))
    return Batch(to_latents(codec, clips), text, slots, torch.from_numpy(np.stack(shown_by)))


@dataclass(frozen=True, kw_only=True)
class DemoPrompts:
    """Captions of the demo world along random camera moves, by sample number."""

    seed: int
    pacing: float = 0.3

    def captions(self, number: int, num_chunks: int) -> list[str]:
        """One caption per chunk."""
        return random_clip(np.random.default_rng((self.seed, 3, number)), num_chunks, CHUNK, self.pacing).captions

    def text(self, number: int, num_chunks: int) -> Tensor:
        """Text embeddings [chunks, L, 4096]."""
        return to_text(self.captions(number, num_chunks))

    @property
    def empty(self) -> Tensor:
        """The text of the empty prompt, [1, 1, 4096]."""
        return torch.zeros(1, 1, TEXT_DIM)

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


def open_prompts(config: NetworkConfig) -> DemoPrompts | EncodedSet:
    """The prompts of a stage's rollouts."""
    return DemoPrompts(seed=config.data_seed) if config.data == "demo" else _open_set(config, None)


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
