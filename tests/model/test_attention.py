"""Attention functions by name; packages of kernels are replaced by modules with functions of the same signature."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from context_forcing.model import attention as module
from context_forcing.model.attention import ATTENTIONS, BACKENDS, find_attention, load_attention, sdpa
from context_forcing.model.config import StudentCard
from context_forcing.model.network import Network
from context_forcing.model.sampler import SamplerOptions, make_sampler

CPU = torch.device("cpu")
KERNELS = tuple(BACKENDS)


def softmax_attention(q_BNSE, k_BNKE, v_BNKE, num_keys=None):
    """In float32 without PyTorch's function; with `num_keys` only over the first of them."""
    k, v = k_BNKE[:, :, :num_keys].float(), v_BNKE[:, :, :num_keys].float()
    scores = q_BNSE.float() @ k.transpose(2, 3) * q_BNSE.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).to(q_BNSE)


def in_steps(x_BNSE, size, rows):
    """Rounded to whole numbers of one scale per run of rows, `size` to both sides of 0."""
    runs = x_BNSE.float().split(rows, dim=2)
    scales = [run.abs().amax((2, 3), keepdim=True) / size for run in runs]
    return torch.cat([(run / scale).round() * scale for run, scale in zip(runs, scales)], dim=2)


def eight_bits(q, k, v):
    """Queries and keys in int8, values in fp8: the arithmetic of SageAttention 2."""
    k = k.float() - k.float().mean(2, keepdim=True)
    v = v.to(torch.float8_e4m3fn).float()
    return softmax_attention(in_steps(q, 127, 32), in_steps(k, 127, 64), v).to(q)


