"""The costs that a dry run prints: against documented figures, torch's own count, and real settings."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
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
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.student import Student

from .helpers import ALONE


def figure(made, what):
    return next(row.most for row in made.rows if row.label.startswith(what))


def test_the_1_3b_run_costs_what_is_documented():
    """docs/performance.md, Training: 22.7 GB per trained network, 2.84 GB for the frozen teacher. Keys and values take
    287.5 MB per frame: 18 remembered frames, and the 21 of the target until the backward pass. Teacher or critic have
    those of the context, with their keys at two positions."""
    made = plan(load_config("contextual", "wan2.1-1.3b"), 1)
    assert figure(made, "of a wan2.1-1.3b network") == 1_418_996_800
    assert figure(made, "critic: weights") == pytest.approx(22.7e9, rel=0.002)
    assert figure(made, "student: weights") == pytest.approx((22.7 + 5.68) * 1e9, rel=0.002)
    assert figure(made, "teacher, frozen") == pytest.approx(2.84e9, rel=0.002)
    assert figure(made, "keys and values of the rollout, 39 frames") == pytest.approx(39 * 287.5e6, rel=0.002)
    assert figure(made, "weights gathered") == pytest.approx(2.84e9, rel=0.002), "one network at a time"
    assert figure(made, "keys and values of a scored context, 18") == pytest.approx(1.5 * 18 * 287.5e6, rel=0.002)
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
        row.label: row.most
        for row in plan(load_config("contextual", "wan2.1-1.3b", settings), 1).rows
        if row.kind == "flop"
    }
    whole, pieces = flops(), flops("score_chunks=1")
    name = "critic: forward and backward"
    sizes, frame = PRESETS["wan2.1-1.3b"], 1560
    each = block_flop(sizes, 18 * frame, 18 * frame) + block_flop(sizes, 3 * frame, 21 * frame)
    assert pieces[name] == pytest.approx(64 * 4 * 7 * each) and pieces[name] > whole[name]
    assert pieces["critic: rollouts"] == whole["critic: rollouts"]


def test_a_14b_run_gathers_one_network_at_a_time():
    """28.6 GB of weights in bf16, not the 86 GB of all three."""
    made = plan(load_config("contextual", "wan2.1-1.3b", ["preset=wan2.1-14b"]), 64)
    assert figure(made, "weights gathered") == pytest.approx(28.6e9, rel=0.002)


def test_a_large_teacher_of_a_small_student():
    """The critic has the teacher's size, and scores cost what they cost there."""
    small, large = (
        plan(load_config("contextual", "wan2.1-1.3b", settings), 8) for settings in ([], ["teacher_preset=wan2.1-14b"])
    )
    assert figure(large, "of a wan2.1-1.3b") == 1_418_996_800 and figure(large, "of a wan2.1-14b") == 14_288_491_584
    for row in (
        "student: weights",
        "keys and values of the rollout",
        "critic: rollouts",
        "student, its share: backward",
    ):
        assert figure(large, row) == figure(small, row)
    assert figure(large, "critic: weights") == pytest.approx(16 * 14_288_491_584 / 8)
    assert figure(large, "teacher, frozen") == pytest.approx(2 * 14_288_491_584 / 8)
    assert figure(large, "keys and values of a scored context") == pytest.approx(1.5 * 18 * 1.278e9, rel=0.002)
    assert 5 < figure(large, "critic: forward") / figure(small, "critic: forward") < 14.3


def test_the_mean_is_that_of_the_lengths_that_are_drawn(tiny):
    """Chunks of the student's rollouts, counted over the draws of a run."""
    settings = [
        "steps=400",
        "context_from=1",
        "context_to=9",
        "context_ramp=300",
        "local_every=3",
        "critic_per_student=2",
    ]
    config = load_config("contextual", "smoke", settings)
    stage, made = DistillStage(config, ALONE), plan(config, 1)
    chunks = [sum(stage.draw_lengths(step, False)[:2]) for step in range(config.steps)]
    rollouts = next(row for row in made.rows if row.label == "critic: rollouts")
    assert max(chunks) == 9 + 2
    assert rollouts.mean / rollouts.most == pytest.approx(sum(chunks) / len(chunks) / 11, rel=0.05)
    assert rollouts.mean < 0.6 * rollouts.most


def test_the_cost_of_a_run_in_gpu_hours():
    """The mean of an iteration, times iterations, times processes, at a measured rate."""
    alone, eight = (plan(load_config("contextual", "wan2.1-1.3b"), size) for size in (1, 8))
    assert alone.run_flop == pytest.approx(eight.run_flop)
    mean = sum(row.mean for row in alone.rows if row.kind == "flop")
    assert alone.run_flop == 500 * mean and mean < 0.8 * alone.total("flop")
    assert alone.hours(400.0) == pytest.approx(500 * mean / 400e12 / 3600)
    *_, table = plan_stage("contextual", "wan2.1-1.3b", [], tflops=400.0)
    out = io.StringIO()
    Console(width=120, file=out).print(table)
    text = out.getvalue()
    assert "longest" in text and "mean" in text and f"{alone.hours(400.0):,.1f} h" in text and "500 iterations" in text
