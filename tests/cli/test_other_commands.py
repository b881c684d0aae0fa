"""Help, doctor and train before it begins."""

import pytest

from context_forcing import cli


@pytest.mark.parametrize("command", [[], ["generate"], ["train"], ["evaluate"], ["doctor"]], ids=str)
def test_help(run, command):
    code, _ = run(*command, "--help")
    assert code == 0 and "Usage" in run.out


def test_doctor(run, succeeded):
    err = succeeded(run("doctor"))
    assert "torch" in err and "ffmpeg" in err and "demo student" in err


def test_unknown_stage_config_and_key(run, tmp_path, refused):
    refused(run("train", "polish"), "stage", "polish")
    refused(run("train", "vae", "--config", "huge"), "config", "huge")
    refused(run("train", "vae", "depth=3"), "depth")
    refused(run("train", "pretrain", "--config", "smoke", f"out={tmp_path / 'none'}", "--resume"), "resume")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_settings_and_costs_as_they_are(run, tmp_path, succeeded):
    succeeded(run("train", "contextual", "--config", "wan2.1-1.3b", "--dry-run", f"out={tmp_path / 'none'}"))
    assert "self_attn.q" in run.out and "total" in run.out and "[bold]" not in run.out
    assert "optimiser" in run.out and "Adam" not in run.out
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_tells_what_all_know(run, tmp_path, monkeypatch, refused):
    """`torchrun` ends the others while they wait, if the first one has failed too."""
    monkeypatch.setattr("context_forcing.train.run_stage", lambda *_: tmp_path)
    first, (code, err) = run("train", "vae"), (monkeypatch.setenv("RANK", "1"), run("train", "vae"))[1]
    assert first == (0, f"written to {tmp_path}\n") and (code, err) == (0, "")
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    refused(run("train", "polish"), "stage", "polish")
    assert waited == [cli.OTHERS_WAIT], "the first process is well: the error is told"

    def end(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", end)
    assert run("train", "polish") == (130, "")
