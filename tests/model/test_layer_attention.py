"""Rollouts on the released weights' memory keep the promises of all others."""

import pytest
import torch

from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.sampler import COMMIT_ATTENDS, KV_PLACEMENTS, seeded_noise
from context_forcing.model.segment import generate_segment

SIGMAS = (1.0, 0.9375, 0.625)
SMALL = dict(sink=2, slow=4, fast=4, chunk=2, window=10, policy="released")


def roll(sampler, memory, num_chunks, seed=5):
    for memory in sampler.rollout(memory, num_chunks, sigmas=SIGMAS, noise=seeded_noise(seed, memory.latent_size)):
        pass
    return memory


@pytest.fixture(scope="module")
def nine_chunks(net, make_sampler, empty_memory):
    memory = roll(make_sampler(net), empty_memory(**SMALL), 9)
    assert all(len(layer.frames) == 10 and layer.num_slow == 4 for layer in memory.store.layers)
    return memory


@pytest.mark.parametrize("parts", [(2, 7), (1,) * 9], ids=str)
def test_splitting_changes_nothing(net, make_sampler, empty_memory, same_memory, nine_chunks, tmp_path, parts):
    memory = empty_memory(**SMALL)
    for part in parts:
        memory = roll(make_sampler(net), memory, part)
        save_memory(tmp_path / "memory.safetensors", memory)
        memory = load_memory(tmp_path / "memory.safetensors")
    assert same_memory(memory, nine_chunks)


def test_two_futures_of_one_memory(net, make_sampler, same_memory, nine_chunks):
    before = [tensor.clone() for tensor in nine_chunks.tensors()]
    one, other = roll(make_sampler(net), nine_chunks, 2), roll(make_sampler(net), nine_chunks, 2, seed=6)
    assert all(map(torch.equal, before, nine_chunks.tensors())), "neither touched what they began from"
    assert same_memory(one, roll(make_sampler(net), nine_chunks, 2)) and not same_memory(one, other)


def test_chunks_of_an_earlier_run_are_made_again(net, make_sampler, empty_memory, same_memory):
    """Committing them would leave no keys of passes over noise."""
    text = torch.randn(1, 4, net.config.text_dim, generator=torch.Generator().manual_seed(1))
    go_on = lambda made: list(
        generate_segment(
            lambda text: make_sampler(net), empty_memory(**SMALL), text, prompt="", seed=5, num_chunks=6, sigmas=SIGMAS,
            finished=made,
        )
    )  # fmt: skip
    whole = go_on(())
    assert same_memory(go_on(whole[3].latent_chunks)[-1], whole[-1])


def test_what_the_commit_pass_sees(net, make_sampler, empty_memory, nine_chunks):
    keys = set()
    for choice in COMMIT_ATTENDS:
        sampler = make_sampler(net, commit_attends=choice)
        memory = roll(sampler, nine_chunks, 1)
        assert torch.equal(memory.latent_chunks[-1], roll(make_sampler(net), nine_chunks, 1).latent_chunks[-1]), (
            "denoising sees all"
        )
        keys.add(tuple(memory.store.layers[-1].entries[-1].keys.flatten()[-9:].tolist()))
        first, plain = roll(sampler, empty_memory(**SMALL), 1), roll(make_sampler(net), empty_memory(**SMALL), 1)
        assert torch.equal(first.store.layers[-1].entries[-1].keys, plain.store.layers[-1].entries[-1].keys), (
            "a chunk sees itself"
        )
    assert len(keys) == len(COMMIT_ATTENDS)


def test_itself_writes_what_an_empty_memory_would(net, make_sampler, empty_memory, nine_chunks):
    """Keys are kept before rotation, and attention depends on relative positions only."""
    x0 = torch.randn(1, 16, 2, 4, 6)
    newest = lambda memory: [
        getattr(entry, part)
        for layer in memory.store.layers
        for entry in layer.entries[-2:]
        for part in ("keys", "values")
    ]
    alone = newest(make_sampler(net).commit(empty_memory(**SMALL), x0))
    for choice in COMMIT_ATTENDS:
        written = newest(make_sampler(net, commit_attends=choice).commit(nine_chunks, x0))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(written, alone, strict=True))
        assert same == (choice == "itself")


@pytest.mark.parametrize("layout", KV_PLACEMENTS)
def test_where_it_lies_changes_nothing(net, make_sampler, empty_memory, same_memory, nine_chunks, layout):
    assert same_memory(roll(make_sampler(net, kv_placement=layout), empty_memory(**SMALL), 9), nine_chunks)
