"""Rollouts and scores: what is seen, which steps have gradients, what is kept for the backward pass."""

import dataclasses

import pytest
import torch

from context_forcing.model.sampler import CausalSampler, seeded_noise
from context_forcing.train.stages.score import flow_given_context
from context_forcing.train.stages.student import Student

from .helpers import SIGMAS, empty, network_of, random, student_of


def test_the_target_sees_the_context_and_the_context_does_not_see_the_target(net):
    network, text = network_of(net), random(1, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 4, 4, 6, seed=2), random(1, 16, 6, 4, 6, seed=3)
    with torch.no_grad():
        flow = flow_given_context(network, context, text, x, 0.7, text)
        for frame in range(4):
            changed = context.clone()
            changed[:, :, frame] += 1
            assert not torch.allclose(flow_given_context(network, changed, text, x, 0.7, text), flow, atol=1e-3)
        later = x.clone()
        later[:, :, 5] += 1
        other = flow_given_context(network, context, text, later, 0.7, text)
        assert not torch.allclose(other[:, :, 0], flow[:, :, 0], atol=1e-4), "the target sees itself in both directions"
        assert flow_given_context(network, context[:, :, :0], text, x, 0.7, text).shape == x.shape


def test_a_score_equals_the_sampler_s_pass(net):
    """Remembered frames and a target in two passes equal a chunk of the sampler over a memory of these frames."""
    network, text = network_of(net), random(1, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 3, 4, 6, seed=2), random(1, 16, 3, 4, 6, seed=3)
    with torch.no_grad():
        sampler = CausalSampler(network=network, text=network.embed_text(text))
        memory = sampler.commit(empty(sink=3, slow=0, fast=3), context)
        attend = network.attend(sampler.view(memory), 3, memory.latent_size)
        expected = network.flow(x, 0.7, sampler.text, attend)
        torch.testing.assert_close(flow_given_context(network, context, text, x, 0.7, text), expected)


def test_texts_may_differ_from_chunk_to_chunk(net):
    network, texts = network_of(net), random(2, 5, net.config.text_dim, seed=1)
    context, x = random(1, 16, 2, 4, 6, seed=2), random(1, 16, 6, 4, 6, seed=3)
    with torch.no_grad():
        flow = flow_given_context(network, context, texts, x, 0.7, texts)
        other = flow_given_context(network, context, texts.flip(0), x, 0.7, texts)
        same = flow_given_context(network, context, texts[:1].expand(2, -1, -1), x, 0.7, texts)
    assert not torch.allclose(flow, other) and not torch.allclose(flow, same)


def count_embeddings(net):
    """A list that grows with every pass through the text embedding, and a handle that ends it."""
    calls = []
    return calls, net.text_embedding.register_forward_hook(lambda *_: calls.append(1))


def test_one_text_is_embedded_once_unless_gradients_would_change(make_net):
    trained_net = make_net().requires_grad_(True)
    calls, handle = count_embeddings(trained_net)
    network = network_of(trained_net)
    context, x = random(1, 16, 2, 4, 6, seed=2), random(1, 16, 3, 4, 6, seed=3)
    text, noise, counts = random(1, 5, trained_net.config.text_dim), seeded_noise(3, (16, 4, 6)), []
    for has_grad in (False, True):
        student = Student(network, text)
        with torch.set_grad_enabled(has_grad):
            flow_given_context(network, context, text, x, 0.7, text)
        memory = student.rollout(empty(), 3, SIGMAS, noise)
        student.target(memory, 3, 1, SIGMAS, noise, has_grad)
        counts.append(len(calls))
        calls.clear()
    handle.remove()
    assert counts == [1 + 1, 2 + 1 + 3]


def test_texts_of_a_rollout_are_embedded_once_each(trained_net, same_memory):
    """Chunks under the texts a, b, a, a, b: two passes through the text embedding, and the same film."""
    two = random(2, 5, trained_net.config.text_dim, seed=9)
    student, noise = Student(network_of(trained_net), two[[0, 1, 0, 0, 1]]), seeded_noise(3, (16, 4, 6))
    calls, handle = count_embeddings(trained_net)
    memory = student.rollout(empty(), 3, SIGMAS, noise)
    memory = student.target(memory, 2, 1, SIGMAS, noise, has_grad=False).memory
    assert len(calls) == 2
    handle.remove()
    alone = empty()
    for chunk in range(5):  # a Student for each chunk embeds each text anew
        text = student.text_GLC[chunk : chunk + 1]
        alone = Student(network_of(trained_net), text).rollout(alone, 1, SIGMAS, noise)
    assert same_memory(memory, alone)


