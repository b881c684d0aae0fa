"""Where the next chunk looks: its self-attention, listened to while the one forward pass makes it.

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
"""Attention scores held at once, so that a 1.3B student's need 64 MB and not 7 GB."""


@dataclass
class AttentionRecorder:
    """An attention function that also notes what share of softmax mass every key frame got, once per layer."""

    attention: Attention
    text: TextContext
    num_frames: int
    """Key frames of a chunk's self-attention: the remembered ones and its own."""
    shares: list[Tensor] = field(default_factory=list)
    """[num_frames] of each call, float32."""

    def __call__(self, q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        if not any(k_BKNE is keys for keys in self.text.keys):
            self.shares.append(mass_per_frame(q_BSNE, k_BKNE, self.num_frames))
        return self.attention(q_BSNE, k_BKNE, v_BKNE, bias)


def mass_per_frame(q_BSNE: Tensor, k_BKNE: Tensor, num_frames: int) -> Tensor:
    """softmax(q k^T / sqrt(E)), summed over the keys of a frame, mean over queries and heads, [num_frames]; sums to 1."""
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
    """Noise level -> share of the next chunk's attention on each frame it sees: `slots.all`, then its own.

    The chunk is the one that would come next under the prompt and seed of the last segment, step by step; it is not
    kept. Mean over layers, heads and the chunk's tokens. Raises ValueError for a memory without a
    segment, or of policy released.
    """
    if memory.text is None or not memory.latent_chunks:
        raise ValueError("memory: nothing was made on it yet; attention is that of the chunk after a segment")
    memory.check_supports("attention report")
    sampler = sampler_of(memory.text)
    memory = sampler.prepare(memory)
    if memory.is_compact:
        memory = sampler.recache(memory)
    network, num_frames = sampler.network, len(memory.slots.all) + memory.config.chunk
    listener = AttentionRecorder(network.attention, sampler.text, num_frames)
    listening = dataclasses.replace(sampler, network=dataclasses.replace(network, attention=listener))
    noise, found = seeded_noise(memory.segments[-1].seed, memory.latent_size), {}
    for sigma, _ in zip(sigmas, listening.denoise(memory, sampler.view(memory), sigmas, noise)):
        found[sigma] = tuple(torch.stack(listener.shares).mean(dim=0).tolist())
        listener.shares.clear()
    return found
