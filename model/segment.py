"""One segment of a video: how its prompt takes over from the one before, then chunk by chunk.

Both ways in - `generate` and the sampler node - come through here, so that a chain is the same in either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.memory import Memory
from .sampler import CausalSampler, seeded_noise

ALIKE = 0.02
"""Share of its length by which a prompt's embedding may differ from the same prompt's."""


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
    made: Iterable[Tensor] = (),
) -> Iterator[Memory]:
    """Continue a memory under a prompt; yields the memory after every chunk.

    `sampler_of` takes text embeddings [1, L, 4096]. `change` is one of memory.CHANGES; over the first `blend` chunks,
    at most all but the last, the text moves from the old prompt to the new one. `made` are x0 of chunks that were
    finished in an earlier run: they are committed, not made again, and the memory comes out the same; where it holds
    keys of passes over noise they are made again, to the same bits.
    """
    if blend < 0:
        raise ValueError(f"blend: {blend} chunks; it must be 0 or more")
    before, text = memory.text, used_rows(text_BLC)
    if not text.isfinite().all():
        raise ValueError(
            f"text: NaN or infinity in the embeddings of the prompt {prompt[:60]!r}; check the text encoder's file, or"
            " run it in fp32"
        )
    differs = before is not None and not alike(before, text)
    memory.check_change(change if memory.latent_chunks else "keep")
    if not memory.latent_chunks or (not differs and change in ("recache", "flush")):
        change = "keep"
    if memory.is_compact and change != "recache":
        if before is None:
            raise ValueError("memory: it is compact and does not say under which prompt it was made")
        old = sampler_of(before)
        memory = old.recache(old.prepare(memory))
    sampler = sampler_of(text)
    memory = sampler.prepare(memory.begin(prompt, seed, text, change))
    if change == "recache":
        memory = sampler.recache(memory)
    noise, finished = seeded_noise(seed, memory.latent_size), iter(made)
    blend = min(blend, num_chunks - 1)  # so that it ends under the prompt that the memory says it does
    for number in range(num_chunks):
        now = sampler
        if differs and number < blend:
            now = sampler_of(between(before, text, (number + 1) / (blend + 1)))
        x0 = next(finished, None) if memory.supports("recommit") else None
        memory = (
            now.generate_chunk(memory, sigmas, noise) if x0 is None else now.commit(memory, x0.to(now.network.device))
        )
        yield memory


def used_rows(text_BLC: Tensor) -> Tensor:
    """Text embeddings without the zero rows behind, float32 on the CPU: a prompt looks the same however it is padded."""
    text = text_BLC.detach().float().cpu()
    used = text.ne(0).any(dim=-1).any(dim=0).nonzero()
    return text[:, : int(used[-1]) + 1 if len(used) else 0].clone()


def alike(one_BLC: Tensor, other_BLC: Tensor) -> bool:
    """Whether two embeddings are of the same prompt: encoders round differently from machine to machine."""
    return one_BLC.shape == other_BLC.shape and bool((one_BLC - other_BLC).norm() <= ALIKE * one_BLC.norm())


def between(old_BLC: Tensor, new_BLC: Tensor, share: float) -> Tensor:
    """`share` of the way from one prompt's embeddings to another's, row by row."""
    rows = max(old_BLC.shape[1], new_BLC.shape[1])
    old, new = (F.pad(text, (0, 0, 0, rows - text.shape[1])) for text in (old_BLC, new_BLC))
    return torch.lerp(old, new, share)