def test_after_an_update_the_text_is_embedded_anew(make_net):
    net, noise = make_net().requires_grad_(True), seeded_noise(3, (16, 4, 6))
    network, text, films = network_of(net), random(1, 5, net.config.text_dim), []
    for _ in range(2):
        films.append(Student(network, text).rollout(empty(), 1, SIGMAS, noise).latent_chunks[0])
        with torch.no_grad():
            net.blocks[0].cross_attn.v.weight.mul_(-1)
    assert not torch.allclose(*films, atol=1e-3)


def test_a_training_rollout_commits_as_its_student_says(net):
    sampler = next(dataclasses.replace(student_of(net), commit_attends="itself").samplers(0, 1))
    assert sampler.commit_attends == "itself" and next(student_of(net).samplers(0, 1)).commit_attends == "all"


@pytest.mark.parametrize("exit_step", [0, 2])
def test_a_training_rollout_is_the_sampler_s_rollout(net, exit_step):
    student, noise = student_of(net), seeded_noise(3, (16, 4, 6))
    sampler = next(student.samplers(0, 1))
    with torch.no_grad():
        *_, expected = sampler.rollout(empty(), 5, sigmas=SIGMAS, noise=noise)
    context = student.rollout(empty(), 3, SIGMAS, noise)
    rollout = student.target(context, 2, exit_step, SIGMAS, noise, has_grad=False)
    assert torch.equal(torch.cat(rollout.memory.latent_chunks, 2), torch.cat(expected.latent_chunks, 2))
    assert rollout.memory.slots == expected.slots and rollout.contexts[0] is context
    last_step = torch.equal(rollout.target_BCTHW, torch.cat(rollout.memory.latent_chunks[3:], 2))
    assert last_step == (exit_step == len(SIGMAS) - 1)


def test_gradients_are_in_the_exit_step_only_and_change_nothing(trained_net):
    student, noise = student_of(trained_net), seeded_noise(3, (16, 4, 6))
    context = student.rollout(empty(), 3, SIGMAS, noise)
    plain = student.target(context, 2, 1, SIGMAS, noise, has_grad=False)
    rollout = student.target(context, 2, 1, SIGMAS, noise, has_grad=True)
    assert rollout.target_BCTHW.requires_grad and not plain.target_BCTHW.requires_grad
    assert torch.equal(rollout.target_BCTHW, plain.target_BCTHW)
    assert not any(frame.keys.requires_grad for frame in rollout.memory.store.frames.values())
    assert not any(part.requires_grad for part in rollout.memory.latent_chunks)
    rollout.target_BCTHW.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained_net.parameters())


def bytes_saved(student, context_chunks):
    """Bytes that are kept for the backward pass of a target, without the weights."""
    noise = seeded_noise(3, (16, 4, 6))
    context = student.rollout(empty(policy="uniform", uniform_stride=1), context_chunks, SIGMAS, noise)
    weights = {p.untyped_storage().data_ptr() for p in student.network.net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rollout = student.target(context, 2, 1, SIGMAS, noise, has_grad=True)
    assert rollout.target_BCTHW.requires_grad
    return sum(size for size, _ in kept.values())


def test_memory_under_gradient_is_flat_in_rollout_length(trained_net):
    student = student_of(trained_net)
    full, long = bytes_saved(student, 8), bytes_saved(student, 40)
    assert full == long > 0


def test_recomputing_gives_the_same_gradients(trained_net):
    noise, grads = seeded_noise(3, (16, 4, 6)), []
    for recompute in (False, True):
        student = student_of(trained_net, num_texts=7, recompute=recompute)
        context = student.rollout(empty(), 5, SIGMAS, noise)
        rollout = student.target(context, 2, 1, SIGMAS, noise, has_grad=True)
        rollout.target_BCTHW.square().mean().backward()
        grads.append([p.grad.clone() for p in trained_net.parameters()])
        trained_net.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_recomputing_saves_memory(trained_net):
    assert bytes_saved(student_of(trained_net, recompute=True), 8) < 0.6 * bytes_saved(student_of(trained_net), 8)


def test_a_lazy_view_is_the_same_view(net):
    student = student_of(net)
    memory = student.rollout(empty(), 5, SIGMAS, seeded_noise(3, (16, 4, 6)))
    sampler = next(student.samplers(0, 1))
    eager, lazy = sampler.view(memory), sampler.view(memory, lazy=True)
    assert eager.num_frames == lazy.num_frames and len(lazy.layers) == len(eager.layers) == 2
    for one, other in zip(eager.layers, lazy.layers, strict=True):
        for kind in ("keys", "values"):
            a, b = (getattr(each, kind)[:, : eager.num_frames] for each in (one, other))
            assert torch.equal(a, b) and a.shape[1] == eager.num_frames > 0
    assert lazy.layers[0].keys is lazy.layers[1].keys, "one layer is kept"
