"""Rollouts of the student, with gradients in their target (docs/method.md, Distillation).

They use the sampler that generates videos. One denoising step of every target chunk, the exit step, has gradients.
Memories never change, so the memory for the backward pass grows with the target but not with the context.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...memory.memory import Memory
from ...model.config import StudentCard
from ...model.network import Network
from ...model.sampler import CausalSampler, Noise, SamplerOptions, make_sampler
from ...model.text_cache import TextCache


class Piece(NamedTuple):
    """Chunks of a target that are scored together."""

    memory: Memory
    """The memory before them."""
    target_BCTHW: Tensor
    shown_by: Tensor | None
    """As in Rollout."""


@dataclass(frozen=True)
class Rollout:
    """A context and a target."""

    contexts: tuple[Memory, ...]
    """The memory before each chunk of the target."""
    target_BCTHW: Tensor
    """x0 of the target at the exit step."""
    memory: Memory
    """The memory after the target."""
    shown_by: Tensor | None = None
    """`ShownBy` of each column of the target, [1, T, columns], where the true camera move is known."""

    def pieces(self, num_chunks: int) -> Iterator[Piece]:
        """The target in pieces of `num_chunks` chunks, each with the memory before it."""
        frames = num_chunks * self.memory.config.chunk
        targets = self.target_BCTHW.split(frames, dim=2)
        shown_by = [None] * len(targets) if self.shown_by is None else self.shown_by.split(frames, dim=1)
        yield from map(Piece, self.contexts[::num_chunks], targets, shown_by)


@dataclass(frozen=True)
class Student:
    """A causal network under text embeddings [G, L, C]: one for all chunks, or one per chunk."""

    network: Network
    text_GLC: Tensor
    lazy: bool = False
    """Compute views of memories layer by layer in every pass. Required if the network recomputes blocks: a kept view
    would take the memory that recomputing saves."""
    commit_attends: str = "all"
    """What the commit pass attends to (view.ATTENDS)."""
    texts: TextCache = field(default_factory=TextCache)
    """Of the weights as they are: a rollout after an update is made by another Student."""

    def samplers(self, first_chunk: int, num_chunks: int) -> Iterator[CausalSampler]:
        """One sampler per chunk. Values that are not finite are not checked here: TrainedNetwork skips the update."""
        options = SamplerOptions(commit_attends=self.commit_attends, check_finite=False)
        network = dataclasses.replace(self.network, texts=self.texts)
        for chunk in range(first_chunk, first_chunk + num_chunks):
            text_BLC = self.text_GLC[min(chunk, len(self.text_GLC) - 1)][None]
            yield make_sampler(network, StudentCard(), text_BLC, options)

    @torch.no_grad()
    def encode_clip(self, memory: Memory, latents_BCTHW: Tensor) -> Memory:
        """Commit clean latents to a memory, chunk by chunk."""
        chunks = latents_BCTHW.split(memory.config.chunk, dim=2) if latents_BCTHW.shape[2] else ()
        for sampler, x0 in zip(self.samplers(len(memory.latent_chunks), len(chunks)), chunks):
            memory = sampler.commit(memory, x0)
        return memory

    @torch.no_grad()
    def rollout(self, memory: Memory, num_chunks: int, sigmas: Sequence[float], noise: Noise) -> Memory:
        """Continue a memory by `num_chunks` chunks."""
        for sampler in self.samplers(len(memory.latent_chunks), num_chunks):
            memory = sampler.generate_chunk(memory, sigmas, noise)
        return memory

    def target(
        self, context: Memory, num_chunks: int, exit_step: int, sigmas: Sequence[float], noise: Noise, has_grad: bool
    ) -> Rollout:
        """Continue a context by the target. x0 at `exit_step` is the result, with gradients if `has_grad`.

        The chunks are then denoised to the end and committed clean, without gradients.
        """
        memory, contexts, exits = context, [], []
        samplers = self.samplers(len(memory.latent_chunks), num_chunks)
        for _ in range(num_chunks):
            with torch.set_grad_enabled(has_grad):
                sampler = next(samplers)
            with torch.no_grad():
                view = sampler.view(memory, lazy=self.lazy)
            contexts.append(memory)
            x0s, denoising = [], sampler.denoise(memory, view, sigmas, noise)
            for step in range(len(sigmas)):
                with torch.set_grad_enabled(has_grad and step == exit_step):
                    x0s.append(next(denoising))
            exits.append(x0s[exit_step])
            with torch.no_grad():
                memory = sampler.commit(memory, x0s[-1].detach(), view)
        return Rollout(tuple(contexts), torch.cat(exits, dim=2), memory)
