"""Devices, ranks, and two processes against one."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.train.parallel import start_parallel
from context_forcing.train.presets import load_config
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.pretrain import PretrainStage

from .helpers import ALONE, FILES, metrics_of


@pytest.mark.parametrize("device, message", [("tpu", "auto, cuda, cpu"), ("cuda", "not available")])
def test_unavailable_devices_are_refused(device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(ValueError, match=message):
        start_parallel(device)


def test_a_batch_must_divide_over_the_processes():
    with pytest.raises(ValueError, match="batch: 3 samples"):
        dataclasses.replace(ALONE, world_size=2).samples(3)
    assert list(dataclasses.replace(ALONE, rank=1, world_size=2).samples(4)) == [1, 3]
    message = "openings: 3 samples do not divide by 2 processes; give a multiple of 2"
    with pytest.raises(ValueError, match=message):
        PretrainStage(load_config("pretrain", "smoke", ["openings=3"]), dataclasses.replace(ALONE, world_size=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["anchor.weight=1"], "^anchor.batch: 4 samples do not divide by 16 processes; give a multiple of 16"),
        (["gate_every=3"], r"^2 \* anchor.batch: 8 samples do not divide by 16 processes; give a multiple of 16"),
    ],
)
def test_clips_of_anchor_and_gate_are_counted_before_a_network_is_loaded(settings, message, monkeypatch):
    monkeypatch.setattr(DistillStage, "load_network", lambda *_, **__: pytest.fail("loaded"))
    config = load_config("contextual", "smoke", ["batch=16", "anchor.batch=4", *settings])
    with pytest.raises(ValueError, match=message):
        DistillStage(config, dataclasses.replace(ALONE, world_size=16))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "teacher", "contextual"])
def test_two_processes_equal_one(tmp_path, name):
    """The same global batch on one process and on two under torchrun (gloo, sharded)."""
    arguments = [name, "--config", "smoke", "steps=3", "batch=2", "sample_every=9"]
    arguments += {
        "pretrain": [],
        "teacher": ["optim.lr=0.01", "recycling.share=0.0"],  # every process has its own error buffer
        "contextual": ["student_optim.lr=0.005", "critic_optim.lr=0.01", "critic_per_student=1", "share_rollouts=true",
                       "anchor.weight=0.5", "anchor.batch=2", "anchor.chunks=4", "recall_weight=2", "gate_every=3",
                       "gate_limit=99"],
    }[name]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                   "-m", "context_forcing.train", *arguments, f"out={tmp_path / str(processes)}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert one.keys() == two.keys() == {0, 1, 2}
    assert one[0]["loss"] != one[2]["loss"]
    if name == "contextual":
        for key in ("student_anchor", "student_grad_norm", "recall_memory", "recall_blind"):
            assert one[2][key] == pytest.approx(two[2][key], rel=2e-3)
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-4)
        assert one[step]["grad_norm"] == pytest.approx(two[step]["grad_norm"], rel=1e-3)
    file = f"{FILES[name]}.safetensors"
    a, b = (StudentSource(tmp_path / run / file).open().load() for run in ("1", "2"))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4)
