"""Rollouts of camera moves. Scripts share their common beginning: it is generated once."""

import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from ...memory.memory import Memory
from ...model.codecs.demo_text import encode_demo_text
from ...model.sampler import CausalSampler, SamplerOptions, seeded_noise
from ...model.segment import used_rows
from ...video.pipeline import Pipeline
from ..world.prompts import Style, caption

Key = TypeVar("Key", bound=Hashable)


class Camera:
    """A student that generates one camera move at a time, under one style and seed.

    The memories equal those of `Pipeline.generate`, bit for bit.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        style: Style,
        seed: int,
        options: SamplerOptions | None = None,
        recache: int = 0,
    ):
        """`recache` is the number of chunks after which remembered keys and values are computed again; 0: never."""
        self.pipeline, self.style, self.seed, self.recache = pipeline, style, seed, recache
        self._sampler = functools.cache(lambda prompt: pipeline.sampler(encode_demo_text(prompt), options))

    def move(self, memory: Memory, move: int) -> Memory:
        """Generate one chunk; `move` is -1 (left), 0 (stay) or +1 (right)."""
        prompt = caption(self.style, move)
        if not memory.segments or memory.segments[-1].prompt != prompt:
            memory = memory.begin(prompt, self.seed, used_rows(encode_demo_text(prompt)))
        if self.recache and memory.latent_chunks and len(memory.latent_chunks) % self.recache == 0:
            memory = self._recache(memory)
        noise = seeded_noise(self.seed, memory.latent_size)
        (memory,) = self._sampler(prompt).rollout(memory, 1, sigmas=self.pipeline.card.sigmas, noise=noise)
        return memory

    def sampler(self, memory: Memory) -> CausalSampler:
        """The student under the last prompt of a memory."""
        return self._sampler(memory.segments[-1].prompt)

    @torch.inference_mode()
    def _recache(self, memory: Memory) -> Memory:
        return self.sampler(memory).recache(memory)

    @torch.inference_mode()
    def hold(self, memory: Memory, frames: Collection[int]) -> Memory:
        """The memory with these frames of the film as slow memory; keys and values that it lacks are computed.

        A frame is read under the prompt that it was generated under.
        """
        texts = [used_rows(encode_demo_text(segment.prompt)) for segment in memory.segments[:-1]]
        return self.sampler(memory).read(dataclasses.replace(memory.with_slow(frames), texts=(*texts, memory.text)))


def branches(camera: Camera, memory: Memory, paths: Mapping[Key, Sequence[int]]) -> Iterator[tuple[Key, Memory]]:
    """Roll out several paths, one move per chunk, from one memory; yields the memory at the end of every path.

    Chunks that paths have in common are generated once. Paths end in no particular order.
    """
    pending = [(memory, 0, list(paths))]
    while pending:
        memory, num_chunks, keys = pending.pop()
        groups: dict[int, list[Key]] = {}
        for key in keys:
            if len(paths[key]) == num_chunks:
                yield key, memory
            else:
                groups.setdefault(paths[key][num_chunks], []).append(key)
        pending += [(camera.move(memory, move), num_chunks + 1, group) for move, group in groups.items()]
