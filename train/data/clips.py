"""Clips of the demo world as latents: drawn on the fly, a function of (data seed, step).

Shapes: B batch, T latent frames, C latent channels, H W latent rows and columns, L text tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...memory.config import MemoryConfig
from ...memory.policy import Slots, advance
from ...model.codecs.backbone import DEMO, backbone_of
from ...model.codecs.demo_text import TEXT_DIM, canonical_words, concept_embedding
from ...model.codecs.demo_vae import DemoCodec, load_demo_codec
from ..config import NetworkConfig, TeacherConfig
from ..world.camera import headings, render_latent_frames
from ..world.geometry import ART_SCALE, CHUNK, RING_COLUMNS, VIEW_COLUMNS, VIEW_HEIGHT, VIEW_WIDTH
from ..world.prompts import Style, caption
from ..world.scene import Scene
from ..world.scripts import pacing_script, random_script, random_styles
from .shards import EncodedSet


@dataclass(frozen=True)
class Clip:
    """Ground truth of one clip: what stands where, what is asked for, where the camera looks."""

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


def random_clip(rng: np.random.Generator, num_chunks: int, chunk: int, pacing: float) -> Clip:
    """A clip whose camera leaves places and comes back to them; a share `pacing` of them goes back and forth.

    It begins anywhere on the ring: a student knows where a token is only relative to others (rotary positions), so
    from noise it could not tell which column of a fixed first view a token is.
    """
    script = pacing_script if rng.random() < pacing else random_script
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


def to_text(captions: list[list[str]]) -> Tensor:
    """Text rows [B * chunks, L, 4096], cut to the longest prompt of the batch: zero rows are the model's business."""
    flat = [sorted(set(canonical_words(text))) for texts in captions for text in texts]
    length = max(1, max(len(concepts) for concepts in flat))
    table = {concept: concept_embedding(concept) for concepts in flat for concept in concepts}
    rows = torch.zeros(len(flat), length, TEXT_DIM)
    for i, concepts in enumerate(flat):
        for j, concept in enumerate(concepts):
            rows[i, j] = table[concept]
    return rows


