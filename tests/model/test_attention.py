"""Attention functions by name; sageattention is replaced by a module that records its calls."""

import sys
from types import ModuleType

import pytest
import torch

from context_forcing.model.attention import ATTENTIONS, load_attention, sdpa
from context_forcing.model.config import StudentCard
from context_forcing.model.network import Network
from context_forcing.model.sampler import SamplerOptions, make_sampler


@pytest.fixture
def sage_calls(monkeypatch):
    """The keyword arguments of calls of a stand-in for sageattention, which computes exact attention."""
    calls = []

    def sageattn(q, k, v, **options):
        calls.append(options)
        return sdpa(q, k, v)

    module = ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return calls


class OnCuda(torch.Tensor):
    """A tensor that claims to be on CUDA."""

    is_cuda = True


def qkv():
    return (torch.randn(1, size, 2, 8, generator=torch.Generator().manual_seed(size)) for size in (3, 5, 5))


def test_sdpa_is_softmax_attention():
    q, k, v = qkv()
    bias = torch.randn(1, 1, 3, 5)
    scores = torch.einsum("bsne,bkne->bnsk", q, k) * 8**-0.5 + bias
    expected = torch.einsum("bnsk,bkne->bsne", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v, bias), expected)


def test_unknown_names_are_refused():
    assert load_attention("sdpa") is sdpa and set(ATTENTIONS) == {"sdpa", "sage"}
    with pytest.raises(ValueError, match="^attention: 'flash' is not one of sdpa, sage$"):
        load_attention("flash")


def test_sage_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ValueError, match="^attention: sage needs the package sageattention; pip install sageattention"):
        load_attention("sage")


def test_sage_takes_our_layout(sage_calls):
    q, k, v = qkv()
    out = load_attention("sage")(q.as_subclass(OnCuda), k, v)
    assert torch.equal(out, sdpa(q, k, v)) and sage_calls == [{"tensor_layout": "NHD", "is_causal": False}]


def test_calls_with_a_bias_are_exact(sage_calls):
    q, k, v = qkv()
    bias = torch.randn(1, 1, 1, 5)
    assert torch.equal(load_attention("sage")(q, k, v, bias), sdpa(q, k, v, bias)) and not sage_calls


def test_sage_needs_cuda(sage_calls):
    with pytest.raises(ValueError, match="^attention: sage runs on CUDA, not on cpu; use sdpa$"):
        load_attention("sage")(*qkv())


def test_a_sampler_takes_an_attention_by_name_or_as_a_function(net, sage_calls):
    network, text = Network(net, torch.device("cpu"), torch.float32), torch.randn(1, 5, net.config.text_dim)
    other = lambda q, k, v, bias=None: sdpa(q, k, v, bias)
    make = lambda name: make_sampler(network, StudentCard(), text, SamplerOptions(attention=name)).network.attention
    assert make("sdpa") is sdpa and make(other) is other and make("sage") is not sdpa
    with pytest.raises(ValueError, match="^attention: 'flash'"):
        make("flash")
