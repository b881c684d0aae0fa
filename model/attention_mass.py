"""Where the next chunk attends: the share of softmax mass of every frame in its self-attention.

Shapes: B batch, S query tokens, K key tokens, N heads, E head dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..memory.memory import Memory
from .attention import Attention
from .causal import TextContext
from .sampler import CausalSampler, seeded_noise

SCORES_AT_ONCE = 2**24
"""Largest number of attention scores held at once, so that a 1.3B student needs 64 MB."""


@dataclass
class AttentionRecorder:
    """An attention function that records the softmax mass of every key frame in self-attention."""

    attention: Attention
    text: TextContext
    num_frames: int
    """Key frames of self-attention: the remembered ones and the chunk's."""
    shares: list[Tensor] = field(default_factory=list)
    """[num_frames] of each call, float32."""

    def __call__(self, q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        if not any(k_BKNE is keys for keys in self.text.keys):
            self.shares.append(mass_per_frame(q_BSNE, k_BKNE, self.num_frames))
        return self.attention(q_BSNE, k_BKNE, v_BKNE, bias)


def mass_per_frame(q_BSNE: Tensor, k_BKNE: Tensor, num_frames: int) -> Tensor:
    """softmax(q k^T / sqrt(E)) summed over the keys of a frame, averaged over queries and heads, [num_frames]."""
    keys = k_BKNE.float()
    num_keys, num_heads, head_dim = keys.shape[1:]
    total = keys.new_zeros(num_frames)
    for q in q_BSNE.float().split(max(1, SCORES_AT_ONCE // (num_heads * num_keys)), dim=1):
        scores = torch.einsum("bsne,bkne->bnsk", q, keys) * head_dim**-0.5
        total += scores.softmax(dim=-1).unflatten(-1, (num_frames, -1)).sum(dim=(0, 1, 2, 4))
    return total / (q_BSNE.shape[0] * q_BSNE.shape[1] * num_heads)


@torch.inference_mode()
def attention_mass(
    sampler_of: Callable[[Tensor], CausalSampler], memory: Memory, sigmas: Sequence[float]
) -> dict[float, tuple[float, ...]]:
    """Noise level -> share of the next chunk's attention on each frame: those of `slots.all`, then the chunk's.

    The chunk is the next one under the prompt and seed of the last segment; it is not kept. Shares are averaged over
    layers, heads and tokens. Raises ValueError for a memory without a segment, and if its store does not support it.
    """
    if memory.text is None or not memory.latent_chunks:
        raise ValueError("memory: it has no segment; generate one before an attention report")
    memory.check_supports("attention report")
    sampler = sampler_of(memory.text)
    memory = sampler.prepare(memory)
    if memory.is_compact:
        memory = sampler.restore(memory)  # as before the next chunk (model/segment.py)
    network, num_frames = sampler.network, len(memory.slots.all) + memory.config.chunk
    recorder = AttentionRecorder(network.attention, sampler.text, num_frames)
    recording = dataclasses.replace(sampler, network=dataclasses.replace(network, attention=recorder))
    noise, mass = seeded_noise(memory.segments[-1].seed, memory.latent_size), {}
    for sigma, _ in zip(sigmas, recording.denoise(memory, sampler.view(memory), sigmas, noise)):
        mass[sigma] = tuple(torch.stack(recorder.shares).mean(dim=0).tolist())
        recorder.shares.clear()
    return mass
