"""Keys and values of prompts: computed once per prompt, bounded, and never those of other weights."""

import dataclasses

import pytest
import torch

from context_forcing.model.config import StudentCard
from context_forcing.model.network import Network
from context_forcing.model.sampler import make_sampler, seeded_noise, working_bytes
from context_forcing.model.segment import generate_segment
from context_forcing.model.text_cache import TextCache

SIGMAS = (1.0, 0.6)
SIZES = dict(sink=2, slow=4, fast=4, chunk=2, window=10, slow_similarity_threshold=0.9999)
CPU = torch.device("cpu")


def text(seed, rows=5):
    return torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(100 + seed))


@pytest.fixture(scope="module")
def net(make_net):
    """A prompt of full length has the bytes of ten short ones."""
    return make_net(text_len=60)


@pytest.fixture
def passes(net):
    """A list that grows with every pass through the text embedding."""
    calls = []
    handle = net.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def tell(network, memory, prompts, **settings):
    """The memory after a segment of two chunks under each prompt; embeddings come anew, as from a text encoder."""
    for number, prompt in enumerate(prompts):
        sampler_of = lambda rows: make_sampler(network, StudentCard(), rows)
        segment = dict(prompt=str(prompt), seed=3, num_chunks=2, sigmas=SIGMAS, **(settings if number else {}))
        *_, memory = generate_segment(sampler_of, memory, text(prompt), **segment)
    return memory


@pytest.mark.parametrize(
    "sizes, settings, once, at_least",
    [
        (dict(), dict(), 3, 6),
        (dict(), dict(change="recache"), 3, 6),
        (dict(), dict(blend=1), 3 + 4, 6 + 5),  # one to nought is blended twice
        (dict(policy="recall"), dict(), 3, 7),
    ],
)
def test_each_prompt_is_embedded_once(net, empty_memory, passes, same_memory, sizes, settings, once, at_least):
    """Six segments under three prompts. Policy recall also reads frames of earlier prompts."""
    prompts, made, counts = [0, 1, 0, 2, 1, 0], [], []
    for texts in (TextCache(), None):
        network = Network(net, CPU, torch.float32, texts=texts)
        made.append(tell(network, empty_memory(**SIZES | sizes), prompts, **settings))
        counts.append(len(passes))
        passes.clear()
    assert same_memory(*made)
    assert counts[0] == once and counts[1] >= at_least


def test_the_oldest_prompts_leave(net, passes):
    """As many bytes as one prompt of full length, whatever the number of prompts."""
    network = Network(net, CPU, torch.float32, texts=TextCache())
    full = network.embed_text(text(0, rows=60))
    assert full.num_bytes == network.prompt_bytes == network.texts.num_bytes
    for number in range(12):
        network.embed_text(text(number))
        assert 0 < network.texts.num_bytes <= network.prompt_bytes
    passes.clear()
    network.embed_text(text(11))
    network.embed_text(text(10))
    assert not passes, "the last ones are there"
    network.embed_text(text(0, rows=60))
    assert len(passes) == 1
    assert network.texts.num_bytes == network.prompt_bytes, "all others have left"


def test_the_memory_plan_counts_them(net, make_net, empty_memory):
    """All prompts together have at most the bytes that the plan has for the text."""
    longer, memory = make_net(text_len=80), empty_memory(**SIZES)
    plans, limits = [], []
    for each in (net, longer):
        network = Network(each, CPU, torch.float32, texts=TextCache())
        for number in range(20):
            network.embed_text(text(number))
        plans.append(working_bytes(network, memory))
        limits.append(network.prompt_bytes)
        assert 0.8 * network.prompt_bytes < network.texts.num_bytes <= network.prompt_bytes
    assert plans[1] - plans[0] == limits[1] - limits[0] > 0


@torch.no_grad()
def test_no_keys_of_other_weights(net, make_net):
    """Networks with other weights, or in another dtype, may share a cache by mistake."""
    texts, rows = TextCache(), text(0)
    keys = lambda net, dtype=torch.float32: Network(net, CPU, dtype, texts=texts).embed_text(rows).keys[0]
    other = make_net(1)
    first = keys(net)
    assert keys(net) is first
    assert not torch.allclose(keys(other), first, atol=1e-3)
    assert torch.equal(keys(other), Network(other, CPU, torch.float32).embed_text(rows).keys[0])
    assert keys(make_net().bfloat16(), torch.bfloat16).dtype == torch.bfloat16


def test_a_text_that_its_owner_changes_is_another_text(net):
    network, rows = Network(net, CPU, torch.float32, texts=TextCache()), text(0)
    before = network.embed_text(rows)
    rows += 1
    after = network.embed_text(rows)
    assert not torch.allclose(after.values[0], before.values[0], atol=1e-3)
    assert torch.equal(after.values[0], Network(net, CPU, torch.float32).embed_text(text(0) + 1).values[0])


def test_weights_that_get_gradients_are_not_cached(make_net):
    net = make_net().requires_grad_(True)
    network = Network(net, CPU, torch.float32, texts=TextCache())
    for _ in range(2):
        network.embed_text(text(0)).keys[0].sum().backward()  # twice through one graph would raise
    assert network.texts.num_bytes == 0
    with torch.no_grad():
        assert not network.embed_text(text(0)).keys[0].requires_grad
    assert network.texts.num_bytes > 0
    assert network.embed_text(text(0)).keys[0].requires_grad, "what is cached has no graph"


def test_a_sampler_keeps_its_text_when_it_has_left(net, empty_memory):
    network = Network(net, CPU, torch.float32, texts=TextCache())
    sampler = make_sampler(network, StudentCard(), text(0, rows=60))
    for number in range(3):
        sampler.under(text(number, rows=60))
    noise = seeded_noise(3, (16, 4, 6))
    alone = make_sampler(dataclasses.replace(network, texts=None), StudentCard(), text(0, rows=60))
    one, other = (each.generate_chunk(empty_memory(**SIZES), SIGMAS, noise) for each in (sampler, alone))
    assert torch.equal(one.latent_chunks[0], other.latent_chunks[0])
