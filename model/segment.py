"""One segment of a video: the prompt change, then chunk by chunk. The command line and the nodes both use it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.fields import quoted
from ..memory.memory import Memory
from .causal import without_padding
from .fallback import NO_FALLBACK, Fallback
from .sampler import CausalSampler, Noise, seeded_noise

SAME_PROMPT = 0.02
"""Largest difference of two embeddings of the same prompt, as a share of their norm."""


def generate_segment(
    sampler_of: Callable[[Tensor], CausalSampler],
    memory: Memory,
    text_BLC: Tensor,
    *,
    prompt: str,
    seed: int,
    num_chunks: int,
    sigmas: Sequence[float],
    change: str = "keep",
    blend: int = 0,
    finished: Iterable[Tensor] = (),
    fallback: Fallback = NO_FALLBACK,
) -> Iterator[Memory]:
    """Continue a memory under a prompt; yields the memory after every chunk.

    `sampler_of` makes a sampler from text embeddings [1, L, 4096]. `change` is one of memory.CHANGES. Over the first
    `blend` chunks, at most all but the last, the text moves from the old prompt to the new one. `finished` are x0 of
    chunks of an interrupted run: they are committed if the memory supports it, else generated again. The memories are
    the same bit for bit. `fallback` says what an out-of-memory does; one for all segments of a video.

    Raises ValueError for a negative blend, for a change that the memory does not support, and for text that is not
    finite.
    """
    if blend < 0:
        raise ValueError(f"blend: {blend} chunks; it must be 0 or more")
    before, text = memory.text, used_rows(text_BLC)
    if not text.isfinite().all():
        problem = f"text: NaN or infinity in the embeddings of the prompt {quoted(prompt)}"
        raise ValueError(f"{problem}; check the text encoder's file, or run it in fp32")
    differs = before is not None and not same_prompt(before, text)
    memory.check_change(change if memory.latent_chunks else "keep")
    if not memory.latent_chunks or (not differs and change in ("recache", "flush")):
        change = "keep"
    if memory.is_compact and change != "recache" and before is None:
        raise ValueError("memory: it is compact and has no prompt for its keys; use an exact one")
    placed = lambda text: fallback.placed(sampler_of(text))
    sampler, memory = fallback.attempt(functools.partial(_begin, placed, memory, text, prompt, seed, change), memory)
    noise, chunks = seeded_noise(seed, memory.latent_size), iter(finished if memory.supports("recommit") else ())
    blend = min(blend, num_chunks - 1)  # the segment ends under its own prompt

    def sampler_at(number: int) -> CausalSampler:
        if before is None or not differs or number >= blend:
            return fallback.placed(sampler)
        return placed(blend_text(before, text, (number + 1) / (blend + 1)))

    for number in range(num_chunks):
        current, x0 = functools.partial(sampler_at, number), next(chunks, None)
        memory = fallback.attempt(functools.partial(_chunk, current, memory, x0, sigmas, noise), memory)
        yield memory


def _begin(
    sampler_of: Callable[[Tensor], CausalSampler], memory: Memory, text: Tensor, prompt: str, seed: int, change: str
) -> tuple[CausalSampler, Memory]:
    """The sampler of a segment, and a memory that is ready for its first chunk."""
    if memory.is_compact and change != "recache":
        assert memory.text is not None, "generate_segment"
        old = sampler_of(memory.text)
        memory = old.restore(old.prepare(memory))
    sampler = sampler_of(text)
    memory = sampler.prepare(memory.begin(prompt, seed, text, change))
    return sampler, sampler.recache(memory) if change == "recache" else memory


def _chunk(
    sampler_of: Callable[[], CausalSampler], memory: Memory, x0: Tensor | None, sigmas: Sequence[float], noise: Noise
) -> Memory:
    """A memory with one chunk more: `x0` of an earlier run, or a new one."""
    sampler = sampler_of()
    if x0 is None:
        return sampler.generate_chunk(memory, sigmas, noise)
    return sampler.commit(memory, x0.to(sampler.network.device))


def used_rows(text_BLC: Tensor) -> Tensor:
    """Text embeddings without the zero rows at the end, float32, on the CPU."""
    return without_padding(text_BLC.detach().float().cpu()).clone()


def same_prompt(one_BLC: Tensor, other_BLC: Tensor) -> bool:
    """Whether two embeddings are of the same prompt. Encoders round differently on different machines."""
    return one_BLC.shape == other_BLC.shape and bool((one_BLC - other_BLC).norm() <= SAME_PROMPT * one_BLC.norm())


def blend_text(old_BLC: Tensor, new_BLC: Tensor, share: float) -> Tensor:
    """Embeddings between two prompts, row by row: `old` at share 0, `new` at share 1.

    Raises ValueError for embeddings of different widths.
    """
    if old_BLC.shape[2] != new_BLC.shape[2]:
        raise ValueError(f"blend: embeddings of widths {old_BLC.shape[2]} and {new_BLC.shape[2]}; use one text encoder")
    rows = max(old_BLC.shape[1], new_BLC.shape[1])
    old, new = (F.pad(text, (0, 0, 0, rows - text.shape[1])) for text in (old_BLC, new_BLC))
    return torch.lerp(old, new, share)
