"""The student's own rollout, with gradients in its target (method.md 4.2, 5.4).

Everything goes through the sampler that generates videos. The context is made without gradients; of every target
chunk one denoising step, the exit step, has them, against memories that are never changed afterwards. What is kept
for the backward pass depends on the target's length, not on the rollout's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...memory.memory import Memory
from ...model.config import StudentCard
from ...model.network import Network
from ...model.sampler import CausalSampler, Noise, SamplerOptions, make_sampler


@dataclass(frozen=True)
class Rollout:
    """A context the student made, and what it went on with."""

    contexts: tuple[Memory, ...]
    """As it stood when each chunk of the target began."""
    target_BCTHW: Tensor
    """x0 of the target at the exit step."""
    memory: Memory
    """At the end."""

    def windows(self, num_chunks: int) -> Iterator[tuple[Memory, Tensor]]:
        """The target in pieces of `num_chunks`, each with the memory it began with."""
        frames = num_chunks * self.memory.config.chunk
        yield from zip(self.contexts[::num_chunks], self.target_BCTHW.split(frames, dim=2))


@dataclass(frozen=True)
class Student:
    """A causal network under the texts of a rollout, [G, L, 4096]: one for all chunks, or one a chunk."""

    network: Network
    text_GLC: Tensor
    recompute: bool = False
    """Whether the network recomputes blocks for the backward pass; then what a chunk saw is laid out anew, too."""

    def sampler(self, chunk: int) -> CausalSampler:
        """The network under a chunk's text.

        It does not check for values that are not finite: the update they lead to is dropped (trainee.py), and the
        search for them would be one rank's alone.
        """
        text_BLC = self.text_GLC[min(chunk, len(self.text_GLC) - 1)][None]
        return make_sampler(self.network, StudentCard(), text_BLC, SamplerOptions(check_finite=False))

    @torch.no_grad()
    def encode_clip(self, memory: Memory, latents_BCTHW: Tensor) -> Memory:
        """Remember given clean latents, chunk by chunk."""
        chunk = memory.config.chunk
        for first in range(0, latents_BCTHW.shape[2], chunk):
            memory = self.sampler(len(memory.latent_chunks)).commit(memory, latents_BCTHW[:, :, first : first + chunk])
        return memory

    @torch.no_grad()
    def rollout(self, memory: Memory, num_chunks: int, sigmas: Sequence[float], noise: Noise) -> Memory:
        """Continue a memory by whole chunks, without gradients."""
        for _ in range(num_chunks):
            memory = self.sampler(len(memory.latent_chunks)).generate_chunk(memory, sigmas, noise)
        return memory

    def target(
        self,
        context: Memory,
        num_chunks: int,
        exit_step: int,
        sigmas: Sequence[float],
        noise: Noise,
        with_gradient: bool,
    ) -> Rollout:
        """Continue a context by the target. Chunks are denoised to the end and committed clean, without gradients
        (open choice 5); what is scored, and has gradients, is x0 at `exit_step`."""
        memory, contexts, exits = context, [], []
        for _ in range(num_chunks):
            with torch.set_grad_enabled(with_gradient):
                sampler = self.sampler(len(memory.latent_chunks))
            with torch.no_grad():
                view = sampler.view(memory, lazy=self.recompute)
            contexts.append(memory)
            denoising = sampler.denoise(memory, view, sigmas, noise)
            for step in range(len(sigmas)):
                with torch.set_grad_enabled(with_gradient and step == exit_step):
                    x0 = next(denoising)
                if step == exit_step:
                    exits.append(x0)
            with torch.no_grad():
                memory = sampler.commit(memory, x0.detach(), view)
        return Rollout(tuple(contexts), torch.cat(exits, dim=2), memory)
