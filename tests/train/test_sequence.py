"""Processes that share samples (`sequence`) against one process that has them alone."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_forcing.model.config import PRESETS
from context_forcing.model.sequence import Processes
from context_forcing.train import plan_stage, run_stage
from context_forcing.train.parallel import start_parallel
from context_forcing.train.plan import plan
from context_forcing.train.presets import load_config

from .helpers import ALONE
from .sequence_training import SIZES, compute

SCRIPT = Path(__file__).with_name("sequence_training.py")


@pytest.fixture(scope="module")
def shared(files, tmp_path_factory):
    """A function: processes, `sequence` and stages -> what they computed, by stage."""

    def run(processes: int, sequence: int, *stages: str) -> dict:
        folder = tmp_path_factory.mktemp("shared")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        paths = [file.partition("=")[2] for file in files]
        command = [sys.executable, *torchrun, str(SCRIPT), str(sequence), *paths, str(folder), *stages]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in stages}

    return run


@pytest.fixture(scope="module")
def two_processes(shared):
    return shared(2, 2, "pretrain", "teacher", "contextual")


@pytest.fixture
def alone(files, tmp_path, monkeypatch):
    """A function: stage -> what one process computes."""
    monkeypatch.setitem(PRESETS, "demo", SIZES)
    return lambda name: compute(name, 1, [file.partition("=")[2] for file in files], tmp_path)


def assert_same(one: dict, many: dict) -> None:
    for mine, theirs in zip([*many["metrics"], many["resumed"]], [*one["metrics"], one["resumed"]], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert one["metrics"][0]["loss"] != one["metrics"][1]["loss"]
    assert len(one["grads"]) == len(many["grads"]) >= 2
    for mine, theirs in zip(many["grads"], one["grads"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, grad in theirs.items():
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(mine[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "teacher", "contextual"])
def test_two_processes_learn_what_one_learns(two_processes, alone, name):
    one, two = alone(name), two_processes[name]
    assert_same(one, two)
    assert two["resumed"] == two["metrics"][2] and one["resumed"] == one["metrics"][2]
    assert two["extra"].keys() == one["extra"].keys()
    assert bool(two["extra"]) == (name != "pretrain")
