"""The costs that a dry run prints: against documented figures, torch's own count, and real settings."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.config import PRESETS
from context_forcing.model.network import Network
from context_forcing.model.sampler import seeded_noise
from context_forcing.model.wan import WanModel
from context_forcing.train import plan_stage
from context_forcing.train.config import NetworkConfig
from context_forcing.train.parallel import module_runner
from context_forcing.train.plan import block_flop, plan
from context_forcing.train.presets import CONFIGS, load_config
from context_forcing.train.stages.student import Student


def figure(made, what):
    return next(value for _, row, value in made.rows if row.startswith(what))


def test_the_1_3b_run_costs_what_is_documented():
    """docs/performance.md, Training: 22.7 GB per trained network, 2.84 GB for the frozen teacher. Keys and values take
    287.5 MB per frame: 18 remembered frames, and the 21 of the target until the backward pass."""
    made = plan(load_config("contextual", "wan2.1-1.3b"), 1)
    assert figure(made, "of a wan2.1-1.3b network") == 1_418_996_800
    assert figure(made, "critic: weights") == pytest.approx(22.7e9, rel=0.002)
    assert figure(made, "student: weights") == pytest.approx((22.7 + 5.68) * 1e9, rel=0.002)
    assert figure(made, "teacher, frozen") == pytest.approx(2.84e9, rel=0.002)
    assert figure(made, "keys and values of 39 frames") == pytest.approx(39 * 287.5e6, rel=0.002)
    assert figure(made, "weights gathered") == pytest.approx(3 * 2.84e9, rel=0.002)
    assert made.total("bytes") < 139 * 2**30, "fits one H200"
    chunk = block_flop(PRESETS["wan2.1-1.3b"], 3 * 1560, 21 * 1560)
    assert chunk == pytest.approx(4.1e13, rel=0.05)


def test_processes_share_and_adapters_save():
    alone, eight = (plan(load_config("contextual", "wan2.1-1.3b"), size) for size in (1, 8))
    assert figure(eight, "student: weights") == figure(alone, "student: weights") / 8
    assert eight.total("flop") == pytest.approx(alone.total("flop") / 8)
    lora = plan(load_config("contextual", "wan2.1-1.3b", ["lora.rank=64"]), 1)
    assert figure(lora, "trained") == 30 * 64 * (8 * 2 * 1536 + 2 * (1536 + 8960))
    assert lora.total("bytes") < 0.7 * alone.total("bytes")


def test_arithmetic_is_what_torch_counts(monkeypatch):
    """A rollout of the student, five passes a chunk; embeddings and head are what the estimate leaves out."""
    sizes = dataclasses.replace(PRESETS["demo"], dim=256, ffn_dim=1024, num_heads=2, text_dim=16, text_len=8)
    monkeypatch.setitem(PRESETS, "demo", sizes)
    net = WanModel(sizes)
    net.reset_parameters(torch.Generator().manual_seed(0))
    config = load_config("local", "demo")
    student = Student(Network(net, torch.device("cpu"), torch.float32, run=module_runner(net)), torch.ones(1, 8, 16))
    memory = empty_memory(MemoryConfig(policy="uniform", uniform_stride=1), config.latent_size)
    noise = seeded_noise(0, config.latent_size)
    memory = student.rollout(memory, 7, (1.0, 0.5), noise)
    assert len(memory.slots.all) == 18
    # FlopCounterMode counts plain products only, not the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        student.rollout(memory, 1, (1.0, 0.8, 0.6, 0.4), noise)
    assert 5 * block_flop(sizes, 3 * 32, 21 * 32) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_configuration_can_be_looked_at_first(stage, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in CONFIGS[stage]:
        title, settings, *costs = plan_stage(stage, name, [])
        assert name in title and "out:" in settings
        assert bool(costs) == isinstance(load_config(stage, name), NetworkConfig)


def test_scoring_chunk_by_chunk_reads_the_memory_each_time():
    flops = lambda *settings: {
        what: figure
        for kind, what, figure in plan(load_config("contextual", "wan2.1-1.3b", settings), 1).rows
        if kind == "flop"
    }
    whole, pieces = flops(), flops("score_chunks=1")
    name = "critic: forward and backward"
    sizes, frame = PRESETS["wan2.1-1.3b"], 1560
    each = block_flop(sizes, 18 * frame, 18 * frame) + block_flop(sizes, 3 * frame, 21 * frame)
    assert pieces[name] == pytest.approx(64 * 4 * 7 * each) and pieces[name] > whole[name]
    assert pieces["critic: rollouts"] == whole["critic: rollouts"]
