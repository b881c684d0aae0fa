"""One segment of a video: the prompt change, then chunk by chunk. The command line and the nodes both use it."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.fields import quoted
from ..memory.memory import Memory
from .causal import without_padding
from .sampler import CausalSampler, seeded_noise

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
) -> Iterator[Memory]:
    """Continue a memory under a prompt; yields the memory after every chunk.

    `sampler_of` makes a sampler from text embeddings [1, L, 4096]. `change` is one of memory.CHANGES. Over the first
    `blend` chunks, at most all but the last, the text moves from the old prompt to the new one. `finished` are x0 of
    chunks of an interrupted run: they are committed if the memory supports it, else generated again. The memories are
    the same bit for bit.

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
    if memory.is_compact and change != "recache":
        if before is None:
            raise ValueError("memory: it is compact and has no prompt for its keys; use an exact one")
        old = sampler_of(before)
        memory = old.restore(old.prepare(memory))
    sampler = sampler_of(text)
    memory = sampler.prepare(memory.begin(prompt, seed, text, change))
    if change == "recache":
        memory = sampler.recache(memory)
    noise, chunks = seeded_noise(seed, memory.latent_size), iter(finished if memory.supports("recommit") else ())
    blend = min(blend, num_chunks - 1)  # the segment ends under its own prompt
    for number in range(num_chunks):
        current = sampler
        if before is not None and differs and number < blend:
            current = sampler_of(blend_text(before, text, (number + 1) / (blend + 1)))
        x0 = next(chunks, None)
        if x0 is None:
            memory = current.generate_chunk(memory, sigmas, noise)
        else:
            memory = current.commit(memory, x0.to(current.network.device))
        yield memory


def used_rows(text_BLC: Tensor) -> Tensor:
    """Text embeddings without the zero rows at the end, float32, on the CPU."""
    return without_padding(text_BLC.detach().float().cpu()).clone()


def same_prompt(one_BLC: Tensor, other_BLC: Tensor) -> bool:
    """Whether two embeddings are of the same prompt. Encoders round differently on different machines."""
    return one_BLC.shape == other_BLC.shape and bool((one_BLC - other_BLC).norm() <= SAME_PROMPT * one_BLC.norm())


def blend_text(old_BLC: Tensor, new_BLC: Tensor, share: float) -> Tensor:
    """Embeddings between two prompts, row by row: `old` at share 0, `new` at share 1."""
    rows = max(old_BLC.shape[1], new_BLC.shape[1])
    old, new = (F.pad(text, (0, 0, 0, rows - text.shape[1])) for text in (old_BLC, new_BLC))
    return torch.lerp(old, new, share)
