"""An out-of-memory in a chunk: it begins again with a smaller placement of keys and values, to the same memory."""

import weakref

import pytest
import torch

from context_forcing.memory.stores import KV_PLACEMENTS
from context_forcing.memory.view import KVBuffer
from context_forcing.model.attention import sdpa
from context_forcing.model.fallback import NO_FALLBACK, Fallback
from context_forcing.model.segment import generate_segment

SMALL = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)
OUT_OF_MEMORY = {
    "CUDA": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf which none is free"),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError,
}
"""A new error for every call: an error holds the frames that it went through."""


class Failing:
    """sdpa that raises an error in some of its calls. A chunk has 10, of which 2 are of the commit pass."""

    def __init__(self, error=MemoryError, calls=()):
        self.error, self.calls, self.count = error, calls, 0

    def __call__(self, *args):
        self.count += 1
        if self.count - 1 in self.calls:
            raise self.error()
        return sdpa(*args)


@pytest.fixture(scope="module")
def tell(net, make_sampler, empty_memory):
    """(attention, kv_placement, fallback) -> two segments of three chunks; the second one reads its frames again."""

    def text(seed):
        return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))

    def go(attention, kv_placement="at once", fallback=None, policy="novel", change="recache"):
        memory = empty_memory(**SMALL | dict(policy=policy, fast=4 if policy != "released" else 3))
        sampler_of = lambda text: make_sampler(net, text=text, attention=attention, kv_placement=kv_placement)
        for seed in range(2):
            for memory in generate_segment(
                sampler_of, memory, text(seed), prompt="", seed=1, num_chunks=3, sigmas=(1.0, 0.6), change=change,
                blend=1, fallback=fallback or Fallback(kv_placement),
            ):  # fmt: skip
                pass
        return memory

    return go


@pytest.fixture(scope="module")
def whole(tell):
    """Attention that never failed, and the memory."""
    attention = Failing()
    return attention, tell(attention)


@pytest.mark.parametrize("call", [0, 29, 32, 40, -1], ids=["first", "commit", "recache", "blend", "last"])
def test_the_chunk_begins_again_and_the_memory_is_the_same(tell, whole, same_memory, caplog, call):
    attention, expected = whole
    failing = Failing(OUT_OF_MEMORY["CUDA"], (call % attention.count,))
    assert same_memory(tell(failing), expected) and failing.count > attention.count
    (record,) = caplog.records
    line = record.getMessage()
    assert "'at once' (CUDA out of memory" in line and line.endswith("--kv-placement 'by layer' begins so")
    assert len(line.splitlines()) == 1 and len(line) < 300


@pytest.mark.parametrize("first, error", [*zip(KV_PLACEMENTS, OUT_OF_MEMORY.values())], ids=OUT_OF_MEMORY)
def test_every_placement_that_is_left_is_tried_once(tell, whole, same_memory, caplog, first, error):
    left = KV_PLACEMENTS[KV_PLACEMENTS.index(first) + 1 :]
    fails_as_often = Failing(error, range(14, 14 + len(left)))
    assert same_memory(tell(fails_as_often, first), whole[1])
    assert [record.args[2] for record in caplog.records] == list(left)
    with pytest.raises(type(error())) as raised:
        tell(Failing(error, range(14, 15 + len(left))), first)
    assert str(raised.value) == str(error())


def test_the_released_memory_too(tell, same_memory):
    expected = tell(Failing(), policy="released", change="keep")
    assert same_memory(tell(Failing(MemoryError, (14, 16)), policy="released", change="keep"), expected)


class Interrupt(Exception):
    """As ComfyUI's InterruptProcessingException was; it is a BaseException today."""


@pytest.mark.parametrize("error", [Interrupt, KeyboardInterrupt, RuntimeError, ValueError])
def test_other_errors_are_errors(tell, caplog, error):
    failing = Failing(error, (14,))
    with pytest.raises(error):
        tell(failing)
    assert failing.count == 15 and not caplog.records


def test_without_a_fallback_it_is_an_error(tell):
    with pytest.raises(MemoryError):
        tell(Failing(MemoryError, (14,)), fallback=NO_FALLBACK)


def test_the_smaller_placement_stays(tell):
    """Also in the next segment, and what fails there falls from it."""
    fallback = Fallback("at once")
    made = tell(Failing(MemoryError, (2,)), fallback=fallback)
    assert fallback.kv_placement == "by layer"
    tell(Failing(MemoryError, (2,)), fallback=fallback)
    assert fallback.kv_placement == "from RAM" and made.num_frames == 12


def test_what_failed_is_free_before_the_next_attempt(tell, monkeypatch):
    """The view of the memory, which is as large as the memory; `make_room` gets the placement that comes next."""
    empty, buffers, seen = KVBuffer.empty, [], []

    def noted(*args):
        buffer = empty(*args)
        buffers.append(weakref.ref(buffer.keys))
        return buffer

    def make_room(memory, kv_placement):
        seen.append((kv_placement, memory.num_frames, len(buffers), [ref() for ref in buffers if ref() is not None]))

    monkeypatch.setattr(KVBuffer, "empty", staticmethod(noted))
    tell(Failing(OUT_OF_MEMORY["CPU"], (14, 15)), fallback=Fallback("at once", "layout", make_room))
    assert [(name, frames, alive) for name, frames, _, alive in seen] == [("by layer", 2, []), ("from RAM", 2, [])]
    assert [number for _, _, number, _ in seen] == [2, 3], "both layers at once, then one buffer"


def test_a_failure_to_make_room_is_one_of_the_attempt(tell, whole, same_memory, caplog):
    def make_room(memory, kv_placement):
        if kv_placement == "by layer":
            raise MemoryError

    fallback = Fallback("at once", make_room=make_room)
    assert same_memory(tell(Failing(MemoryError, (14,)), fallback=fallback), whole[1])
    assert [record.args[2] for record in caplog.records] == ["by layer", "from RAM"]


@pytest.mark.parametrize("policy", ["novel", "released"])
def test_keys_are_parked_for_all_who_hold_them(tell, policy):
    """Whoever waits for the next chunk holds the memory before: its copies on the device must not stay."""
    change = "keep" if policy == "released" else "recache"
    before = tell(sdpa, policy=policy, change=change)
    held = before.to("cpu")
    assert held.num_bytes == before.num_bytes > 0
    before.store.park(torch.device("meta"))
    assert {kv.keys.device.type for _, kv in held.store.frame_kvs()} == {"meta"}
    assert {kv.values.device.type for _, kv in held.store.frame_kvs()} == {"meta"}


def test_it_parks_for_ram_only(tell, monkeypatch):
    parked = []
    monkeypatch.setattr("context_forcing.memory.stores.FrameKV.park", lambda kv, device: parked.append(device))
    tell(Failing(MemoryError, (14,)))
    assert not parked
    tell(Failing(MemoryError, (14, 15)))
    assert len(parked) == 2 and set(parked) == {torch.device("cpu")}
