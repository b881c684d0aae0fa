"""The ports of other loops compute what ours computes wherever they attend to the same frames."""

import pytest
import torch

from context_forcing.benchmark.ports import ComfyUILoop, LoopSettings, SelfForcingLoop
from context_forcing.memory import MemoryConfig
from context_forcing.memory import empty_memory as new_empty_memory
from context_forcing.model.flow import warped_sigmas
from context_forcing.model.sampler import seeded_noise

LATENT_SIZE = (16, 4, 6)
SIGMAS = warped_sigmas((1000, 500), 5.0)


@pytest.fixture
def text(net):
    return torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def port(net, text, make_sampler):
    """(kind, window, seed) -> a port over the same weights and text."""

    def make(kind, window, seed=5):
        network, noise = make_sampler(net, text=text).network, seeded_noise(seed, LATENT_SIZE)
        settings = dict(network=network, text_BLC=text, latent_size=LATENT_SIZE, sigmas=SIGMAS, noise=noise)
        return kind(LoopSettings(chunk=3, window=window, **settings))

    return make


def ours(sampler, num_chunks, **config):
    """x0 of every chunk."""
    memory = new_empty_memory(MemoryConfig(policy="fifo", slow=0, **config), LATENT_SIZE)
    for memory in sampler.rollout(memory, num_chunks, sigmas=SIGMAS, noise=seeded_noise(5, LATENT_SIZE)):
        pass
    return memory.latent_chunks


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ComfyUILoop, SelfForcingLoop])
def test_until_the_window_is_full(net, text, make_sampler, port, kind):
    expected = ours(make_sampler(net, text=text), 7, sink=3, fast=18)
    loop, other = port(kind, 21), port(kind, 21, seed=6)
    for x0 in expected:
        assert difference(loop.chunk(), x0) < 1e-5 < 1e-2 < difference(other.chunk(), x0)


@torch.inference_mode()
def test_a_rolling_window(net, text, make_sampler, port):
    """Self-Forcing's positions grow and ours are ranks, but only their differences count."""
    expected = ours(make_sampler(net, text=text), 7, sink=0, fast=9, window=9)
    longer = ours(make_sampler(net, text=text), 7, sink=0, fast=12, window=12)
    loop = port(SelfForcingLoop, 9)
    for number, (x0, other) in enumerate(zip(expected, longer)):
        made = loop.chunk()
        assert difference(made, x0) < 1e-5
        assert number < 3 or difference(made, other) > 1e-3


@torch.inference_mode()
def test_every_chunk_of_comfyui_is_the_last_of_its_video(port):
    loop = port(ComfyUILoop, 9)
    for _ in range(2):
        loop.chunk()
    last = [loop.chunk() for _ in range(3)]
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[2])


def test_positions_of_self_forcing_end(port):
    loop = port(SelfForcingLoop, 9)
    loop.first_frame = 1023
    with pytest.raises(ValueError, match=r"^chunks: Self-Forcing's table of positions ends after 341 chunks; measure"):
        loop.chunk()
