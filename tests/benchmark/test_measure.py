"""Clocks, options, and what a benchmark finds on tiny networks."""

import time

import pytest
import torch

from context_forcing.benchmark import measure as measuring
from context_forcing.benchmark.clock import PartClock, Spent, peak_bytes
from context_forcing.benchmark.loops import OurLoop, filled, is_full, make_port, num_remembered
from context_forcing.benchmark.measure import Plan, measure
from context_forcing.benchmark.ports import ComfyUILoop
from context_forcing.benchmark.results import ratios, relative_difference
from context_forcing.benchmark.subject import Setup, parse_setups, random_subject

CPU = torch.device("cpu")
TINY = (32, 32)


@pytest.fixture(scope="module")
def subject():
    return random_subject("demo", 1, CPU)


def test_options_are_combined_in_order():
    setups = parse_setups(["attention=sdpa,sage dtype=fp32,bf16", "kv_placement=by layer,from RAM"])
    assert len(setups) == 8 and setups[0] == Setup(attention="sdpa", dtype="fp32", kv_placement="by layer")
    assert setups[-1] == Setup(attention="sage", dtype="bf16", kv_placement="from RAM")
    assert setups[1].differences(setups[0]) == "kv_placement=from RAM"
    assert parse_setups([]) == [Setup()]


