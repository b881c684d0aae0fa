"""Our loop and the ports of others as things that generate one chunk after the other, ready to be timed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..memory.layer_store import LayerStore
from ..memory.memory import Memory
from ..model.sampler import CausalSampler, Noise, seeded_noise, working_bytes
from .clock import Switch, no_clock
from .ports import CacheLoop, LoopSettings
from .subject import PROMPT, Setup, Subject

FILL = -1
"""The step whose noise stands in for the clean latents that fill a memory before anything is timed."""


class Loop(Protocol):
    """Generates chunks that attend to a full memory."""

    @property
    def name(self) -> str: ...

    def chunk(self, switch: Switch = no_clock) -> Tensor:
        """x0 [1, C, T, H, W] of a chunk. A clock is told where its parts begin."""
        ...

    def held_bytes(self) -> int:
        """Bytes on the device before a chunk, beside the weights."""
        ...


class OurLoop:
    """The sampler under one setup. Every chunk is the first one after the memory is full, always the same."""

    def __init__(self, name: str, subject: Subject, setup: Setup, memory: Memory, seed: int):
        self.name, self.setup, self.memory = name, setup, memory
        text = subject.pipeline(setup).text_encoder.encode(PROMPT)
        self.sampler = subject.sampler(setup, text, self._on_pass)
        self.sigmas, self.noise = subject.card.sigmas, seeded_noise(seed, memory.latent_size)
        self._passes, self._switch = 0, no_clock

    def chunk(self, switch: Switch = no_clock) -> Tensor:
        return self.continued(self.memory, switch).latent_chunks[-1]

    def continued(self, memory: Memory, switch: Switch = no_clock) -> Memory:
        """A memory with one chunk more."""
        with self.watched(switch) as begin:
            begin()
            return self.sampler.generate_chunk(memory, self.sigmas, self.noise)

    @contextlib.contextmanager
    def watched(self, switch: Switch) -> Iterator[Callable[[], None]]:
        """Tells a clock where the commit of a chunk begins; what is yielded is called where each chunk begins."""
        self._switch = switch
        try:
            yield self._begin
        finally:
            self._switch = no_clock

    def _begin(self) -> None:
        self._passes = 0

    def _on_pass(self) -> None:
        self._passes += 1
        if self._passes == len(self.sigmas) + 1:
            self._switch("commit")

    def held_bytes(self) -> int:
        text = [context for context in (self.sampler.text, self.sampler.commit_text) if context]
        of_text = sum(context.num_bytes for context in text)
        in_ram = self.setup.kv_placement == "from RAM"
        return of_text + (0 if in_ram else self.memory.num_bytes)

    def predicted_bytes(self) -> int:
        """What the sampler predicts as the most bytes on the device beside the weights."""
        setup, sampler = self.setup, self.sampler
        return working_bytes(sampler.network, self.memory, setup.kv_placement, sampler.text, setup.kv_dtype)


def filled(sampler: CausalSampler, memory: Memory, seed: int, num_chunks: int | None = None) -> Memory:
    """A memory after commits of random latents: until it is full, or for `num_chunks`.

    Raises ValueError for a memory that does not get full.
    """
    noise, memory = seeded_noise(seed, memory.latent_size), sampler.prepare(memory)
    most = 4 * memory.config.num_slots if num_chunks is None else num_chunks
    for _ in range(most):
        memory = sampler.commit(memory, clean_latents(noise, memory.num_frames, memory.config.chunk, sampler))
        if num_chunks is None and is_full(memory):
            return memory
    if not is_full(memory):
        held, most = num_remembered(memory), capacity(memory)
        raise ValueError(f"memory: {held} of {most} frames are remembered after {memory.num_frames}; use policy=fifo")
    return memory


def clean_latents(noise: Noise, first_frame: int, num_frames: int, sampler: CausalSampler) -> Tensor:
    """Random latents [1, C, T, H, W] in place of those of generated frames."""
    frames = range(first_frame, first_frame + num_frames)
    return torch.stack([noise(frame, FILL) for frame in frames], dim=2).to(sampler.network.device)


def num_remembered(memory: Memory) -> int:
    """Latent frames that a layer holds."""
    if isinstance(memory.store, LayerStore):
        return len(memory.store.layers[0].frames) if memory.store.layers else 0
    return len(memory.slots.all)


def capacity(memory: Memory) -> int:
    """Latent frames that a layer of a full memory holds between chunks."""
    return memory.config.num_slots if memory.config.per_layer else memory.config.capacity


def is_full(memory: Memory) -> bool:
    return num_remembered(memory) == capacity(memory)


def make_port(kind: type[CacheLoop], ours: OurLoop, subject: Subject) -> CacheLoop:
    """Another project's loop under the setup of ours, filled with the same clean latents.

    Raises ValueError for a window that is no whole number of chunks.
    """
    memory, sampler = ours.memory, ours.sampler
    config = memory.config
    window, chunk = config.num_slots, config.chunk
    if window % chunk:
        raise ValueError(f"window: {window} frames are no whole number of chunks of {chunk}; {kind.name} needs that")
    loop = kind(
        LoopSettings(
            network=dataclasses.replace(sampler.network, commit=None, on_pass=lambda: None),
            text_BLC=subject.pipeline(ours.setup).text_encoder.encode(PROMPT),
            latent_size=memory.latent_size,
            chunk=chunk,
            window=window,
            sigmas=ours.sigmas,
            noise=ours.noise,
        )
    )
    while loop.first_frame < window - chunk:
        loop.commit(clean_latents(ours.noise, loop.first_frame, chunk, sampler))
    return loop
