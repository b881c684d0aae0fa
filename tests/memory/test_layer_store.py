"""Memory of the released weights: every layer's slots by brute force, and what may be done with such a memory."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.config import MEMORY_PRESETS
from context_forcing.memory.history import forgotten_frames, frame_status
from context_forcing.memory.layer_store import LayerSlots, LayerStore
from context_forcing.memory.memory import OPERATIONS
from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.memory.stores import FrameStore

CONFIG = MEMORY_PRESETS["released"]
SIZE = (16, 4, 6)
TURNS = torch.eye(4)
"""Directions of keys: passes along the same one are alike, along others not."""


def keys(direction, frames=3, mark=0.0):
    """[1, T, P=2, N=1, E=4]; `mark` tells passes apart in the values."""
    k = TURNS[direction].expand(1, frames, 2, 1, 4).clone()
    return k, k + mark


def passes(layer, first, directions):
    for number, direction in enumerate(directions):
        layer = layer.take(CONFIG, first, *keys(direction, mark=100 * first + number))
    return layer


def test_the_first_pass_unlike_the_one_before_is_the_one_kept():
    layer = passes(LayerSlots(), 0, [0, 0])
    layer = passes(layer, 3, [1, 2])
    assert layer.num_slow == 0, "no decision before the chunk after the first two"
    layer = passes(layer, 6, [2, 2, 3, 0])
    assert layer.frames == (0, 1, 2, 6, 4, 5, 6, 7, 8) and layer.num_slow == 1
    assert (layer.entries[3].values - layer.entries[3].keys).unique().tolist() == [602], "as it stood in its third pass"
    assert (layer.entries[6].values - layer.entries[6].keys).unique().tolist() == [603], "the chunk as it stood last"
    layer = passes(layer, 9, [0, 0, 0, 0])
    assert layer.num_slow == 1 and layer.frames[-3:] == (9, 10, 11), "nothing stood out"


def test_slots_once_full_against_a_plain_list():
    """Every chunk stands out; slow and fast are then plain queues, and what lies between goes by being written over."""
    layer, starts = LayerSlots(), []
    for chunk in range(30):
        first = 3 * chunk
        layer = passes(layer, first, [chunk % 4, chunk % 4])
        starts += [first] if first >= 6 else []
        slow = starts[-12:]
        assert layer.frames[:3] == (0, 1, 2)[: len(layer.frames)] and layer.num_slow == len(slow)
        if chunk:
            assert list(layer.frames[3 : 3 + len(slow)]) == slow
        assert layer.frames[-3:] == (first, first + 1, first + 2) and len(layer.frames) == min(21, first + 3)
        if chunk >= 20:
            assert layer.frames[15:] == tuple(range(first - 3, first + 3))
        values = [int((entry.values - entry.keys).mean()) // 100 for entry in layer.entries]
        assert values == [frame - frame % 3 for frame in layer.frames], "each slot holds the frame it says"


def test_layers_decide_for_themselves():
    one, other = LayerSlots(), LayerSlots()
    for chunk in range(4):
        one, other = passes(one, 3 * chunk, [chunk % 4]), passes(other, 3 * chunk, [0])
    assert (one.num_slow, other.num_slow) == (2, 0)
    memory = empty_memory(CONFIG, SIZE)
    for _ in range(4):
        memory = memory.append(torch.zeros(1, 16, 3, 4, 6), [one, other])
    assert memory.slots.sink == (0, 1, 2) and memory.slots.slow == (6, 9)
    assert set(memory.slots.all) == set(range(12)), "what any layer holds"


def test_a_kept_frame_does_not_hold_its_whole_chunk():
    layer = passes(passes(passes(LayerSlots(), 0, [0]), 3, [1]), 6, [2])
    kept = layer.entries[3].keys
    assert kept.untyped_storage().nbytes() == kept.nbytes


def two_layers(num_chunks=9):
    memory, layers = empty_memory(CONFIG, SIZE), [LayerSlots(), LayerSlots()]
    for chunk in range(num_chunks):
        layers = [passes(layer, 3 * chunk, [(chunk + n) % 4, 0]) for n, layer in enumerate(layers)]
        memory = memory.append(torch.full((1, 16, 3, 4, 6), float(chunk)), layers)
    return memory


def same(a, b):
    left, right = a.tensors(), b.tensors()
    return a.slots == b.slots and len(left) == len(right) and all(map(torch.equal, left, right))


def test_saved_and_read_it_is_the_same(tmp_path):
    memory = two_layers()
    save_memory(tmp_path / "memory", memory)
    again = load_memory(tmp_path / "memory")
    assert isinstance(again.store, LayerStore) and same(memory, again)
    assert [layer.frames for layer in again.store.layers] == [layer.frames for layer in memory.store.layers]
    save_memory(tmp_path / "memory2", again)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "memory2").read_bytes()


def test_moving_shares_what_is_there_already():
    memory = two_layers()
    there = memory.to("cpu", torch.float64)
    assert memory.num_bytes > 0 and there.store.layers[0].entries[0].keys.dtype == torch.float64
    further = there.to("cpu", torch.float32, before=memory)
    assert all(a is b for x, y in zip(further.store.layers, memory.store.layers) for a, b in zip(x.entries, y.entries))


def test_what_cannot_be_done_with_it_is_refused():
    memory = two_layers()
    with pytest.raises(ValueError, match="use the exact form"):
        memory.compact()
    for change in ("recache", "flush", "cut", "cut_new_sink"):
        with pytest.raises(ValueError, match="keep"):
            memory.begin("words", 0, change=change)
    assert memory.begin("words", 0).segments[-1].prompt == "words"
    with pytest.raises(ValueError, match="multiple"):
        dataclasses.replace(CONFIG, sink=2)


def test_the_policy_decides_the_kind_of_store():
    assert type(empty_memory(MemoryConfig(), SIZE).store) is FrameStore
    assert type(empty_memory(CONFIG, SIZE).store) is LayerStore


def test_what_is_not_supported_is_known_before_work_begins():
    per_layer, per_frame = empty_memory(CONFIG, SIZE), empty_memory(MemoryConfig(), SIZE)
    assert [name for name in OPERATIONS if per_layer.supports(name)] == ["keep"]
    assert all(per_frame.supports(name) for name in OPERATIONS)
    with pytest.raises(ValueError, match="^attention: with policy released"):
        per_layer.check_supports("attention report")


def test_bytes_by_device():
    memory = two_layers()
    assert memory.num_bytes_on(torch.device("cpu")) == memory.num_bytes > 0 == memory.num_bytes_on(torch.device("cuda"))


def test_the_report_does_not_speak_of_cuts():
    memory = two_layers()
    assert not forgotten_frames(memory) and set(frame_status(memory)) <= {"sink", "slow", "fast", "not kept"}
