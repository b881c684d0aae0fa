"""The gate on recall ends a run whose student forgets, and exports what came before."""

import pytest
import torch

from context_forcing.model.checkpoints.containers import read_safetensors
from context_forcing.train import run_stage
from context_forcing.train.presets import load_config
from context_forcing.train.stages import gate as gates
from context_forcing.train.stages.distill import DistillStage

from .helpers import ALONE, metrics_of, same_tensors

GATE = ["batch=1", "gate_every=2", "anchor.batch=1", "anchor.chunks=4", "sample_every=9"]


@pytest.fixture
def errors(monkeypatch):
    """The errors of recall that the gate measures, one after the other."""
    queue = []
    monkeypatch.setattr(gates, "mean_recall_error", lambda *_: {"memory": queue.pop(0), "blind": 9.0})
    return queue


def test_the_gate_measures_the_exported_weights_on_true_clips(tiny, files):
    stage = DistillStage(load_config("contextual", "smoke", [*files, *GATE]), ALONE)
    trained = stage.trained["student"]
    before = stage.gate.measure(stage.student, trained)
    assert before.keys() == {"fast", "memory", "unseen", "blind"} and min(before.values()) > 0
    with torch.no_grad():
        for parameter in stage.student.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert stage.gate.measure(stage.student, trained) == before, "the average has not changed"
    trained.average = {name: p.detach().clone() for name, p in trained.parameters()}
    assert stage.gate.measure(stage.student, trained) != before


def test_a_run_whose_student_forgets_ends_with_the_weights_before(tiny, files, tmp_path, errors, caplog):
    run = lambda out, *settings: run_stage("contextual", "smoke", [*files, *GATE, *settings, f"out={out}"], False)
    errors += [1.0, 1.2, 1.3]
    path = run(tmp_path / "failed", "steps=9")
    log = metrics_of(tmp_path / "failed")
    assert sorted(log) == [0, 1, 2, 3] and (log[1]["recall_memory"], log[3]["recall_memory"]) == (1.2, 1.3)
    assert log[1]["recall_blind"] == 9.0 and "recall_memory" not in log[2]
    assert "the stage has ended the run after step 4" in caplog.text
    errors += [1.0, 1.2]
    assert same_tensors(path, run(tmp_path / "short", "steps=2"))
    errors += [1.0, 1.2, 1.1]
    longer = run(tmp_path / "longer", "steps=4")
    assert not same_tensors(path, longer) and not errors
    # Resumed, an ended run stays ended.
    again = run_stage("contextual", "smoke", [*files, *GATE, "steps=9", f"out={tmp_path / 'failed'}"], True)
    assert sorted(metrics_of(tmp_path / "failed")) == [0, 1, 2, 3]
    assert same_tensors(again, tmp_path / "short" / "student.safetensors") and read_safetensors(again)


def test_the_last_step_is_measured_and_the_start_only_once(tiny, files, tmp_path, errors):
    errors += [1.0, 1.2, 1.1]
    settings = [*files, *GATE, f"out={tmp_path}"]
    run_stage("contextual", "smoke", [*settings, "steps=3"], False)
    assert [step for step, line in metrics_of(tmp_path).items() if "recall_memory" in line] == [1, 2]
    errors += [1.24]
    run_stage("contextual", "smoke", [*settings, "steps=4"], True)
    assert not errors and metrics_of(tmp_path)[3]["recall_memory"] == 1.24


def test_clips_in_which_nothing_is_recalled_are_refused(tiny):
    with pytest.raises(ValueError, match="anchor.chunks: 2, "):
        DistillStage(load_config("contextual", "smoke", [*GATE, "anchor.chunks=2"]), ALONE)
