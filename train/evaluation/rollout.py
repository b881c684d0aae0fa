"""Rollouts of camera moves: scripts that begin alike are made once and branch, because a Memory never changes."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from ...memory.memory import Memory
from ...model.codecs.demo_text import encode_demo_text
from ...model.sampler import CausalSampler, seeded_noise
from ...model.segment import used_rows
from ...video.pipeline import Pipeline
from ..world.prompts import Style, caption

Key = TypeVar("Key", bound=Hashable)


class Camera:
    """A student under one style and seed, moved chunk by chunk; films equal `Pipeline.tell`'s, bit for bit."""

    def __init__(self, pipeline: Pipeline, style: Style, seed: int):
        self.pipeline, self.style, self.seed = pipeline, style, seed
        self._samplers: dict[int, CausalSampler] = {}

    def move(self, memory: Memory, move: int) -> Memory:
        """One more chunk; `move` is -1 (left), 0 (stays) or +1 (right)."""
        prompt = caption(self.style, move)
        if not memory.segments or memory.segments[-1].prompt != prompt:
            memory = memory.begin(prompt, self.seed, used_rows(encode_demo_text(prompt)))
        noise = seeded_noise(self.seed, memory.latent_size)
        (memory,) = self._sampler(move).rollout(memory, 1, sigmas=self.pipeline.card.sigmas, noise=noise)
        return memory

    def _sampler(self, move: int) -> CausalSampler:
        if move not in self._samplers:
            self._samplers[move] = self.pipeline.sampler(encode_demo_text(caption(self.style, move)))
        return self._samplers[move]


def branches(camera: Camera, memory: Memory, paths: Mapping[Key, Sequence[int]]) -> Iterator[tuple[Key, Memory]]:
    """Roll out several paths (one move per chunk) from one memory; yields every path's memory at its end.

    A beginning that paths share is made once. Paths end in no particular order.
    """
    waiting = [(memory, 0, list(paths))]
    while waiting:
        memory, done, keys = waiting.pop()
        onwards: dict[int, list[Key]] = {}
        for key in keys:
            if len(paths[key]) == done:
                yield key, memory
            else:
                onwards.setdefault(paths[key][done], []).append(key)
        waiting += [(camera.move(memory, move), done + 1, together) for move, together in onwards.items()]


def film_of(memory: Memory) -> torch.Tensor:
    """The film so far, [C, T, H, W], on the CPU."""
    return torch.cat(memory.latent_chunks, dim=2)[0]