def four_bits(q, k, v):
    """Everything in fp4 with a scale per 16 channels: the arithmetic of SageAttention 3."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels.flip(0), levels])

    def fp4(x):
        blocks = x.float().unflatten(-1, (-1, 16))
        scale = blocks.abs().amax(-1, keepdim=True) / 6
        bounds = (levels[1:] + levels[:-1]) / 2
        return (levels[torch.bucketize((blocks / scale).contiguous(), bounds)] * scale).flatten(-2)

    return softmax_attention(fp4(q), fp4(k - k.mean(2, keepdim=True)), fp4(v)).to(q)


def sage_of(compute):
    """sageattention.sageattn by a function in layout [B, N, S, E]."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "NHD" and not is_causal and sm_scale is None and not kwargs
        return compute(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return sageattn


def flash_of(compute):
    """flash_attn.flash_attn_func."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert not dropout_p and softmax_scale is None and not causal
        return compute(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return flash_attn_func


def sage3_of(compute):
    """sageattn3.sageattn3_blackwell."""

    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
        assert attn_mask is None and not is_causal and not kwargs
        return compute(q, k, v)

    return sageattn3_blackwell


SIGNATURES = {"flash": flash_of, "sage": sage_of, "sage3": sage3_of}
RIGHT = {"flash": softmax_attention, "sage": eight_bits, "sage3": four_bits}


@pytest.fixture
def install(monkeypatch):
    """(name, function in layout [B, N, S, E]) installs a package that computes by it and runs on this machine."""

    def install(name, compute):
        backend = BACKENDS[name]
        package = ModuleType(backend.package)
        setattr(package, backend.function, SIGNATURES[name](compute))
        monkeypatch.setitem(sys.modules, backend.package, package)
        dtypes = (*backend.dtypes, torch.float32)
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(backend, devices=("cpu",), dtypes=dtypes))

    return install


def load(name, dtype=torch.bfloat16, head_dim=128):
    return load_attention(name, CPU, dtype, head_dim)


def qkv():
    return [torch.randn(1, size, 2, 16, generator=torch.Generator().manual_seed(size)) for size in (3, 5, 5)]


def test_sdpa_is_softmax_attention():
    q, k, v = qkv()
    bias = torch.randn(1, 1, 3, 5)
    scores = torch.einsum("bsne,bkne->bnsk", q, k) * 16**-0.5 + bias
    expected = torch.einsum("bnsk,bkne->bsne", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v, bias), expected)


def test_unknown_names_are_refused():
    assert find_attention("sdpa") is sdpa is load("sdpa") and ATTENTIONS == ("sdpa", "flash", "sage", "sage3")
    with pytest.raises(ValueError, match="^attention: 'best' is not one of sdpa, flash, sage, sage3$"):
        SamplerOptions(attention="best")


@pytest.mark.parametrize("name", KERNELS)
def test_a_package_that_is_missing_is_named_with_its_remedy(name, monkeypatch):
    backend = BACKENDS[name]
    monkeypatch.setitem(sys.modules, backend.package, None)
    with pytest.raises(ValueError) as error:
        find_attention(name)
    text = str(error.value)
    assert text.startswith(f"attention: {name} needs the package {backend.package} (")
    assert text.endswith(f"; {backend.install}, or use sdpa") and "\n" not in text and len(text) < 300


def test_a_package_without_the_function_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(ValueError, match="^attention: flash needs the package flash_attn .*'flash_attn_func'"):
        find_attention("flash")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "words"),
    [
        ("cpu", torch.bfloat16, 128, "runs on CUDA, not on cpu; use sdpa"),
        ("cuda", torch.float32, 128, "takes float16 and bfloat16, not float32; use bf16, or sdpa"),
        ("cuda", torch.bfloat16, 257, r"takes heads of \d+ channels at most, not 257; use sdpa"),
    ],
)
def test_limits_are_stated(name, device, dtype, head_dim, words):
    with pytest.raises(ValueError, match=f"^attention: {name} {words}$"):
        BACKENDS[name].check(name, torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_a_right_one_passes(name, head_dim, install):
    install(name, RIGHT[name])
    q, k, v = (torch.cat([x] * (head_dim // 16), dim=-1) for x in qkv())
    out, expected = load(name, head_dim=head_dim)(q, k, v), sdpa(q, k, v)
    assert (out - expected).norm() / expected.norm() < 0.3 and out.shape == expected.shape


@pytest.mark.parametrize(("name", "compute"), [("flash", eight_bits), ("sage", four_bits)])
def test_coarser_arithmetic_than_the_name_says_is_refused(name, compute, install):
    install(name, compute)
    with pytest.raises(ValueError, match=f"^attention: {name} differs from sdpa by 0.* in its self-test, at most"):
        load(name)


WRONG = {
    "no scale": lambda q, k, v: softmax_attention(q * q.shape[-1] ** 0.5, k, v),
    "the last keys are left out": lambda q, k, v: softmax_attention(q, k, v, num_keys=k.shape[2] // 64 * 64),
    "keys of another head": lambda q, k, v: softmax_attention(q, k.flip(1), v),
    "values in another order": lambda q, k, v: softmax_attention(q, k, v.roll(1, dims=2)),
    "NaN": lambda q, k, v: softmax_attention(q, k, v) * float("nan"),
    "nothing": lambda q, k, v: torch.zeros_like(q),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", KERNELS)
def test_one_that_computes_wrong_is_refused(name, wrong, install):
    install(name, WRONG[wrong])
    with pytest.raises(ValueError, match=f"^attention: {name} differs from sdpa by .*; use another version of it, or"):
        load(name)


class KernelError(Exception):
    """As packages of kernels have."""


def fail(q, k, v):
    raise KernelError("no kernel image is available\nfor this device")


BROKEN = {
    "an error of its own class": (fail, r"\(KernelError: no kernel image is available for this device\)"),
    "two results": (lambda q, k, v: torch.stack([q, q]), "ValueError: shape"),
    "no tensor": (lambda q, k, v: None, "AttributeError"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_one_that_fails_is_refused(broken, install):
    compute, words = BROKEN[broken]
    install("sage3", compute)
    with pytest.raises(ValueError, match=f"^attention: sage3 failed its self-test .*{words}.*; use another version"):
        load("sage3")


def test_one_that_goes_over_to_pytorchs_attention_is_refused(install):
    install("flash", torch.nn.functional.scaled_dot_product_attention)
    with pytest.raises(ValueError, match="^attention: flash left its self-test to PyTorch's attention, .*; use sdpa$"):
        load("flash")


@pytest.mark.parametrize("writes", [True, False])
def test_keys_stay_as_they_are(writes, install):
    """SageAttention 1.0.6 and 3 subtract their mean in place."""

    def compute(q, k, v):
        if writes:
            k -= k.mean(2, keepdim=True)
        seen.append(k)
        return softmax_attention(q, k, v)

    seen = []
    install("sage", compute)
    attention, (q, k, v) = load("sage", torch.float32, 16), qkv()
    before = k.clone()
    torch.testing.assert_close(attention(q, k, v), sdpa(q, k, v))
    assert torch.equal(k, before)
    assert (seen[-1].data_ptr() == k.data_ptr()) != writes, "a copy is made only where it is necessary"


def test_each_is_tested_once_per_kind_of_heads(install):
    calls = []
    install("flash", lambda q, k, v: calls.append(q.shape) or softmax_attention(q, k, v))
    assert load("flash") is load("flash") and len(calls) == 1
    load("flash", head_dim=64), load("flash", torch.float16)
    assert [shape[-1] for shape in calls] == [128, 64, 128]
    assert {shape[2] for shape in calls} == {module.NUM_QUERIES}


def test_calls_with_a_bias_are_exact(install):
    q, k, v = qkv()
    bias = torch.randn(1, 1, 1, 5)
    install("flash", softmax_attention)
    attention = load("flash", torch.float32, 16)
    install("flash", fail)
    assert torch.equal(attention(q, k, v, bias), sdpa(q, k, v, bias))


def test_a_sampler_takes_an_attention_by_name_or_as_a_function(net, install):
    network, text = Network(net, CPU, torch.float32), torch.randn(1, 5, net.config.text_dim)
    other = lambda q, k, v, bias=None: sdpa(q, k, v, bias)
    make = lambda name: make_sampler(network, StudentCard(), text, SamplerOptions(attention=name)).network.attention
    assert make("sdpa") is sdpa and make(other) is other
    install("sage", RIGHT["sage"])
    assert make("sage") is load("sage", torch.float32, network.head_dim)
    install("sage", WRONG["nothing"])
    with pytest.raises(ValueError, match="^attention: sage differs"):
        make("sage")
