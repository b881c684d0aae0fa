"""After an interrupt a command says what is kept and how to go on."""

import pytest

from context_forcing.memory.fields import counted
from context_forcing.train import loop
from context_forcing.train.data import encode
from context_forcing.train.evaluation import evaluate
from context_forcing.video.batch import Batch


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


STORY = "segments: [{prompt: Snow., seconds: 1.5}]"
COMMANDS = {
    "batch": (Batch, "run", ["jobs.yaml"], "jobs.yaml: not finished; finished chunks are kept, the same command"),
    "evaluate": (evaluate, "evaluate", ["-o", "out"], "out: not finished; finished scenes are kept, the same command"),
    "encode": (
        encode.SetEncoder,
        "run",
        ["a.txt", "-o", "out"],
        "out: not finished; finished clips are kept, the same",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_says_what_is_kept(command, run, student, tmp_path, monkeypatch):
    owner, name, arguments, words = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(STORY)
    (tmp_path / "a.txt").write_text("Snow.")
    (tmp_path / "jobs.yaml").write_text(f"output: '{{story}}.mp4'\nstories: [a.yaml]\nstudents: ['{student}']")
    monkeypatch.setattr(owner, name, interrupt)
    code, err = run(command, *arguments)
    assert code == 130 and words in err and "Traceback" not in err, err


def test_an_interrupt_of_training_names_the_newest_checkpoint(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "train", interrupt)
    arguments = ("train", "vae", "--config", "smoke", f"out={tmp_path}")
    assert run(*arguments)[0] == 130 and "no checkpoint is there yet, start again" in caplog.text
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert run(*arguments)[0] == 130 and "step-00000010 is kept, continue with --resume" in caplog.text


def test_one_of_a_thing_has_no_s():
    assert [counted(number, "worker") for number in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