def memory_layout(rng: np.random.Generator, clip: Clip, config: MemoryConfig) -> list[tuple[int, ...]]:
    """Which frames each chunk of a clip remembers, in the order of their positions.

    A mixture, so that a student can be used with any policy: 70 % the full memory, 15 % sink and fast, 15 % fast
    alone; slow frames by the real rules (60 %), one a chunk (20 %) or by coin (20 %) (demo_world.md 3). The
    similarity of two frames comes from the world: the same view counts as alike.
    """
    look = [(heading, clip.styles[t // clip.chunk]) for t, heading in enumerate(clip.headings)]
    alike = lambda frame, others: [1.0 if look[frame] == look[other] else 0.8 for other in others]
    coin = lambda frame, others: [float(rng.integers(2)) for _ in others]
    layout = rng.choice(["full", "sink and fast", "fast"], p=[0.7, 0.15, 0.15])
    rule = rng.choice(["novel", "clean", "uniform", "coin"], p=[0.3, 0.3, 0.2, 0.2])
    config = MemoryConfig(
        sink=0 if layout == "fast" else config.sink,
        slow=config.slow if layout == "full" else 0,
        fast=config.fast,
        chunk=config.chunk,
        window=config.window,
        policy="clean" if rule == "coin" else str(rule),
        uniform_stride=config.chunk,
    )
    slots, seen = Slots(), []
    for first in range(0, len(look), clip.chunk):
        seen.append(slots.all)
        slots, _ = advance(slots, config, range(first, first + clip.chunk), coin if rule == "coin" else alike)
    return seen


FAST, MEMORY, UNSEEN = range(3)


def last_seen(clip: Clip, slots: np.ndarray, num_fast: int) -> np.ndarray:
    """Where each column of each frame can be known from, int [T, VIEW_COLUMNS].

    FAST: a recent frame shows it; MEMORY: only a sink or slow frame does; UNSEEN: nothing remembered does.
    `slots` [chunks, M] are the remembered frames, -1 for none; the `num_fast` frames before a chunk are recent.
    """
    looking = clip.headings[:, None] + np.arange(VIEW_COLUMNS)
    where = np.full(looking.shape, UNSEEN)
    for c, remembered in enumerate(slots):
        frames = slice(c * clip.chunk, (c + 1) * clip.chunk)
        remembered = remembered[remembered >= 0]
        recent = remembered[remembered >= c * clip.chunk - num_fast]
        where[frames][np.isin(looking[frames], looking[remembered])] = MEMORY
        where[frames][np.isin(looking[frames], looking[recent])] = FAST
    return where


@dataclass(frozen=True)
class Batch:
    """One training step's worth of clips."""

    clips: list[Clip]
    latents: Tensor
    """[B, C, T, H, W]"""
    text: Tensor
    """[B * chunks, L, 4096]"""
    slots: Tensor
    """[B, chunks, M]: remembered frames by position, -1 where there is none."""
    where: Tensor
    """[B, T, VIEW_COLUMNS]: FAST, MEMORY or UNSEEN."""

    def select(self, clips: range) -> "Batch":
        """Some clips of it."""
        text = self.text.unflatten(0, (len(self.clips), -1))[clips].flatten(0, 1)
        return Batch([self.clips[i] for i in clips], self.latents[clips], text, self.slots[clips], self.where[clips])

    def to(self, device: torch.device) -> "Batch":
        """On a device."""
        tensors = (tensor.to(device) for tensor in (self.latents, self.text, self.slots, self.where))
        return Batch(self.clips, *tensors)


def make_batch(
    codec: DemoCodec,
    config: MemoryConfig,
    *,
    seed: tuple[int, ...],
    size: int,
    num_chunks: int,
    text_dropout: float = 0.0,
    pacing: float = 0.0,
) -> Batch:
    """The batch of a seed; no state, so that a resumed run sees the same data."""
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng, num_chunks, config.chunk, pacing) for _ in range(size)]
    slots = torch.full((size, num_chunks, config.capacity), -1)
    for b, clip in enumerate(clips):
        for c, frames in enumerate(memory_layout(rng, clip, config)):
            slots[b, c, : len(frames)] = torch.tensor(frames, dtype=slots.dtype)
    captions = [clip.captions if rng.random() >= text_dropout else [""] * num_chunks for clip in clips]
    slots = slots[:, :, : max(1, int((slots >= 0).sum(-1).max()))]
    where = [last_seen(clip, slots[b].numpy(), config.fast - config.chunk) for b, clip in enumerate(clips)]
    return Batch(clips, to_latents(codec, clips), to_text(captions), slots, torch.from_numpy(np.stack(where)))


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
        return to_text([self.captions(number, num_chunks)])

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

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return VIEW_WIDTH * ART_SCALE, VIEW_HEIGHT * ART_SCALE

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents [1, C, T, H, W], and one text per chunk [chunks, L, 4096]."""
        rng = np.random.default_rng((self.seed, 4, number))
        clip = random_clip(rng, self.num_chunks, self.chunk, self.pacing)
        return to_latents(self.codec, [clip]), to_text([clip.captions])

    def describe(self) -> str:
        return f"demo world, drawn on the fly; clips of {self.num_chunks * self.chunk} latent frames"


def open_clips(config: TeacherConfig) -> DemoClips | EncodedSet:
    """The clips that the teacher learns from."""
    num_chunks, chunk = config.num_chunks, config.memory.chunk
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
    if num_frames and not header.frames:
        raise ValueError(f"data: {folder} holds prompts only; this stage learns from videos")
    if num_frames and header.frames < num_frames:
        raise ValueError(
            f"data: clips of {folder} have {header.frames} latent frames, {num_frames} are needed; encode with"
            f" --frames {num_frames}, or lower num_chunks"
        )
    if num_frames and header.size != tuple(config.size):
        raise ValueError(f"size: {tuple(config.size)}, but {folder} was encoded at {header.size}")
    return encoded
