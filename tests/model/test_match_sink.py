"""Chunks whose channels are matched to the sink (match_sink of a card, for LiveWan)."""

import pytest
import torch

from context_forcing.model.config import StudentCard
from context_forcing.model.sampler import seeded_noise

SIGMAS = (1.0, 0.5)


def roll(sampler, memory, num_chunks):
    for memory in sampler.rollout(memory, num_chunks, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)):
        pass
    return memory


def test_channels_of_a_chunk_become_those_of_the_sink(net, make_sampler, empty_memory, same_memory):
    """Before the commit pass, so that keys fit; not while start frames are part of the chunk."""
    clip = 2 * torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(1)) + 3
    settings = dict(sink=6, slow=0, fast=6, window=12, policy="fifo")
    sampler, begun = make_sampler(net, match_sink=1.0), empty_memory(**settings).with_start_latents(clip)
    after = roll(sampler, begun, 3)
    for chunk in after.latent_chunks[2:]:
        assert torch.allclose(chunk.mean((0, 2, 3, 4)), clip.mean((0, 2, 3, 4)), atol=1e-4)
        assert torch.allclose(chunk.std((0, 2, 3, 4)), clip.std((0, 2, 3, 4)), atol=1e-4)
    plain = roll(make_sampler(net), begun, 3)
    assert not torch.allclose(plain.latent_chunks[2].mean((0, 2, 3, 4)), clip.mean((0, 2, 3, 4)), atol=0.1)
    assert same_memory(roll(sampler, roll(sampler, begun, 1), 2), after)
    again = sampler.commit(roll(sampler, begun, 2), after.latent_chunks[4])
    assert same_memory(again, after), "keys are those of the matched latents"
    image = empty_memory(**settings).with_start_latents(clip[:, :, :1])
    first = [roll(some, image, 1).latent_chunks[0] for some in (sampler, make_sampler(net))]
    assert torch.equal(*first) and torch.equal(first[0][:, :, :1], clip[:, :, :1])


@pytest.mark.parametrize("share", [-0.1, 1.5, "1", True])
def test_what_is_no_share(share):
    with pytest.raises(ValueError, match="match_sink: .* is not a share"):
        StudentCard(match_sink=share)
