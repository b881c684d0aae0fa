"""The next part is copied while one is used: what is issued when, and what waits for what, without a CUDA device."""

import contextlib
import dataclasses
import random

import pytest
import torch

from context_forcing.memory import prefetch as prefetching
from context_forcing.memory.packed import Packed
from context_forcing.memory.prefetch import Prefetch, in_pinned_ram
from context_forcing.model.attention import sdpa
from context_forcing.model.offload import Offload
from context_forcing.model.sampler import SamplerOptions, seeded_noise

CPU = torch.device("cpu")
SMALL = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)
SIGMAS = (1.0, 0.6)


class Streams:
    """The stream that copies, and in `Computing` the other one, in place of torch's.

    A copy is made as late as the rules allow: when the stream that computes waits for it. One that does not wait for
    the last use of its slot fails.
    """

    def __init__(self, monkeypatch):
        self.log: list[tuple[str, int]] = []
        """Copies and uses of parts, as they were issued."""
        self.issued, self.num_done = [], 0
        self.num_uses, self.num_ended, self.last_use = 0, 0, {}
        self.is_copying, self.recorded = False, set()
        computing, begin = Computing(self), Prefetch.__init__
        late = lambda copy: lambda slot, number: self.issue(slot, number, lambda: copy(slot, number))
        monkeypatch.setattr(Prefetch, "__init__", lambda it, slots, copy, count: begin(it, slots, late(copy), count))
        monkeypatch.setattr(prefetching, "copy_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: computing)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: self.recorded.add(tensor.data_ptr()))

    @contextlib.contextmanager
    def entered(self, stream):
        assert stream is self
        self.is_copying = True
        yield
        self.is_copying = False

    def wait_stream(self, other):
        assert isinstance(other, Computing)
        self.num_ended = self.num_uses

    def record_event(self):
        return len(self.issued)

    def issue(self, slot, number, copy):
        """A copy of a part to a slot."""
        places = {tensor.data_ptr() for tensor in slot}
        assert self.is_copying and places <= self.recorded
        assert max(self.last_use.get(place, 0) for place in places) <= self.num_ended, "it is still in use"
        self.log.append(("copy", number))
        self.issued.append(copy)

    def use(self, number, *tensors):
        """The stream that computes uses a part."""
        self.num_uses += 1
        self.last_use |= {tensor.untyped_storage().data_ptr(): self.num_uses for tensor in tensors}
        self.log.append(("use", number))


class Computing:
    def __init__(self, streams):
        self.streams = streams

    def wait_event(self, event):
        for copy in self.streams.issued[self.streams.num_done : event]:
            copy()
        self.streams.num_done = max(event, self.streams.num_done)


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def ahead_of_use(log, count):
    """Whether the part after every part is on its way before that part is used."""
    return all(log[at - 1] == ("copy", (number + 1) % count) for at, (what, number) in enumerate(log) if what == "use")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_are_whole_in_any_order(streams, count):
    parts, slots = torch.arange(float(count)).expand(4, -1).T, [(torch.full((4,), -1.0),) for _ in "ab"]
    prefetch, order = Prefetch(slots, lambda slot, number: slot[0].copy_(parts[number]), count), random.Random(0)
    numbers = [*range(count), *range(count), *(order.randrange(count) for _ in range(40))]
    for number in numbers:
        (found,) = prefetch.take(number)
        streams.use(number, found)
        assert torch.equal(found, parts[number])
    assert ahead_of_use(streams.log, count)
    in_turn = streams.log[: 4 * count + 1]
    assert sum(what == "copy" for what, _ in in_turn) == 2 * count + 1, "none is copied twice"


def test_an_error_leaves_no_part_half_copied():
    """The error of an interrupt, or of memory at its end, while a part is copied."""
    fails, slots = [], [(torch.zeros(2),) for _ in "ab"]

    def copy(slot, number):
        slot[0][0] = number
        if fails:
            raise fails.pop()
        slot[0][1] = number

    prefetch = Prefetch(slots, copy, 5)
    for number, again in [(0, 0), (1, 1), (1, 4), (4, 2), (2, 0)]:
        fails.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prefetch.take(number)
        assert prefetch.take(again)[0].tolist() == [again, again]
        assert prefetch.take(again + 1)[0].tolist() == [again + 1, again + 1]


@pytest.mark.parametrize("commit_attends", ["all", "fast only", "itself"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@torch.inference_mode()
def test_layers_are_copied_ahead(streams, make_net, make_sampler, empty_memory, same_memory, commit_attends, kv_dtype):
    """The memory of `from RAM` is that of `at once`, however late copies are made."""
    net, made = make_net(num_layers=3), []

    def attention(q, k, v, bias=None):
        if bias is None and k.shape[1] > q.shape[1]:  # self-attention over a memory
            assert k.untyped_storage().data_ptr() in streams.recorded
            streams.use(streams.log[-1][1] - 1, k, v)
        return sdpa(q, k, v, bias)

    for placement, function in (("at once", sdpa), ("from RAM", attention)):
        options = SamplerOptions(kv_placement=placement, kv_dtype=kv_dtype)
        sampler = make_sampler(net, attention=function, commit_attends=commit_attends)
        memory = empty_memory(**SMALL)
        noise = seeded_noise(5, memory.latent_size)
        for memory in dataclasses.replace(sampler, options=options).rollout(memory, 6, sigmas=SIGMAS, noise=noise):
            pass
        made.append(memory)
    assert same_memory(*made)
    log = [(what, number % 3) for what, number in streams.log]
    in_commit = 0 if commit_attends == "itself" else 2
    assert [number for what, number in log if what == "use"] == 5 * [0, 1, 2, 0, 1, 2, *range(in_commit)]
    assert ahead_of_use(log, 3) and log.count(("copy", 0)) == 5 * 3


@torch.inference_mode()
def test_a_pass_after_one_that_failed(streams, make_net, make_sampler, empty_memory):
    net, fails = make_net(num_layers=3), []

    def attention(q, k, v, bias=None):
        if fails and fails.pop():
            raise KeyboardInterrupt
        return sdpa(q, k, v, bias)

    sampler = make_sampler(net, attention=attention, kv_placement="from RAM")
    memory = empty_memory(**SMALL)
    for memory in sampler.rollout(memory, 3, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)):
        pass
    attend = sampler.network.attend(sampler.view(memory), 2, memory.latent_size)
    a_pass = lambda: sampler.network.flow(torch.ones(memory.chunk_shape), 0.5, sampler.text, attend)
    expected = a_pass()
    for calls in range(1, 6):
        fails[:] = [True, *calls * [False]]
        with pytest.raises(KeyboardInterrupt):
            a_pass()
        assert torch.equal(a_pass(), expected)


def test_weights_are_copied_ahead_the_same_way(streams, make_net):
    net = make_net(num_layers=3)
    offload = Offload(net, CPU)

    def function(block, number):
        streams.use(number, *block.parameters())
        return [weight.clone() for weight in block.parameters()]

    for number in [0, 1, 2, 0, 1, 2, 1, 0]:
        found = offload(net.blocks[number], function, number)
        assert all(map(torch.equal, found, net.blocks[number].parameters()))
    assert ahead_of_use(streams.log, 3)


def test_ram_that_cannot_be_pinned_is_told_once(monkeypatch, caplog):
    def empty_like(*args, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*args, **options)

    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", empty_like)
    prefetching._say_unpinned.cache_clear()
    x = torch.randn(3, 4)
    for _ in range(2):
        copy = in_pinned_ram(x)
        assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    (record,) = caplog.records
    line = record.getMessage()
    assert "RAM cannot be pinned (CUDA error: out of memory" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_only_a_sampler_on_cuda_pins_and_a_memory_at_rest_is_not_pinned(
    net, make_sampler, empty_memory, same_memory, monkeypatch, kv_dtype
):
    pinned = []

    def in_pinned_ram(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr("context_forcing.memory.stores.in_pinned_ram", in_pinned_ram)
    sampler = make_sampler(net)
    sampler = dataclasses.replace(sampler, options=SamplerOptions(kv_placement="from RAM", kv_dtype=kv_dtype))
    memory = empty_memory(**SMALL)
    for memory in sampler.rollout(memory, 5, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)):
        pass
    assert not pinned and not any(kv.pinned for _, kv in memory.store.frame_kvs())
    on_cuda = dataclasses.replace(sampler, network=dataclasses.replace(sampler.network, device=torch.device("cuda")))
    for_copies = on_cuda._kept(memory)
    held = {tensor.data_ptr() for tensor in for_copies.store.tensors()}
    assert held == {tensor.data_ptr() for tensor in pinned} and all(kv.pinned for _, kv in for_copies.store.frame_kvs())
    assert any(isinstance(kv.keys, Packed) for _, kv in for_copies.store.frame_kvs()) == (kv_dtype == "int8")
    assert same_memory(for_copies, memory) and len(pinned) == len(memory.store.tensors())
    assert {id(kv) for _, kv in on_cuda._kept(for_copies).store.frame_kvs()} == {
        id(kv) for _, kv in for_copies.store.frame_kvs()
    }, "what is pinned is not copied again"
    at_rest = for_copies.to("cpu")
    assert same_memory(at_rest, memory) and not held & {tensor.data_ptr() for tensor in at_rest.store.tensors()}
    assert {id(kv) for _, kv in for_copies.to("cpu", before=memory).store.frame_kvs()} == {
        id(kv) for _, kv in memory.store.frame_kvs()
    }, "what lies there already is shared"
