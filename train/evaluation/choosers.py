"""Policies for evaluation only: before every chunk, slow frames are chosen anew (docs/demo_student.md, Choosers).

`oracle` knows the camera path. It tells what was not held from what was held and not read.

`rag` and `tether` follow the ideas of LongLive-RAG (arXiv 2606.02553) and TetherCache (arXiv 2606.13035).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...memory.memory import Memory
from ...model.attention_mass import AttentionRecorder
from ...model.sampler import CausalSampler, SamplerOptions
from ...video.pipeline import Pipeline
from ..world.camera import headings
from ..world.geometry import RING_COLUMNS
from ..world.prompts import Style, caption
from .rollout import Camera

DIVERSITY = 0.35
"""Weight of temporal diversity against attention mass (tether)."""

Chooser = Callable[["ChoosingCamera", Memory, np.ndarray], Sequence[int]]
"""(camera, memory, true headings of all frames and of the coming chunk) -> slow frames for the coming chunk.

They are at most `config.slow` frames of `candidates`.
"""


class ChoosingCamera(Camera):
    """A student whose slow frames a chooser chooses before every chunk.

    The coming chunk is part of the choice, so a memory between two chunks holds the slow frames of the last chunk and
    those that left fast since. The chooser drops frames from these, and reads others from the film.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        style: Style,
        seed: int,
        choose: Chooser,
        options: SamplerOptions | None = None,
        recache: int = 0,
    ):
        super().__init__(pipeline, style, seed, options, recache)
        self.choose = choose

    def move(self, memory: Memory, move: int) -> Memory:
        if candidates(memory):
            path = headings([*self._moves(memory), move], memory.config.chunk)
            memory = self.hold(memory, self.choose(self, memory, path))
        after = super().move(memory, move)
        kvs = dict(memory.store.frame_kvs()) | dict(after.store.frame_kvs())
        after = dataclasses.replace(after, store=dataclasses.replace(after.store, frames=kvs))
        return after.with_slow({*memory.slots.slow, *after.slots.slow})

    def _moves(self, memory: Memory) -> list[int]:
        """The move of every chunk of the film, from its prompts."""
        moves = {caption(self.style, move): move for move in (-1, 0, 1)}
        ends = [*(segment.first_frame for segment in memory.segments[1:]), memory.num_frames]
        chunk = memory.config.chunk
        return [
            moves[segment.prompt]
            for segment, end in zip(memory.segments, ends)
            for _ in range(segment.first_frame, end, chunk)
        ]


def candidates(memory: Memory) -> list[int]:
    """Frames of the film outside sink and fast, oldest first."""
    others = {*memory.slots.sink, *memory.slots.fast}
    return [frame for frame in range(memory.num_frames) if frame not in others]


def oracle(camera: ChoosingCamera, memory: Memory, path: np.ndarray) -> list[int]:
    """The frames whose true headings are nearest to the coming chunk's, one per heading: the oldest.

    Of headings that are equally near, the one that was seen first.
    """
    apart = (path[:, None] - path[memory.num_frames :]) % RING_COLUMNS
    apart = np.minimum(apart, RING_COLUMNS - apart).min(axis=1)
    oldest: dict[int, int] = {}
    for frame in candidates(memory):
        oldest.setdefault(path[frame] % RING_COLUMNS, frame)
    return sorted(oldest.values(), key=lambda frame: apart[frame])[: memory.config.slow]


def rag(camera: ChoosingCamera, memory: Memory, path: np.ndarray) -> list[int]:
    """The frames most like the latest one by the cosine of their clean latents."""
    frames = memory.latents_of(range(memory.num_frames))[0].movedim(1, 0).flatten(1)
    free = candidates(memory)
    likeness = F.cosine_similarity(frames[free], frames[-1:])
    return [free[i] for i in likeness.argsort(descending=True, stable=True)[: memory.config.slow].tolist()]


def tether(camera: ChoosingCamera, memory: Memory, path: np.ndarray) -> Sequence[int]:
    """Of the slow frames held and those that left fast, the best by attention mass and temporal diversity.

    The mass is the share of the last chunk's attention, of all candidates together 1. The diversity of a frame is 1
    minus the largest of the other candidates' masses, each less by exp(-distance in time / half of the span).
    """
    held = memory.slots.slow
    if len(held) <= memory.config.slow:
        return held
    shares = last_chunk_mass(camera.sampler(memory), memory)
    mass = torch.tensor([shares[frame] for frame in held])
    mass = mass / mass.sum()
    times = torch.tensor(held, dtype=torch.float32)
    near = (-(times[:, None] - times).abs() / (0.5 * (times.max() - times.min() + 1))).exp().fill_diagonal_(0)
    score = mass + DIVERSITY * (1 - (near * mass).amax(dim=1))
    return [held[i] for i in score.topk(memory.config.slow).indices.tolist()]


CHOOSERS: dict[str, Chooser] = {"oracle": oracle, "rag": rag, "tether": tether}


@torch.inference_mode()
def last_chunk_mass(sampler: CausalSampler, memory: Memory) -> dict[int, float]:
    """Share of the last chunk's attention on every frame: those remembered before it, and its own.

    It is measured in a pass over the chunk's clean latents, mean over layers, heads and tokens.
    """
    chunk, network = memory.chunks()[-1], sampler.network
    past = memory.restrict_to([frame for frame in memory.slots.all if frame not in chunk])
    frames = [*past.slots.all, *chunk]
    recorder = AttentionRecorder(network.attention, sampler.text, len(frames))
    network = dataclasses.replace(network, attention=recorder)
    recording = dataclasses.replace(sampler, network=network, commit_attends="all")
    recording.commit(past, memory.latents_of(chunk).to(network.device))
    return dict(zip(frames, torch.stack(recorder.shares).mean(dim=0).tolist()))
