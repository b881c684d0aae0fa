"""Every pass enters the network and its blocks through one runner."""

import pytest
import torch

from context_forcing.memory import MemoryView
from context_forcing.model.causal import causal_forward, embed_text
from context_forcing.model.network import Network

SIZE = (16, 4, 6)


@pytest.fixture
def entered(net):
    """(a network, what its runner ran: "net" or the number of a block)"""
    names, entered = {net: "net"} | {block: number for number, block in enumerate(net.blocks)}, []

    def run(module, function, *args):
        entered.append(names[module])
        return function(module, *args)

    return Network(net, torch.device("cpu"), torch.float32, run=run, on_pass=lambda: entered.append("pass")), entered


def test_the_runner_enters_the_network_then_its_blocks(net, entered):
    network, seen = entered
    text = network.embed_text(torch.randn(1, 5, net.config.text_dim))
    assert seen == ["net", 0, 1]
    seen.clear()
    x = torch.randn(1, 16, 3, 4, 6)
    flow = network.flow(x, 0.5, text, network.attend(MemoryView(), 3, SIZE))
    assert seen == ["pass", "net", 0, 1] and flow.shape == x.shape and flow.dtype == torch.float32


def test_noise_levels_per_frame(net, entered):
    """One level for all frames, the first frames clean, or a level for each frame: as timesteps of the pass."""
    network, _ = entered
    rows, x = torch.randn(1, 5, net.config.text_dim), torch.randn(1, 16, 3, 4, 6)
    text, attend = embed_text(net, rows), network.attend(MemoryView(), 3, SIZE)
    expected = lambda *timesteps: causal_forward(net, x, torch.tensor([timesteps]), text, attend)
    assert torch.equal(network.flow(x, 0.5, text, attend), expected(500.0, 500.0, 500.0))
    assert torch.equal(network.flow(x, 0.5, text, attend, num_clean=2), expected(0.0, 0.0, 500.0))
    sigma = torch.tensor([[0.25, 0.5, 0.75]])
    assert torch.equal(network.flow(x, sigma, text, attend), expected(250.0, 500.0, 750.0))


def test_sizes_come_from_the_modules(make_net):
    network = Network(make_net(num_layers=3), torch.device("cpu"), torch.float32)
    assert (network.num_layers, network.num_heads, network.head_dim, network.grid((16, 6, 10))) == (3, 2, 32, (3, 5))
