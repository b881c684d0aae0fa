"""The memory as it travels between nodes, without ComfyUI."""

import weakref

import pytest
import torch


def test_handles_of_a_chain_have_the_size_of_what_they_keep(node_module, empty_memory, rollout):
    handle = node_module("handle").MemoryHandle
    first = rollout(empty_memory(), 2)
    second = rollout(first)
    handles = [handle.of(first), handle.of(second, before=first)]
    kept = {id(tensor): tensor.nbytes for memory in (first, second) for tensor in memory.tensors()}
    assert sum(tensor.nbytes for handle in handles for tensor in handle.tensors) == sum(kept.values())


@pytest.mark.parametrize("policy", ["novel", "released"])
def test_a_handle_keeps_nothing_on_a_gpu_that_an_out_of_memory_moves(node_module, empty_memory, rollout, policy):
    """The device `meta` stands in for the GPU. No tensor can be copied from it, so the fallback's step is done here."""
    memory = rollout(empty_memory(policy=policy), 2)
    memory.store.park(torch.device("meta"))
    handle = node_module("handle").MemoryHandle.of(memory)
    assert handle.tensors and {tensor.device.type for tensor in handle.tensors} == {"cpu"}
    on_gpu = [weakref.ref(tensor) for _, kv in memory.store.frame_kvs() for tensor in kv.tensors()]
    for _, kv in memory.store.frame_kvs():
        for name in ("keys", "values"):
            object.__setattr__(kv, name, torch.zeros(1))
    assert on_gpu and not [ref for ref in on_gpu if ref() is not None]


def test_a_result_is_found_by_the_same_inputs_while_it_is_there(node_module, empty_memory, rollout):
    module = node_module("handle")

    class Model:
        pass

    model, text, settings = Model(), torch.ones(1, 2, 4), {"seed": 7}
    inputs = lambda model=model, text=text, **changed: module.Inputs(
        model=weakref.ref(model), text=text, settings=settings | changed
    )
    before = module.MemoryHandle.of(empty_memory())
    after, samples = module.MemoryHandle.of(rollout(before.memory)), torch.zeros(1)
    before.remember(inputs(), after, samples, {"thumbnail": []})
    found, latents, ui = before.find(inputs(text=text.clone()))
    assert found.memory is after.memory and found.continuations is after.continuations
    assert latents is samples and ui == {"thumbnail": []} and not found.tensors
    assert before.find(inputs(seed=8)) is None and before.find(inputs(text=0 * text)) is None
    assert before.find(inputs(model=Model())) is None and after.find(inputs()) is None
    del found, after
    assert before.find(inputs()) is None
    before.remember(inputs(), before, samples, {})
    assert len(before.continuations) == 1, "what is gone is dropped"
