"""Memory with real tensors: the right frames stay, nothing ever changes, nothing is held too long."""

import dataclasses

import numpy as np
import pytest
import torch

import context_forcing.memory.stores as stores_module
from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.config import CLEAN_POLICIES, RECALL
from context_forcing.memory.stores import FrameKV, key_similarity

LAYERS, TOKENS, HEADS, HEAD_DIM = 3, 6, 2, 8
LATENT_SIZE = (16, 4, 6)


def views_of_a_walk(num_frames, seed):
    """Raw keys [frames, layers, P, N, E] of a camera that dwells, drifts and comes back: cosines around 0.95."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(5, LAYERS, TOKENS, HEADS, HEAD_DIM, generator=generator)
    keys, here = [], 0
    for _ in range(num_frames):
        if torch.rand(1, generator=generator) < 0.3:
            here = int(torch.randint(5, (1,), generator=generator))
        noise = 0.4 * torch.rand(1, generator=generator)
        keys.append(places[here] + noise * torch.randn(places[here].shape, generator=generator))
    return torch.stack(keys)


def chunk_of(keys, frames):
    """What a commit pass hands over: latents, and keys and values of each frame [layers, B, P, N, E]."""
    part = keys[list(frames)]
    latents = part.mean((1, 2, 3, 4)).view(1, 1, -1, 1, 1).expand(1, 16, -1, 4, 6).clone()
    return latents, [FrameKV(frame[:, None].clone(), -frame[:, None]) for frame in part]


def remember(memory, keys, num_frames):
    for first in range(memory.num_frames, num_frames, memory.config.chunk):
        memory = memory.append(*chunk_of(keys, range(first, first + memory.config.chunk)))
    return memory


def make(**settings):
    return empty_memory(MemoryConfig(**settings), LATENT_SIZE)


def bytes_of(memory):
    tensors = [t for held in memory.store.frames.values() for t in (held.keys, held.values)]
    return [t.clone() for t in (*tensors, *memory.latent_chunks)]


@pytest.mark.parametrize("policy", [policy for policy in CLEAN_POLICIES if policy != RECALL])
@pytest.mark.parametrize("eviction", ["oldest", "redundant"])
@pytest.mark.parametrize(
    "sizes", [dict(), dict(sink=0, slow=4, fast=5, chunk=1), dict(sink=4, slow=3, fast=7)], ids=str
)
def test_against_similarities_taken_from_all_keys_ever(expected, policy, eviction, sizes):
    memory = make(policy=policy, eviction=eviction, **sizes)
    keys = views_of_a_walk(150, seed=1)
    unit = keys.double().flatten(-2).numpy()
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    similarity = lambda a, b: float((unit[a] * unit[b]).sum(-1).mean())

    memory = remember(memory, keys, 150)
    sink, slow, fast, decisions = expected(memory.config, 150, similarity)
    assert (list(memory.slots.sink), list(memory.slots.slow), list(memory.slots.fast)) == (sink, slow, fast)
    assert [(d.frame, d.promoted, d.evicted) for d in memory.decisions] == [(f, p, e) for f, p, _, e in decisions]
    for decision, (_, _, score, _) in zip(memory.decisions, decisions):
        assert decision.similarity == (score if score is None else pytest.approx(score, abs=1e-5))
    if policy in ("clean", "novel"):
        assert 0 < sum(d.promoted for d in memory.decisions) < len(memory.decisions), "the walk decides nothing"
    assert list(memory.store.frames) == list(memory.slots.all)
    for frame, held in memory.store.frames.items():
        assert torch.equal(held.keys[:, 0], keys[frame]) and torch.equal(held.values[:, 0], -keys[frame])


def test_two_futures_touch_neither_each_other_nor_their_past():
    here, there = views_of_a_walk(60, seed=1), views_of_a_walk(60, seed=2)
    past = remember(make(), here, 30)
    shared, before = dict(past.store.frames), bytes_of(past)
    one = remember(past.begin("one", 1), here, 60)
    one_bytes = bytes_of(one)
    two = remember(past.begin("two", 2), there, 60)

    assert past.segments == () and past.num_frames == 30 and past.store.frames == shared
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(past), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(one), one_bytes, strict=True))
    assert one.slots != two.slots
    again = remember(past.begin("one", 1), here, 60)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(again), one_bytes, strict=True))
    assert again.decisions == one.decisions


SPARSE = dict(policy="cover", slow_similarity_threshold=0.999)
"""A threshold that most frames of the walk are below, so that slow is full and evicts."""


@pytest.mark.parametrize("settings", [SPARSE, dict(policy="fifo", eviction="redundant"), {}], ids=str)
def test_a_commit_compares_each_new_frame_once(monkeypatch, settings):
    """A frame that leaves fast is compared with sink and slow, and no two frames are compared twice."""
    memory, keys, compared = make(**settings), views_of_a_walk(120, seed=1), [0]

    def compare(a, b, add_up=None):
        compared[-1] += 1
        return key_similarity(a, b)

    monkeypatch.setattr(stores_module, "key_similarity", compare)
    for num_frames in range(3, 121, 3):
        compared.append(0)
        memory = remember(memory, keys, num_frames)
    num_slots = memory.config.sink + memory.config.slow
    assert 0 < sum(compared) <= len(memory.decisions) * num_slots
    if settings.get("policy") == "fifo":  # it compares nothing until slow is full, then all that is there
        compared.remove(max(compared))
    assert max(compared) <= 3 * num_slots
    if settings:
        assert sum(decision.evicted is not None for decision in memory.decisions) > 20
    assert len(memory.store.similarities) == (12 * 11 / 2 if settings else 0)


def test_known_similarities_decide_what_fresh_ones_decide():
    keys = views_of_a_walk(120, seed=1)
    kept = forgetful = make(**SPARSE)
    for num_frames in range(3, 121, 3):
        kept = remember(kept, keys, num_frames)
        forgetful = dataclasses.replace(forgetful, store=dataclasses.replace(forgetful.store, similarities={}))
        forgetful = remember(forgetful, keys, num_frames)
    assert kept.slots == forgetful.slots and kept.decisions == forgetful.decisions
    assert kept.store.similarities == forgetful.store.similarities


def test_similarities_follow_what_becomes_of_the_frames():
    """They are of slow frames with the keys of now: new keys, and frames that are forgotten, have none."""
    memory = remember(make(**SPARSE), views_of_a_walk(60, seed=1), 60)
    before, (first, second) = dict(memory.store.similarities), memory.slots.slow[:2]
    rewritten = memory.write([first], chunk_of(views_of_a_walk(60, seed=2), [first])[1])
    assert {*before} - {*rewritten.store.similarities} == {pair for pair in before if first in pair}
    assert {*memory.restrict_to([first, second]).store.similarities} == {(first, second)}
    assert not memory.compact().store.similarities
    remember(memory, views_of_a_walk(90, seed=2), 90)
    assert memory.store.similarities == before


def test_memories_share_storage():
    keys = views_of_a_walk(60, seed=1)
    past = remember(make(), keys, 30)
    future = remember(past, keys, 36)
    both = past.store.frames.keys() & future.store.frames.keys()
    assert len(both) > 5
    for frame in both:
        assert past.store.frames[frame].keys.data_ptr() == future.store.frames[frame].keys.data_ptr()
        assert past.store.frames[frame].values.data_ptr() == future.store.frames[frame].values.data_ptr()
    for old, new in zip(past.latent_chunks, future.latent_chunks):
        assert old.data_ptr() == new.data_ptr()


def test_a_remembered_frame_does_not_keep_its_chunk_alive():
    memory = remember(make(), views_of_a_walk(60, seed=1), 60)
    for held in memory.store.frames.values():
        for tensor in (held.keys, held.values):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_bytes_are_flat_once_full():
    memory, keys = make(policy="fifo"), views_of_a_walk(240, seed=3)
    a_frame = 2 * LAYERS * TOKENS * HEADS * HEAD_DIM * 4
    held = []
    for num_frames in range(3, 241, 3):
        memory = remember(memory, keys, num_frames)
        held.append(memory.num_bytes)
    assert held[:6] == [a_frame * min(3 * c, 18) for c in range(1, 7)]
    assert set(held[6:]) == {a_frame * memory.config.capacity}


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().latent_chunks = ()


@pytest.mark.parametrize(
    "shape", [(1, 15, 3, 4, 6), (1, 16, 3, 6, 4), (2, 16, 3, 4, 6), (1, 16, 4, 6), (1, 16, 0, 4, 6)]
)
def test_other_sizes_are_refused(shape):
    _, kept = chunk_of(views_of_a_walk(3, seed=1), range(3))
    with pytest.raises(ValueError, match="latents"):
        make().append(torch.zeros(shape), kept)


def test_latents_of_absolute_frames():
    keys = views_of_a_walk(60, seed=1)
    memory = remember(make(), keys, 60)
    whole = torch.cat(memory.latent_chunks, dim=2)
    for frames in (memory.slots.all, (7,), (40, 2, 13)):
        assert torch.equal(memory.latents_of(frames), whole[:, :, list(frames)])


def test_to_converts_keys_and_leaves_the_film():
    memory = remember(make(), views_of_a_walk(30, seed=1), 30)
    half = memory.to("cpu", torch.bfloat16)
    assert {held.keys.dtype for held in half.store.frames.values()} == {torch.bfloat16}
    assert {held.values.dtype for held in half.store.frames.values()} == {torch.bfloat16}
    assert {chunk.dtype for chunk in half.latent_chunks} == {torch.float32}
    assert {held.keys.dtype for held in memory.store.frames.values()} == {torch.float32}


def test_similarity_is_the_mean_of_per_token_cosines():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, LAYERS, 1, TOKENS, HEADS, HEAD_DIM, generator=generator)
    cosines = [
        torch.dot(a[i, 0, p].flatten(), b[i, 0, p].flatten()) / a[i, 0, p].norm() / b[i, 0, p].norm()
        for i in range(LAYERS)
        for p in range(TOKENS)
    ]
    assert key_similarity(a, b).item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert key_similarity(a, a).item() == pytest.approx(1, abs=1e-6)
    assert key_similarity(a, 3 * a).item() == pytest.approx(1, abs=1e-6)


def test_similarity_sees_what_a_mean_over_tokens_cannot():
    """A panned picture has the same tokens in other places: the same mean, another view."""
    a = torch.randn(LAYERS, 1, TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    panned = a.roll(1, dims=2)
    assert torch.allclose(a.mean(2), panned.mean(2), atol=1e-6)
    assert key_similarity(a, panned) < 0.6


def test_similarity_weighs_layers_equally_whatever_their_size():
    a = torch.randn(LAYERS, 1, TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0] = -b[0]
    louder = torch.tensor([1000.0, 1.0, 1.0]).view(-1, 1, 1, 1, 1)
    assert key_similarity(a, b).item() == pytest.approx(1 / 3, abs=1e-6)
    assert key_similarity(a * louder, b * louder).item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("elements", [1, TOKENS * HEADS * HEAD_DIM, 2 * TOKENS * HEADS * HEAD_DIM])
def test_similarity_in_parts_is_the_same(monkeypatch, elements):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, LAYERS, 1, TOKENS, HEADS, HEAD_DIM, generator=generator)
    whole = key_similarity(a, b)
    monkeypatch.setattr(stores_module, "SIMILARITY_ELEMENTS", elements)
    assert torch.equal(key_similarity(a, b), whole)


def test_similarity_of_half_precision_keys_is_taken_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(LAYERS, 1, TOKENS, HEADS, HEAD_DIM, generator=generator).bfloat16()
    b = (a + 0.3 * torch.randn(a.shape, generator=generator)).bfloat16()
    assert torch.equal(key_similarity(a, b), key_similarity(a.float(), b.float()))
