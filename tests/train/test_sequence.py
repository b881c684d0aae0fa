"""Processes that share samples (`sequence`) against one process that has them alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from context_forcing.model.config import PRESETS
from context_forcing.model.sampler import seeded_generator
from context_forcing.model.sequence import Processes
from context_forcing.train import plan_stage, run_stage
from context_forcing.train.checkpoints import Checkpoints, newest_checkpoint
from context_forcing.train.parallel import start_parallel
from context_forcing.train.plan import plan
from context_forcing.train.presets import load_config
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.teacher import TeacherStage

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
    """A function: stage, and whether it is resumed -> what one process computes."""
    monkeypatch.setitem(PRESETS, "demo", SIZES)
    paths = [file.partition("=")[2] for file in files]
    return lambda name, resume: compute(name, 1, paths, tmp_path, resume)


def assert_same(one: dict, many: dict) -> None:
    for mine, theirs in zip(many["metrics"], one["metrics"], strict=True):
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
    one, two = alone(name, resume=True), two_processes[name]
    assert_same(one, two)
    assert two["resumed"] == two["metrics"][2] and one["resumed"] == one["metrics"][2]
    assert two["extra"].keys() == one["extra"].keys()
    assert bool(two["extra"]) == (name != "pretrain")


@pytest.mark.slow
def test_two_replicas_of_two_processes_learn_what_one_process_learns(shared, alone):
    """A mean over replicas of sums over their processes; each replica has one of the two samples."""
    assert_same(alone("contextual", resume=False), shared(4, 2, "contextual")["contextual"])


def test_the_processes_of_a_replica_have_the_same_samples():
    ranks = [dataclasses.replace(ALONE, rank=rank, world_size=4, processes=Processes(rank % 2, 2)) for rank in range(4)]
    assert [list(parallel.samples(4)) for parallel in ranks] == [[0, 2], [0, 2], [1, 3], [1, 3]]
    with pytest.raises(
        ValueError, match="batch: 3 samples do not divide by 4 processes, 2 for each sample; give a multiple of 2"
    ):
        ranks[0].samples(3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["sequence=5"], "sequence: 5 does not divide 12 heads of wan2.1-1.3b; give one of 1, 2, 3, 4, 6, 12"),
        (["sequence=8", "preset=wan2.1-14b", "size=[16,48]"], "8 does not divide 3 tokens of a latent frame; .* 1$"),
        (["sequence=12", "teacher_preset=wan2.1-14b"], "12 does not divide 40 heads of wan2.1-14b; .* 1, 2, 4, 5, 8,"),
        (["sequence=0"], "sequence: 0 must be above 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config("contextual", "wan2.1-1.3b", settings)


def test_the_codec_trains_in_one_process():
    with pytest.raises(ValueError, match="^sequence: 2; this stage trains in one process, give 1"):
        load_config("vae", "smoke", ["sequence=2"])


def test_processes_that_do_not_divide_are_refused(monkeypatch):
    message = r"sequence: 2 does not divide 3 processes; start a multiple of 2 \(for a dry run WORLD_SIZE=2\)"
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=message):
        start_parallel("cpu", 2)
    with pytest.raises(ValueError, match=message):
        plan_stage("contextual", "wan2.1-1.3b", ["sequence=2"])


def test_an_older_pytorch_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(ValueError, match="^sequence: needs PyTorch 2.10, this is"):
        start_parallel("cpu", 2)


@pytest.mark.parametrize("stage, settings", [("pretrain", ["num_chunks=80"]), ("teacher", []), ("contextual", [])])
def test_processes_divide_what_a_sample_needs(stage, settings):
    """On 16 GPUs, each pass has a quarter of the keys, activations and arithmetic; a process has four times the
    samples. Weights are sharded over all processes in any case."""
    alone, shared = (
        plan(load_config(stage, "wan2.1-1.3b", [*settings, "batch=16", f"sequence={sequence}"]), 16)
        for sequence in (1, 4)
    )
    assert shared.run_flop == pytest.approx(alone.run_flop)
    assert shared.total("flop") == pytest.approx(alone.total("flop"))
    for one, four in zip(alone.rows, shared.rows, strict=True):
        if one.kind == "bytes":
            divided = one.label.startswith(("keys", "for the backward"))
            assert four.most == pytest.approx(one.most / 4 if divided else one.most), one.label


def test_the_dry_run_names_the_processes_of_a_sample(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    *_, table = plan_stage("teacher", "wan2.1-1.3b", ["sequence=2"])
    assert table.title == "one of 4 processes, 2 for each sample, an iteration"


def test_a_run_that_shared_samples_can_be_exported_and_continued_alone(tmp_path):
    """A checkpoint has whole weights; only error buffers and the weights of a gate belong to processes."""
    config = load_config("pretrain", "smoke", [f"out={tmp_path}", "sequence=2"])
    Checkpoints(tmp_path, PretrainStage(config, ALONE), "pretrain").save(3, 1.0, "r")
    assert run_stage("export", "demo", [f"run={tmp_path}", f"out={tmp_path / 'export'}"], False).is_file()
    stage = PretrainStage(dataclasses.replace(config, sequence=1), ALONE)
    assert Checkpoints(tmp_path, stage, "pretrain").load()["step"] == 3


def test_error_buffers_of_other_replicas_are_refused(tiny, tmp_path):
    stage = TeacherStage(load_config("teacher", "smoke"), ALONE)
    stage.errors.add(0.5, torch.ones(16, 3, 8, 16), 3, seeded_generator(0))
    checkpoints = Checkpoints(tmp_path, stage, "teacher")
    checkpoints.save(3, 1.0, "r")
    path = newest_checkpoint(tmp_path)
    torch.save(stage.extra_state(), path / "rank1.pt")
    run = json.loads((path / "run.json").read_text()) | {"world_size": 2}
    del run["sha256"]
    (path / "run.json").write_text(json.dumps(run))
    checkpoints.parallel = dataclasses.replace(ALONE, world_size=2, processes=Processes(0, 2))
    with pytest.raises(ValueError, match="written by 2 processes, with .*; start 2 processes, not .* sequence=2"):
        checkpoints.load()
