"""A pass over a full memory copies only what belongs to its chunk, and has the same operations in every chunk."""

import pytest
import torch
import torch._dynamo.testing
from torch.profiler import ProfilerActivity, profile

from context_forcing.memory.stores import NewFrames
from context_forcing.model.causal import causal_forward
from context_forcing.model.sampler import seeded_noise

FULL = dict(sink=1, slow=4, fast=4, chunk=2, window=9, policy="fifo")
COPIES = ("cat", "stack", "copy_", "clone", "contiguous", "_to_copy", "index", "repeat")
ATTENTION = (
    "scaled_dot_product",
    "transpose",
    "view",
    "alias",
    "flatten",
    "reshape",
    "slice",
    "as_strided",
    "empty_like",
)
"""Operations of which only the description changes with the length of the memory, and attention itself."""
SIGMAS = (1.0, 0.5)


def grown(sampler, memory, num_chunks):
    """A memory of so many chunks: those after the twelfth are appended without passes."""
    noise = seeded_noise(5, memory.latent_size)
    for memory in sampler.rollout(memory, min(num_chunks, 12), sigmas=SIGMAS, noise=noise):
        pass
    kept = [memory.store.frames[frame] for frame in memory.slots.all[-2:]]
    for _ in range(num_chunks - 12):
        memory = memory.append(memory.latent_chunks[-1], kept)
    return memory


def operations(function, *args) -> list[tuple[str, tuple]]:
    """Name and sizes of everything that a call computes, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name().startswith("aten::")]
    events.sort(key=lambda event: event.start_ns())
    return [(event.name().removeprefix("aten::"), tuple(map(tuple, event.shapes()))) for event in events]


def largest(shapes) -> int:
    return max((torch.Size(shape).numel() for shape in shapes), default=0)


@pytest.mark.parametrize("commit", [False, True], ids=["denoising", "commit"])
@torch.inference_mode()
def test_a_pass_copies_its_own_keys_only(make_net, make_sampler, empty_memory, commit):
    net = make_net(ffn_dim=64)
    sampler, seen = make_sampler(net), []
    for num_chunks in (2, 8):
        memory = grown(sampler, empty_memory(**FULL), num_chunks)
        view, x = sampler.view(memory), torch.randn(1, 16, 2, 4, 6)
        attend = sampler.network.attend(view, 2, memory.latent_size, keep=commit)
        found = operations(sampler.network.flow, x, 0.5, sampler.text, attend)
        of_chunk, of_memory = 2 * 6 * 64, view.num_frames * 6 * 64
        copied = [(name, largest(shapes)) for name, shapes in found if name in COPIES]
        # A commit pass writes into tensors of all layers, one layer at a time.
        assert copied and max(size for _, size in copied) <= of_chunk < of_memory
        assert any(largest(shapes) > of_memory for name, shapes in found if "scaled_dot_product" in name)
        seen.append([(name, shapes) for name, shapes in found if not any(part in name for part in ATTENTION)])
    assert view.num_frames == 7, "it is full"
    assert seen[0] == seen[1], "what a pass computes beside attention does not depend on the memory"


@torch.inference_mode()
def test_chunk_300_has_the_operations_of_chunk_12(net, make_sampler, empty_memory):
    sampler, seen = make_sampler(net), []
    for num_chunks in (12, 300):
        memory = grown(sampler, empty_memory(**FULL), num_chunks)
        noise = seeded_noise(5, memory.latent_size)
        seen.append(operations(sampler.generate_chunk, memory, SIGMAS, noise))
    assert len(memory.latent_chunks) == 300 and len(seen[0]) > 100
    assert seen[0] == seen[1]


@torch.inference_mode()
def test_a_pass_over_a_full_memory_is_one_graph_for_the_rest_of_the_video(net, make_sampler, empty_memory):
    """`fullgraph` raises where a pass makes the host wait for a value."""
    torch._dynamo.reset()
    counter, sampler = torch._dynamo.testing.CompileCounter(), make_sampler(net)
    a_pass = lambda x, timestep, attend: causal_forward(net, x, timestep, sampler.text, attend)
    compiled = torch.compile(a_pass, backend=counter, fullgraph=True, dynamic=False)
    memory, graphs = grown(sampler, empty_memory(**FULL), 3), []
    noise = seeded_noise(7, memory.latent_size)
    for number in range(4):
        attend = sampler.network.attend(sampler.view(memory), 2, memory.latent_size)
        x = torch.randn(1, 16, 2, 4, 6)
        timestep = torch.full((1, 2), 500.0 + number)
        expected = a_pass(x, timestep, attend)
        torch.testing.assert_close(compiled(x, timestep, attend), expected)
        graphs.append((attend.view.num_frames, counter.frame_count))
        memory = sampler.generate_chunk(memory, SIGMAS, noise)
    frames, counts = zip(*graphs)
    assert frames == (6, 7, 7, 7), "full from the second one on"
    assert counts[1] > counts[0] and counts[1:] == (counts[1],) * 3


def test_a_pass_with_gradients_keeps_what_it_attended_to(make_net, make_sampler, empty_memory):
    """Later passes over the same chunk write to the same place; the backward pass must not see it."""
    net = make_net().requires_grad_(True)
    sampler, grads = make_sampler(net), []
    with torch.no_grad():
        memory = grown(sampler, empty_memory(**FULL), 3)
    x, other = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 16, 2, 4, 6)
    for passes_after in (0, 2):
        with torch.no_grad():
            view = sampler.view(memory)
            attend = sampler.network.attend(view, 2, memory.latent_size)
        flow = sampler.network.flow(x, 0.5, sampler.text, attend)
        with torch.no_grad():
            for _ in range(passes_after):
                sampler.network.flow(other, 0.25, sampler.text, attend)
        (grad,) = torch.autograd.grad(flow.square().mean(), [net.blocks[0].self_attn.k.weight])
        grads.append(grad)
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


def test_frames_of_a_chunk_are_tensors_of_their_own():
    """A frame that stays must not keep the memory of its whole chunk."""
    new, k, v = NewFrames(3), torch.randn(3, 1, 2, 6, 2, 4), torch.randn(3, 1, 2, 6, 2, 4)
    for layer in range(3):
        new.write(layer, k[layer], v[layer])
    for t, frame in enumerate(new.frames):
        assert torch.equal(frame.keys, k[:, :, t]) and torch.equal(frame.values, v[:, :, t])
        assert frame.keys.untyped_storage().nbytes() == frame.keys.nbytes
    assert sum(part.numel() for part in new.tensors()) == k.numel() + v.numel()
