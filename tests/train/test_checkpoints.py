"""Runs are stopped, resumed and exported with the same result."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from context_forcing.model.checkpoints.containers import read_safetensors
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.sampler import seeded_generator
from context_forcing.train import run_stage
from context_forcing.train.checkpoints import Checkpoints, newest_checkpoint
from context_forcing.train.presets import load_config
from context_forcing.train.stages.codec import VaeStage
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.teacher import TeacherStage

from .helpers import ALONE, FILES, metrics_of, same_tensors

RECALL = [
    "anchor.weight=0.25", "anchor.chunks=4", "anchor.batch=1", "recall_weight=3", "normaliser=fast",
    "first_exit_share=0.5", "long_trips=0.5", "share_rollouts=true", "gate_every=2",
]  # fmt: skip
"""Settings that keep recall through distillation."""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_killed_stage_resumes_to_the_same_network(tiny, tmp_path, monkeypatch, name, stop_at):
    monkeypatch.setattr("context_forcing.train.trained_network.HISTORY", 2)
    settings = ["steps=5", "batch=1", "sample_every=9"]
    if name == "teacher":
        settings += ["recycling.learn_clean_share=1.0", "recycling.share=1.0", "optim.ema_from=1", "plain_share=0.3"]
    elif name in ("local", "contextual"):
        settings += ["student_optim.ema_from=1", "critic_optim.spike=1.05", *RECALL]
    run = lambda folder, resume: run_stage(name, "smoke", [*settings, f"out={tmp_path / folder}"], resume)
    whole = run("whole", False)
    cls = {"vae": VaeStage, "pretrain": PretrainStage, "teacher": TeacherStage}.get(name, DistillStage)
    step = cls.step

    def killed(self, number):
        if number == stop_at:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed", False)
    resumed = run("killed", True)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert sorted(metrics_of(tmp_path / "whole")) == [0, 1, 2, 3, 4]
    assert same_tensors(whole, resumed)
    if name != "vae":
        card = StudentSource(whole).open().card
        assert (card.stage, card.train_steps) == (name, 5)
    assert not list(tmp_path.rglob("*.part"))
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2


def test_a_new_run_does_not_overwrite_and_a_resumed_run_needs_the_same_settings(tiny, tmp_path):
    out = f"out={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="has no checkpoint"):
        run_stage("local", "smoke", [out], True)
    run_stage("local", "smoke", [out, "steps=1"], False)
    with pytest.raises(ValueError, match="holds a run already"):
        run_stage("local", "smoke", [out], False)
    with pytest.raises(ValueError, match="shift: 4.0 now, 3.0 when"):
        run_stage("local", "smoke", [out, "shift=4"], True)
    run_stage("local", "smoke", [out, "steps=2"], True)


def test_settings_that_are_newer_than_a_checkpoint_had_their_defaults(tiny, tmp_path):
    run_stage("local", "smoke", ["steps=1", f"out={tmp_path}"], False)
    path = newest_checkpoint(tmp_path) / "run.json"
    run = json.loads(path.read_text())
    del run["config"]["anchor"], run["config"]["gate_every"], run["config"]["negative_prompt"], run["sha256"]
    path.write_text(json.dumps(run))
    assert run_stage("export", "demo", [f"run={tmp_path}", f"out={tmp_path / 'export'}"], False).is_file()
    run_stage("local", "smoke", ["steps=2", f"out={tmp_path}"], True)
    with pytest.raises(ValueError, match="anchor"):
        run_stage("local", "smoke", ["steps=3", "anchor.weight=1", f"out={tmp_path}"], True)


def test_a_resumed_run_may_learn_more_slowly(tiny, tmp_path):
    run_stage("local", "smoke", ["steps=1", f"out={tmp_path}"], False)
    run_stage("local", "smoke", ["steps=2", "student_optim.lr=1e-7", "max_skipped=3", f"out={tmp_path}"], True)
    with pytest.raises(ValueError, match="student_optim"):
        run_stage("local", "smoke", ["steps=3", "student_optim.ema=0.5", f"out={tmp_path}"], True)


def test_an_incomplete_checkpoint_is_not_loaded(tiny, tmp_path):
    stage = TeacherStage(load_config("teacher", "smoke"), ALONE)
    checkpoints = Checkpoints(tmp_path, stage, "teacher")
    checkpoints.save(3, 1.0, "r")
    (tmp_path / "checkpoints" / "step-00000009.part").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-00000003" and checkpoints.load()["step"] == 3


def test_training_starts_from_any_published_layout(tiny, files, tmp_path):
    plain = files[0].partition("=")[2]
    state, _ = read_safetensors(plain)
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "student.pt")
    stage = DistillStage(load_config("contextual", "smoke", [f"student={tmp_path / 'student.pt'}"]), ALONE)
    assert stage.init_card is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in stage.student.net.state_dict().items())


def test_a_checkpoint_before_the_first_update_changes_nothing(tiny, files, tmp_path):
    """Adam counts its steps. The step that creates the optimiser state for a checkpoint must not be counted."""
    run = lambda folder, steps, resume: run_stage(
        "contextual", "smoke", [*files, f"steps={steps}", "batch=1", "critic_per_student=3", "checkpoint_every=1",
                                "sample_every=9", f"out={tmp_path / folder}"], resume,
    )  # fmt: skip
    whole = run("whole", 3, False)
    once = run_stage("contextual", "smoke", [*files, "steps=3", "batch=1", "critic_per_student=3",
                       "checkpoint_every=9", "sample_every=9", f"out={tmp_path / 'once'}"], False)  # fmt: skip
    run("parts", 1, False)
    parts = run("parts", 3, True)
    a, *others = (StudentSource(path).open().load().state_dict() for path in (whole, once, parts))
    assert all(torch.equal(a[key], other[key]) for key in a for other in others)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused_if_there_are_errors(tiny, tmp_path, before, after):
    for number, has_errors in enumerate((False, True)):
        stage = TeacherStage(load_config("teacher", "smoke"), ALONE)
        if has_errors:
            stage.errors.add(0.5, torch.ones(16, 3, 8, 16), 3, seeded_generator(0))
        checkpoints = Checkpoints(tmp_path / str(number), stage, "teacher")
        checkpoints.save(3, 1.0, "r")
        path = newest_checkpoint(tmp_path / str(number))
        for rank in range(before):
            torch.save(stage.extra_state(), path / f"rank{rank}.pt")
        run = json.loads((path / "run.json").read_text()) | {"world_size": before}
        del run["sha256"]
        (path / "run.json").write_text(json.dumps(run))
        checkpoints.parallel = dataclasses.replace(ALONE, world_size=after)
        if has_errors:
            with pytest.raises(ValueError, match=f"written by {before} processes"):
                checkpoints.load()
            assert checkpoints.load(extra_state=False)["step"] == 3
        else:
            assert checkpoints.load()["step"] == 3


@pytest.mark.parametrize("name, settings", [("teacher", []), ("local", ["batch=1", "memory=longlive"])])
def test_an_export_equals_the_file_of_the_run(tiny, tmp_path, name, settings):
    run = run_stage(name, "smoke", ["steps=2", *settings, f"out={tmp_path / 'run'}"], False)
    again = run_stage("export", "demo", [f"run={tmp_path / 'run'}", f"out={tmp_path / 'other'}"], False)
    assert again.parent == tmp_path / "other" and same_tensors(run, again)
    assert StudentSource(run).open().card == StudentSource(again).open().card


def test_exports_of_two_runs_have_folders_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run_stage("teacher", "smoke", ["steps=1", f"seed={seed}", f"out=runs/{seed}"], False) for seed in (1, 2)]
    exports = [run_stage("export", "demo", [f"run=runs/{seed}"], False) for seed in (1, 2)]
    assert exports == [Path("export/1/teacher.safetensors"), Path("export/2/teacher.safetensors")]
    assert all(same_tensors(*pair) for pair in zip(runs, exports))


def test_the_log_names_the_file_that_a_network_starts_from(tiny, tmp_path, caplog):
    caplog.set_level("INFO", "context_forcing")
    teacher = run_stage("teacher", "smoke", ["steps=1", f"out={tmp_path / 'first'}"], False)
    assert caplog.messages == ["teacher starts from new weights"]
    caplog.clear()
    run_stage("teacher", "smoke", ["steps=1", f"init={teacher}", f"out={tmp_path / 'second'}"], False)
    assert caplog.messages == [f"teacher starts from {teacher}"]
    caplog.clear()
    run_stage("teacher", "smoke", ["steps=1", f"init={teacher}", f"out={tmp_path / 'second'}"], True)
    assert not caplog.messages, "a resumed run continues its checkpoint"


def test_an_export_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="run: .* has no checkpoint"):
        run_stage("export", "demo", [f"run={tmp_path}"], False)


def wait_for(path, lines=1, seconds=120):
    """Wait until a file has so many lines."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_kill_9_and_resume_give_the_same_curve(tmp_path, name):
    """A process killed between two checkpoints."""
    command = lambda folder: [sys.executable, "-m", "context_forcing.train", name, "--config", "smoke", "steps=12",
                              "checkpoint_every=3", "sample_every=99", f"out={tmp_path / folder}"]  # fmt: skip
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "log.jsonl", lines=5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(*command("killed"), "--resume")
    run(*command("whole"))
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    file = f"{FILES[name]}.safetensors"
    assert same_tensors(tmp_path / "killed" / file, tmp_path / "whole" / file)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_ends(tmp_path):
    command = [sys.executable, "-m", "context_forcing.train", "teacher", "--config", "smoke", "steps=10000",
               "checkpoint_every=10000", f"out={tmp_path}"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "log.jsonl")
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 0 and "continue with --resume" in message
    steps = len(metrics_of(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert f"stopped after step {steps};" in message
    assert (tmp_path / "teacher.safetensors").exists()


class Harmful:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("place", [".metadata", "a value"])
def test_no_object_of_a_checkpoint_is_unpickled(tiny, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    stage = VaeStage(load_config("vae", "smoke"), ALONE)
    checkpoints = Checkpoints(tmp_path / "run", stage, "vae")
    if place == "a value":
        state = checkpoints._tensors()
        state[next(iter(state))]["optim"]["param_groups"][0]["lr"] = Harmful()
        monkeypatch.setattr(Checkpoints, "_tensors", lambda self: state)
    checkpoints.save(3, 1.0, "r")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if place == ".metadata":
        path = newest_checkpoint(tmp_path / "run")
        (path / place).write_bytes(pickle.dumps(Harmful()))
        run = json.loads((path / "run.json").read_text())
        del run["sha256"]
        (path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="step-00000003: not a whole checkpoint .*; delete it") as caught:
        checkpoints.load()
    assert ("mkdir" if place == ".metadata" else "lr is no number") in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()
