"""A student has one name, whatever is wrapped around its layers or kept beside their weights."""

import pytest
import torch

from context_forcing.model.fingerprint import fingerprint


@pytest.fixture
def own_net(make_net):
    return make_net()


def test_scales_beside_weights_do_not_count(net, own_net):
    own_net.blocks[0].ffn[0].register_parameter("input_scale", torch.nn.Parameter(torch.ones(())))
    assert fingerprint(own_net) == fingerprint(net)


def test_compiled_blocks_keep_the_name(net, own_net):
    own_net.blocks[1] = torch.compile(own_net.blocks[1], backend="eager")
    assert any("_orig_mod" in name for name, _ in own_net.named_parameters())
    assert fingerprint(own_net) == fingerprint(net)


def test_weights_in_place_of_those_in_the_tree(net, own_net):
    name, weight = "blocks.0.ffn.0.weight", own_net.blocks[0].ffn[0].weight
    original = weight.data.clone()
    weight.data.neg_()
    assert fingerprint(own_net) != fingerprint(net)
    assert fingerprint(own_net, {name: original}) == fingerprint(net)


def test_packed_bytes_are_told_apart(own_net):
    """Bytes have no sign: all of two files would look alike."""
    layer = own_net.blocks[0].ffn[0]
    names = set()
    for seed in range(2):
        packed = torch.randint(0, 256, (layer.weight.numel() // 2,), generator=torch.Generator().manual_seed(seed))
        layer.weight = torch.nn.Parameter(packed.to(torch.uint8), requires_grad=False)
        names.add(fingerprint(own_net))
    assert len(names) == 2
