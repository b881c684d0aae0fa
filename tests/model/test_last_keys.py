"""A pass whose flow nobody needs ends at the keys and values of the last layer, and nothing else changes."""

import pytest
import torch

from context_forcing.model.causal import compiled
from context_forcing.model.finite import NotFiniteError
from context_forcing.model.offload import Offload
from context_forcing.model.sampler import COMMIT_ATTENDS, KV_PLACEMENTS, seeded_noise
from context_forcing.train.stages.score import flow_given_context

CPU = torch.device("cpu")
CLEAN = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)
RELEASED = dict(CLEAN, policy="released", slow=1, window=6)
AFTER_KEYS = ("self_attn.o", "norm3", "cross_attn.q", "cross_attn.o", "norm2", "ffn")


def roll(sampler, memory, num_chunks):
    for memory in sampler.rollout(memory, num_chunks, sigmas=(1.0, 0.5), noise=seeded_noise(5, memory.latent_size)):
        pass
    return memory


@pytest.mark.parametrize("settings", [CLEAN, RELEASED], ids=["clean", "released"])
@pytest.mark.parametrize("how", ["directly", "compiled", "offload"])
@torch.inference_mode()
def test_keys_are_those_of_the_whole_pass_bit_for_bit(make_net, make_sampler, empty_memory, settings, how):
    net = make_net(num_layers=3)
    run = {"compiled": lambda: {"run": compiled(backend="eager")}, "offload": lambda: {"run": Offload(net, CPU)}}
    sampler = make_sampler(net, **run.get(how, dict)())
    network, memory = sampler.network, roll(sampler, empty_memory(**settings), 4)
    x0, found = torch.randn(1, 16, 2, 4, 6), []
    for whole in (True, False):
        attend = network.attend(sampler.view(memory), 2, memory.latent_size, keep=True)
        if whole:
            network.flow(x0, 0.0, sampler.text, attend)
        else:
            attend.keep(2, *network.last_keys(x0, sampler.text, attend))
        found.append(attend.new_tensors())
    assert len(found[0]) == len(found[1]) > 0 and all(map(torch.equal, *found))


@pytest.mark.parametrize("layout", KV_PLACEMENTS)
@pytest.mark.parametrize("commit_attends", COMMIT_ATTENDS)
def test_the_rest_of_the_last_layer_and_the_head_run_in_denoising_only(
    make_net, make_sampler, empty_memory, layout, commit_attends
):
    net = make_net()
    sampler, ran = make_sampler(net, kv_placement=layout, commit_attends=commit_attends), []
    for number, block in enumerate(net.blocks):
        for name in AFTER_KEYS:
            block.get_submodule(name).register_forward_hook(lambda *_, number=number: ran.append(number))
    net.head.head.register_forward_hook(lambda *_: ran.append("head"))
    memory = roll(sampler, empty_memory(**CLEAN), 1)
    of_pass = len(AFTER_KEYS)
    assert ran == [*([0] * of_pass + [1] * of_pass + ["head"]) * 2, *[0] * of_pass]
    ran.clear()
    sampler.recache(memory)
    assert ran == [0] * of_pass


def test_nothing_but_keys_is_looked_for_in_the_last_layer(make_net, make_sampler, empty_memory):
    """NaN that begins in the commit pass is named; where nothing is kept, nothing is found."""
    for name, found in (("ffn", False), ("self_attn.norm_k", True), ("self_attn.v", True)):
        net = make_net(num_layers=3)
        is_commit = []
        net.patch_embedding.register_forward_hook(lambda *_, seen=is_commit: seen.append(1))
        spoil = lambda _, args, out, seen=is_commit: out * torch.nan if len(seen) % 3 == 0 else None
        net.blocks[2].get_submodule(name).register_forward_hook(spoil)
        sampler, empty = make_sampler(net), empty_memory(**CLEAN)
        if not found:
            assert roll(sampler, empty, 1).num_frames == 2
            continue
        part = "keys" if name.endswith("k") else "values"
        said = f", the commit pass: NaN or infinity in the {part} of layer blocks.2,"
        with pytest.raises(NotFiniteError, match=said):
            roll(sampler, empty, 1)


def test_a_network_of_one_layer(make_net, make_sampler, empty_memory):
    memory = roll(make_sampler(make_net(num_layers=1)), empty_memory(**CLEAN), 4)
    assert memory.num_frames == 8 and all(kv.keys.isfinite().all() for _, kv in memory.store.frame_kvs())


def test_the_contexts_of_scores_end_there_too(make_net, make_sampler):
    """The teacher and the critic read a context only for its keys; gradients come through them."""
    net = make_net().requires_grad_(True)
    network, text, heads = make_sampler(net).network, torch.randn(1, 5, 32), []
    net.head.head.register_forward_hook(lambda *_: heads.append(1))
    context, x = torch.randn(2, 1, 16, 3, 4, 6)
    flow_given_context(network, context, text, x, 0.5, text).square().mean().backward()
    assert len(heads) == 1
    found = {name: weight.grad for name, weight in net.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())
