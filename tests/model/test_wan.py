"""The module trees are Wan's: names, shapes and counts (docs/method.md, Network)."""

import pytest
import torch

from context_forcing.model.config import PRESETS, WanConfig
from context_forcing.model.wan import WanModel


def published_layout(d, f, layers, text_dim=4096, freq_dim=256, channels=16):
    """State-dict keys and shapes of Wan 2.1 text-to-video, as published."""
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    shapes = {
        "patch_embedding.weight": (d, channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        **linear("text_embedding.0", d, text_dim),
        **linear("text_embedding.2", d, d),
        **linear("time_embedding.0", d, freq_dim),
        **linear("time_embedding.2", d, d),
        **linear("time_projection.1", 6 * d, d),
        **linear("head.head", 4 * channels, d),
        "head.modulation": (1, 2, d),
    }
    for n in range(layers):
        block = f"blocks.{n}"
        for attn in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= linear(f"{block}.{attn}.{part}", d, d)
            shapes |= {f"{block}.{attn}.norm_q.weight": (d,), f"{block}.{attn}.norm_k.weight": (d,)}
        shapes |= {f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,), f"{block}.modulation": (1, 6, d)}
        shapes |= linear(f"{block}.ffn.0", f, d) | linear(f"{block}.ffn.2", d, f)
    return shapes


@pytest.mark.parametrize(
    "preset, d, f, layers, num_tensors, num_parameters",
    [
        ("wan2.1-1.3b", 1536, 8960, 30, 825, 1_418_996_800),
        ("wan2.1-14b", 5120, 13824, 40, 1095, 14_288_491_584),
        ("demo", 128, 512, 6, 177, 2_298_304),
    ],
)
def test_trees(preset, d, f, layers, num_tensors, num_parameters):
    with torch.device("meta"):
        state = WanModel(PRESETS[preset]).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_layout(d, f, layers)
    assert len(state) == num_tensors
    if num_parameters:
        assert sum(value.numel() for value in state.values()) == num_parameters


def test_head_dims():
    assert {name: config.dim // config.num_heads for name, config in PRESETS.items()} == {
        "demo": 64, "demo-4-blocks": 64, "wan2.1-1.3b": 128, "wan2.1-14b": 128,
    }  # fmt: skip


@pytest.mark.parametrize("dim, heads", [(64, 3), (63, 7 * 9), (6, 2)])
def test_heads_that_do_not_divide_are_refused(dim, heads):
    with pytest.raises(ValueError, match=f"num_heads: {heads}"):
        WanConfig(dim=dim, ffn_dim=8, num_heads=heads, num_layers=1)


def test_fresh_weights_come_from_the_generator_alone():
    def fresh(seed):
        net = WanModel(WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8))
        net.reset_parameters(torch.Generator().manual_seed(seed))
        return net.state_dict()

    a, again, b = fresh(1), fresh(1), fresh(2)
    assert all(value.isfinite().all() for value in a.values())
    assert all(torch.equal(a[key], again[key]) for key in a)
    assert not torch.equal(a["blocks.0.self_attn.q.weight"], b["blocks.0.self_attn.q.weight"])
