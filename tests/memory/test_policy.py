"""Who stays: every policy against a brute-force restatement of its rule."""

import random
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from context_forcing.memory import MemoryConfig
from context_forcing.memory.config import CLEAN_POLICIES, EVICTIONS, RECALL
from context_forcing.memory.policy import Slots, advance

SIZES = [
    dict(sink=3, slow=12, fast=6, chunk=3),
    dict(sink=0, slow=4, fast=6, chunk=3),
    dict(sink=3, slow=0, fast=6, chunk=3),
    dict(sink=3, slow=0, fast=3, chunk=3),
    dict(sink=1, slow=1, fast=2, chunk=1),
    dict(sink=5, slow=7, fast=4, chunk=1),
    dict(sink=0, slow=0, fast=1, chunk=1),
    dict(sink=4, slow=3, fast=4, chunk=3),
    dict(sink=2, slow=5, fast=11, chunk=3),
]
BY_FRAME = [policy for policy in CLEAN_POLICIES if policy != RECALL]
"""Policies that decide about single frames (test_recall.py has the other one)."""
LEVELS = [0.3, 0.6, 0.9, 0.95, 0.97, 1.0]
"""0.95 is tau itself: at the threshold a frame is not new."""


def random_similarity(seed):
    known = {}
    rng = random.Random(seed)

    def similarity(a, b):
        pair = (min(a, b), max(a, b))
        if pair not in known:
            known[pair] = rng.choice(LEVELS) if rng.random() < 0.5 else rng.uniform(0.2, 1)
        return known[pair]

    return similarity


def roll(config, num_chunks, similarity):
    """Slots after every chunk, with the decisions so far."""
    slots, decisions = Slots(), ()
    for c in range(num_chunks):
        frames = range(c * config.chunk, (c + 1) * config.chunk)
        slots, new = advance(slots, config, frames, lambda frame, others: [similarity(frame, o) for o in others])
        decisions += new
        yield slots, decisions


@pytest.mark.parametrize("policy", BY_FRAME)
@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))
def test_300_chunks_against_brute_force(expected, policy, eviction, sizes):
    config = MemoryConfig(policy=policy, eviction=eviction, uniform_stride=4, **sizes)
    similarity = random_similarity(f"{policy} {eviction} {sizes}")
    for done, (slots, decisions) in enumerate(roll(config, 300, similarity), 1):
        if done < 20 or done % 20 == 0:
            sink, slow, fast, decided = expected(config, done * config.chunk, similarity)
            assert (list(slots.sink), list(slots.slow), list(slots.fast)) == (sink, slow, fast)
            assert [astuple(d) for d in decisions] == decided
        assert len(slots.all) <= config.capacity
        assert len(slots.slow) <= config.slow
        assert len(set(slots.all)) == len(slots.all)
        assert all(list(part) == sorted(part) for part in (slots.sink, slots.slow, slots.fast))
        assert list(slots.all) == sorted(slots.all), "ranks must follow time"
        assert slots.all[-1:] == (done * config.chunk - 1,) or config.fast == config.chunk


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sink=st.integers(0, 6),
    slow=st.integers(0, 6),
    spare=st.integers(0, 5),
    chunk=st.integers(1, 4),
    policy=st.sampled_from(BY_FRAME),
    eviction=st.sampled_from(EVICTIONS),
    against_sink=st.booleans(),
    stride=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_any_sizes_against_brute_force(
    expected, sink, slow, spare, chunk, policy, eviction, against_sink, stride, seed
):
    config = MemoryConfig(
        sink=sink, slow=slow, fast=chunk + (1 if slow else 0) + spare, chunk=chunk, policy=policy, eviction=eviction,
        novel_against_sink=against_sink, uniform_stride=stride, slow_similarity_threshold=0.9, window=64,
    )  # fmt: skip
    similarity = random_similarity(seed)
    *_, (slots, decisions) = roll(config, 12, similarity)
    sink, slow, fast, decided = expected(config, 12 * chunk, similarity)
    assert (list(slots.sink), list(slots.slow), list(slots.fast)) == (sink, slow, fast)
    assert [astuple(d) for d in decisions] == decided


@pytest.mark.parametrize("policy", BY_FRAME)
def test_positions_stay_in_the_window_for_5000_chunks(policy):
    config = MemoryConfig(policy=policy)
    rng = random.Random(policy)
    slots, full = Slots(), 0
    for c in range(5000):
        assert len(slots.all) + config.chunk <= config.window
        full += len(slots.all) == config.capacity
        slots, _ = advance(slots, config, range(3 * c, 3 * c + 3), lambda _, others: [rng.random() for _ in others])
    assert full > 4900


def test_the_past_is_not_touched():
    config = MemoryConfig()
    before = Slots(sink=(0, 1, 2), slow=(3,), fast=(4, 5, 6), similarity_to_previous=(0.5, 0.5, 0.5))
    advance(before, config, range(7, 10), lambda _, others: [0.1] * len(others))
    assert before == Slots(sink=(0, 1, 2), slow=(3,), fast=(4, 5, 6), similarity_to_previous=(0.5, 0.5, 0.5))


def test_redundant_spreads_the_slots_over_a_pan():
    """Similarity falls with distance. The first frame stays, the others but the newest are spread evenly."""
    config = MemoryConfig(policy="fifo", eviction="redundant", sink=0, slow=5)
    *_, (slots, _) = roll(config, 20, lambda a, b: 1 - abs(a - b) / 100)
    gaps = [b - a for a, b in zip(slots.slow, slots.slow[1:])]
    assert slots.slow[0] == 0 and slots.slow[-1] >= 50 and max(gaps[:-1]) <= 2 * min(gaps[:-1])


def test_cover_stays_spread_where_novel_keeps_the_end_of_a_pan():
    """A pan of 120 columns and a long stay. A column lowers the similarity by 0.02: every third one is new."""
    column = lambda frame: min(frame, 120)
    alike = lambda a, b: 1 - abs(column(a) - column(b)) / 50
    seen = {}
    for policy in ("novel", "cover"):
        *_, (slots, _) = roll(MemoryConfig(policy=policy), 70, alike)
        seen[policy] = slots.slow
    assert min(seen["novel"]) > 80 and max(seen["novel"]) <= 120
    assert min(seen["cover"]) < 10 and max(seen["cover"]) > 100
    assert max(b - a for a, b in zip(seen["cover"], seen["cover"][1:])) < 20


def returning_to_a_place(policy):
    """A landmark (frames 3-5), then a camera that moves back and forth between two other places."""
    place = lambda f: "home" if f < 3 else "landmark" if f < 6 else "ab"[f // 3 % 2]
    alike = lambda a, b: 1.0 if place(a) == place(b) else 0.5
    config = MemoryConfig(policy=policy, slow=4)
    *_, (slots, _) = roll(config, 40, alike)
    return {place(frame) for frame in slots.slow}


def test_novel_keeps_one_copy_of_each_place_where_clean_is_flushed():
    assert returning_to_a_place("novel") == returning_to_a_place("cover") == {"landmark", "a", "b"}
    assert returning_to_a_place("clean") == {"a", "b"}