@pytest.mark.parametrize(
    "options, message",
    [
        ("speed=high", "^options: 'speed=high' is not NAME=VALUE,VALUE with a NAME of attention, dtype"),
        ("dtype=", "^options: 'dtype='"),
        ("dtype=fp32 dtype=bf16", "^options: dtype is given twice"),
        ("compile=maybe", "^compile: 'maybe' is not one of off, on"),
        ("compile=on offload=on", "^compile: on has no effect with offload=on"),
        (f"policy={'x,' * 999}x memory=a,b", "^options: 2000 combinations are too many; give values for 1000 at most"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        parse_setups([options])


def test_a_clock_keeps_parts_apart():
    clock = PartClock(CPU)
    clock.switch("one")
    time.sleep(0.02)
    assert clock.switch("two") == "one"
    clock.switch("one")
    time.sleep(0.02)
    spent = clock.take()
    assert 0.04 <= spent.wall["one"] and spent.cpu["one"] < spent.wall["one"] and spent.wall["two"] < 0.02
    assert clock.take().wall == {}, "a stopped clock counts nothing"


def test_ratios_are_of_the_same_round():
    spent = lambda seconds: Spent(wall={"denoise": seconds}, cpu={"denoise": 2 * seconds})
    fast, slow = [spent(1.0), spent(10.0), spent(1.0)], [spent(2.0), spent(20.0), spent(2.0)]
    assert ratios(fast, slow) == (0.5, 0.5)
    with_text = [Spent(wall={**each.wall, "text": 9.0}, cpu={**each.cpu, "text": 9.0}) for each in slow]
    assert ratios(fast, with_text, without="text") == (0.5, 0.5)
    assert ratios(fast, with_text) == (1 / 11, 2 / 13)


def test_peak_is_what_is_held_at_once(capfd):
    def function():
        first = torch.zeros(1_000_000)
        del first
        second, third = torch.zeros(1_500_000), torch.zeros(500_000)
        return second, third

    assert peak_bytes(CPU, function) == pytest.approx(8e6, rel=0.01)
    assert capfd.readouterr().err == "", "the profiler prints nothing"


@pytest.mark.parametrize("policy", ["novel", "fifo", "released"])
@torch.inference_mode()
def test_a_memory_is_filled(subject, policy):
    setup = Setup(policy=policy)
    sampler = subject.sampler(setup, torch.randn(1, 3, 4096))
    memory = filled(sampler, subject.empty_memory(setup, TINY), 0)
    assert is_full(memory) and num_remembered(memory) == (21 if policy == "released" else 18)
    assert filled(sampler, memory, 0, 2).num_frames == memory.num_frames + 6


@torch.inference_mode()
def test_a_memory_that_does_not_get_full_is_named(subject):
    setup = Setup(policy="clean")
    sampler = subject.sampler(setup, torch.randn(1, 3, 4096))
    empty = subject.empty_memory(setup, TINY)
    with pytest.raises(ValueError, match=r"^memory: 6 of 18 frames are remembered after 6; use policy=fifo"):
        filled(sampler, empty, 0, 2)


@torch.inference_mode()
def test_loops_agree_and_commit_is_told_once(subject):
    setup = Setup()
    text = subject.pipeline(setup).text_encoder.encode(measuring.PROMPT)
    memory = filled(subject.sampler(setup, text), subject.empty_memory(setup, TINY), 0)
    assert memory.slots.all == tuple(range(18)), "the ports remember the same frames"
    ours = OurLoop("ours", subject, setup, memory, 0)
    told = []
    x0 = ours.chunk(told.append)
    assert told == ["commit"]
    ours.chunk()
    assert told == ["commit"], "nobody watches any more"
    port = make_port(ComfyUILoop, ours, subject)
    assert relative_difference(port.chunk(told.append), x0) < 1e-5
    passes = len(subject.card.sigmas) + 1
    assert told.count("text") == passes and told.count("commit") == 2


def test_what_does_not_run_is_named_and_the_rest_is_measured(subject, monkeypatch):
    monkeypatch.setattr(measuring, "EARLY", 7)
    monkeypatch.setattr(measuring, "LATE", 9)
    setups = tuple(parse_setups(["dtype=fp32,bf16 attention=sdpa,nothing"]))
    said = []
    plan = Plan(setups=setups, sizes=(TINY,), chunks=2, warmup=1, film=False, growth=True)
    (result,) = measure(subject, plan, said.append)
    names = [loop.name for loop in result.speed]
    assert names == ["dtype=fp32", "dtype=bf16", "ComfyUI ar_video", "Self-Forcing"]
    assert [*result.not_run] == ["attention=nothing dtype=fp32", "attention=nothing dtype=bf16"]
    first, half, *ports = result.speed
    assert first.difference == 0 and half.difference > 1e-4 and all(port.difference < 1e-5 for port in ports)
    assert half.weights_bytes * 2 == first.weights_bytes
    for loop in result.speed:
        assert len(loop.rounds) == 2 and loop.measured_bytes > 0 and loop.frames == 12
        parts = {"denoise", "commit"} | ({"text"} if loop in ports else set())
        assert all({*spent.wall} == parts and min(spent.wall.values()) > 0 for spent in loop.rounds)
    (growth,) = result.growth
    assert len(growth.early) == len(growth.late) == 2
    assert result.films == () and result.drift == () and said


def test_sizes_are_timed_in_turn(subject, monkeypatch):
    order, timed = [], measuring._Bench.timed
    monkeypatch.setattr(measuring._Bench, "timed", lambda bench, loop: order.append(bench.size) or timed(bench, loop))
    plan = Plan(setups=(Setup(),), sizes=((32, 32), (48, 32)), chunks=2, warmup=1, film=False)
    small, large = measure(subject, plan, lambda note: None)
    assert small.size == (32, 32) and large.size == (48, 32)
    assert [order[first : first + 6].count((32, 32)) for first in (0, 6, 12)] == [3, 3, 3]
    assert order[0] == (32, 32) and order[8] == (48, 32), "another loop begins every round"
    for result in (small, large):
        assert [len(loop.rounds) for loop in result.speed] == [2, 2, 2]
        assert all(loop.difference < 1e-5 for loop in result.speed)
    assert large.speed[0].measured_bytes > small.speed[0].measured_bytes


def test_no_setup_runs(subject):
    plan = Plan(setups=(Setup(attention="nothing"),), sizes=(TINY,))
    with pytest.raises(ValueError, match=r"^options: no setup runs on this machine \(attention: 'nothing' is not"):
        measure(subject, plan, lambda note: None)


def test_plans_that_cannot_be():
    with pytest.raises(ValueError, match="^drift: there is one setup"):
        Plan(setups=(Setup(),), sizes=(TINY,), drift=True)
    with pytest.raises(ValueError, match="^warmup: 0 is below 1"):
        Plan(setups=(Setup(),), sizes=(TINY,), warmup=0)
    with pytest.raises(ValueError, match="^seconds: nan must be above 0"):
        Plan(setups=(Setup(),), sizes=(TINY,), seconds=float("nan"))
    with pytest.raises(ValueError, match=r"^size: \(\(32, 32\), \(32, 32\)\) must be one size or more, each once"):
        Plan(setups=(Setup(),), sizes=(TINY, TINY))
    with pytest.raises(ValueError, match="^size: 65536x65536 is more than"):
        Plan(setups=(Setup(),), sizes=((65536, 65536),))


def test_a_drift_of_one_is_refused_before_anything_is_timed(subject, monkeypatch):
    monkeypatch.setattr(measuring, "filled", lambda sampler, memory, seed: memory)
    monkeypatch.setattr(measuring.OurLoop, "chunk", lambda loop: torch.zeros(1))
    plan = Plan(setups=tuple(parse_setups(["attention=sdpa,nothing"])), sizes=(TINY,), drift=True)
    monkeypatch.setattr(measuring, "_time", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="^drift: only default runs"):
        measure(subject, plan, lambda note: None)


@pytest.mark.parametrize("size, layers, message", [("huge", 1, "^size: 'huge'"), ("demo", 9, "^layers: 9; demo has 6")])
def test_sizes_that_are_not_there(size, layers, message):
    with pytest.raises(ValueError, match=message):
        random_subject(size, layers, CPU)


def test_a_film_is_as_fast_as_its_slowest_part(subject, monkeypatch):
    """Denoising runs ahead of decoding; a chunk is not faster for that."""
    pipeline = subject.pipeline(Setup())

    def decoded(vae, chunks):
        for chunk in chunks:
            time.sleep(0.5)
            yield torch.zeros(1, 3, 12, 32, 32)

    monkeypatch.setattr(type(pipeline.vae), "decode_stream", decoded)
    (result,) = measure(subject, Plan(setups=(Setup(),), sizes=(TINY,), chunks=2, warmup=1, ports=False), str)
    (film,) = result.films
    assert len(film.overlapped) == 2 and min(film.overlapped) > 0.4
