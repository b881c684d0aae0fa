import pytest
import torch

from context_forcing.memory import Memory, MemoryConfig
from context_forcing.memory import empty_memory as memory_of_kind
from context_forcing.model.causal import embed_text
from context_forcing.model.config import WanConfig
from context_forcing.model.sampler import CausalSampler
from context_forcing.model.wan import Block, Head, WanModel

# The networks here are so small that threads only wait for each other.
torch.set_num_threads(1)

LATENT_SIZE = (16, 4, 6)
"""2 x 3 tokens a frame: not square, so that rows and columns cannot be mistaken for each other."""


@pytest.fixture(autouse=True)
def _no_global_randomness():
    torch.manual_seed(0)


def _make_net(seed: int = 0, **sizes) -> WanModel:
    """A tiny random network in which every part matters: nothing is zero, no gate is shut."""
    defaults = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16)
    net = WanModel(WanConfig(**{**defaults, **sizes}))
    generator = torch.Generator().manual_seed(seed)
    net.reset_parameters(generator)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, (Block, Head)):
            module.modulation.data += 0.3 * torch.randn(module.modulation.shape, generator=generator)
    for weight in (net.head.head.weight, net.time_projection[1].weight):
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_net():
    """(seed, **sizes) -> a tiny random network."""
    return _make_net


@pytest.fixture(scope="session")
def net():
    return _make_net()


@pytest.fixture(scope="session")
def make_sampler():
    """(net, prompt seed, **options) -> a sampler with a random prompt of five rows."""

    def make(net, prompt: int = 0, **options) -> CausalSampler:
        text = torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(prompt))
        return CausalSampler(
            net=net, text=embed_text(net, text), device=torch.device("cpu"), dtype=torch.float32, **options
        )

    return make


@pytest.fixture(scope="session")
def empty_memory():
    """(**settings) -> an empty memory of tiny latents."""

    def make(**settings) -> Memory:
        return memory_of_kind(MemoryConfig(**settings), LATENT_SIZE)

    return make


@pytest.fixture(scope="session")
def same_memory():
    """(a, b) -> True where two memories are equal in every field, bit for bit."""

    def same(a: Memory, b: Memory) -> bool:
        plain = ("config", "latent_size", "slots", "decisions", "segments", "student", "scene_begins")
        alike = lambda x, y: x is y if x is None or y is None else torch.equal(x, y)
        return (
            all(getattr(a, name) == getattr(b, name) for name in plain)
            and all(alike(getattr(a, name), getattr(b, name)) for name in ("text", "given"))
            and list(a.remembered) == list(b.remembered)
            and all(
                torch.equal(a.remembered[f].keys, b.remembered[f].keys)
                and torch.equal(a.remembered[f].values, b.remembered[f].values)
                and a.remembered[f].keys.dtype == b.remembered[f].keys.dtype
                for f in a.remembered
            )
            and len(a.tensors()) == len(b.tensors())
            and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors()))
        )

    return same
