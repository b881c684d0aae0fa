"""Attention mass is what softmax gives, and listening changes nothing."""

import dataclasses

import pytest
import torch

from context_forcing.memory.memory import Memory
from context_forcing.model import attention_mass as probe
from context_forcing.model.attention_mass import AttentionRecorder, attention_mass, mass_per_frame
from context_forcing.model.sampler import seeded_noise
from context_forcing.model.segment import generate_segment
from context_forcing.video.report import PARTS, per_part

SIGMAS = (1.0, 0.6)
SIZES = dict(sink=2, slow=4, fast=4, chunk=2, window=10, slow_similarity_threshold=0.9999)


@pytest.fixture(scope="module")
def sampler_of(net, make_sampler):
    return lambda text: make_sampler(net, text=text, student="me")


def with_attention(sampler, attention):
    return dataclasses.replace(sampler, network=dataclasses.replace(sampler.network, attention=attention))


@pytest.fixture(scope="module")
def begun(sampler_of, empty_memory) -> Memory:
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(100))
    *_, memory = generate_segment(
        sampler_of, empty_memory(**SIZES), text, prompt="a meadow", seed=3, num_chunks=5, sigmas=SIGMAS
    )
    assert all(getattr(memory.slots, part) for part in PARTS)
    return memory


def by_hand(q, k, num_frames):
    """One query, head and key at a time."""
    found = torch.zeros(num_frames, dtype=torch.float64)
    for head in range(q.shape[2]):
        for query in q[0, :, head].double():
            weights = torch.stack([(query @ key / q.shape[3] ** 0.5).exp() for key in k[0, :, head].double()])
            for frame, part in enumerate((weights / weights.sum()).chunk(num_frames)):
                found[frame] += part.sum()
    return found / (q.shape[1] * q.shape[2])


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_mass_is_softmax_by_hand(monkeypatch, at_once):
    monkeypatch.setattr(probe, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 7, 3, 8, generator=generator), torch.randn(1, 20, 3, 8, generator=generator)
    found = mass_per_frame(q, k, 5)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found.double(), by_hand(q, k, 5), rtol=1e-5, atol=1e-6)


def test_a_key_that_is_looked_at_alone_has_all_the_mass():
    q = torch.ones(1, 2, 1, 4)
    k = torch.zeros(1, 6, 1, 4)
    k[:, 3] = 100
    assert mass_per_frame(q, k, 3).tolist() == pytest.approx([0, 1, 0])


def test_every_noise_level_has_shares_that_sum_to_one(sampler_of, begun):
    found = attention_mass(sampler_of, begun, SIGMAS)
    assert tuple(found) == SIGMAS
    for frames in found.values():
        assert len(frames) == len(begun.slots.all) + 2 and min(frames) > 0
        assert sum(frames) == pytest.approx(1, abs=1e-5)
        assert sum(per_part(begun, frames).values()) == pytest.approx(1, abs=1e-5)
    assert found[1.0] != found[0.6]


def test_it_is_the_attention_of_the_chunk_that_comes_next(sampler_of, begun, monkeypatch):
    """What every self-attention of the next chunk is given, per layer, against a softmax by hand."""
    given = []

    def note(q, k, v, bias=None):
        given.append((q, k.clone(), bias))  # the next pass writes to the same place
        return sampler.network.attention(q, k, v, bias)

    sampler = sampler_of(begun.text)
    noting = with_attention(sampler, note)
    list(noting.denoise(begun, sampler.view(begun), SIGMAS, seeded_noise(3, begun.latent_size)))
    num_frames = len(begun.slots.all) + 2
    own = [(q, k) for q, k, bias in given if bias is None]
    assert len(given) == 2 * len(own) == 2 * len(SIGMAS) * 2, "two layers: self and text"
    expected = [torch.stack([by_hand(q, k, num_frames) for q, k in own[i : i + 2]]).mean(0) for i in (0, 2)]
    found = attention_mass(sampler_of, begun, SIGMAS)
    for sigma, frames in zip(SIGMAS, expected):
        torch.testing.assert_close(torch.tensor(found[sigma]).double(), frames, rtol=1e-4, atol=1e-6)


def test_listening_changes_neither_memory_nor_chunk(sampler_of, begun, same_memory):
    before = dataclasses.replace(begun)
    attention_mass(sampler_of, begun, SIGMAS)
    assert same_memory(begun, before)
    sampler, noise = sampler_of(begun.text), seeded_noise(3, begun.latent_size)
    listener = AttentionRecorder(sampler.network.attention, sampler.text, len(begun.slots.all) + 2)
    chunks = [
        each.generate_chunk(begun, SIGMAS, noise).latent_chunks[-1]
        for each in (sampler, with_attention(sampler, listener))
    ]
    assert torch.equal(*chunks)


def test_a_compact_memory_is_made_whole_first(sampler_of, begun):
    exact, compact = (attention_mass(sampler_of, each, SIGMAS)[1.0] for each in (begun, begun.compact()))
    assert len(compact) == len(exact) and sum(compact) == pytest.approx(1, abs=1e-5)


def test_a_compact_memory_of_several_prompts_is_made_whole_as_before_the_next_chunk(sampler_of, empty_memory):
    """Policy recall computes the keys of each frame under the frame's own prompt."""
    memory = empty_memory(**{**SIZES, "policy": "recall"})
    for seed in (100, 101):
        text = 3 * torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))
        *_, memory = generate_segment(sampler_of, memory, text, prompt="", seed=3, num_chunks=3, sigmas=SIGMAS)
    compact = memory.compact()
    expected = attention_mass(sampler_of, sampler_of(memory.text).restore(compact), SIGMAS)
    assert attention_mass(sampler_of, compact, SIGMAS) == expected
    recached = attention_mass(sampler_of, sampler_of(memory.text).recache(compact), SIGMAS)
    assert recached != expected


def test_a_memory_with_nothing_on_it_is_refused(sampler_of, empty_memory):
    with pytest.raises(ValueError, match="memory: it has no segment"):
        attention_mass(sampler_of, empty_memory(**SIZES), SIGMAS)


def test_another_students_memory_is_refused(sampler_of, begun):
    with pytest.raises(ValueError, match="another student"):
        attention_mass(sampler_of, dataclasses.replace(begun, student="you"), SIGMAS)
