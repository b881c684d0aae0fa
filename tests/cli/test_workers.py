"""--workers, --ray and --retries of evaluate and encode, and the table of what runs."""

import io
import sys

import pytest
from rich.console import Console

from context_forcing.cli import workers as options
from context_forcing.train.data.encode import EncodeSettings
from context_forcing.train.data.encode_jobs import SourceJob
from context_forcing.train.data.manifest import read_manifest
from context_forcing.train.data.sources import Source
from context_forcing.workers import local
from context_forcing.workers.engine import Engine, Progress

from ..workers.here import Here


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a meadow\na desert\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def opened(monkeypatch):
    """Arguments of LocalWorkers, and the workers; they work in this process."""
    given = []

    def workers(*how):
        given.append((how, Here(2, **{"a meadow and 1 more": 1})))
        return given[-1][1]

    monkeypatch.setattr(local, "LocalWorkers", workers)
    return given


def test_without_the_options_no_worker_is_opened(prompts, tmp_path, run, opened):
    code, err = run("encode", prompts, "-o", tmp_path / "set", "--device", "cpu")
    assert code == 0 and "2 clips (2 new) of 2 sources, 0 skipped" in err and not opened


def test_workers_are_opened_tried_again_and_closed(prompts, tmp_path, run, opened):
    code, err = run("encode", prompts, "-o", tmp_path / "set", "--workers", 2, "--retries", 1, "--device", "cpu")
    assert code == 0 and "2 clips (2 new) of 2 sources, 0 skipped" in err
    ((how, workers),) = opened
    assert how == (2, "cpu") and workers.is_closed
    assert workers.begun == ["encoder", *["a meadow and 1 more"] * 2]


def test_retries_have_the_end_that_the_option_says(prompts, tmp_path, run, opened):
    code, err = run("encode", prompts, "-o", tmp_path / "set", "--workers", 2, "--retries", 0, "--device", "cpu")
    assert code == 2 and "0 clips (0 new) of 2 sources, 2 skipped" in err
    reason = "its worker died 1 times, the last ended by SIGKILL"
    assert read_manifest(tmp_path / "set").skipped == {"a meadow": reason, "a desert": reason}


@pytest.mark.parametrize("command", ["encode", "evaluate"])
def test_a_wrong_number_of_workers_and_a_missing_ray_are_refused(prompts, tmp_path, run, refused, monkeypatch, command):
    arguments = [command, *([prompts] if command == "encode" else []), "-o", tmp_path / "out", "--device", "cpu"]
    refused(run(*arguments, "--workers", 10_000), "--workers: 10000 is not from 1 to")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(run(*arguments, "--ray", "auto"), "--ray: needs the package ray; pip install")
    assert not (tmp_path / "out").exists()


def test_the_table_says_what_runs_where_and_what_is_kept(tmp_path):
    sources = (Source(name="[b]a.mp4"),)
    job = SourceJob(path=tmp_path, folder=tmp_path, settings=EncodeSettings(), sources=sources, clips_before={})
    (tmp_path / "shard-00000.safetensors").touch()
    engine = Engine(Here(2))
    engine.running[1] = Progress(job=job, attempts=1)
    engine.running[1].begin(1)
    engine.total, engine.num_ended, engine.lost_workers = 9, 3, 1
    console = Console(width=100, file=io.StringIO())
    console.print(options._running_table(engine))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows == [
        ["job", "state", "kept", "seconds", "worker", "note"],
        ["[b]a.mp4", "running", "1", "0", "2", "attempt", "2"],
        ["9", "jobs", "3", "finished", "1", "worker", "lost"],
    ]
