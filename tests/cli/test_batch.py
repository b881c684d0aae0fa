"""Many videos on many workers are the videos of single runs, also where workers are killed."""

import os
import re
import signal

import pytest
import yaml

from context_forcing.memory.files import lock_name
from context_forcing.video.batch import THERE, Batch
from context_forcing.video.generate import open_job
from context_forcing.video.jobs import read_jobs
from context_forcing.video.journal import journal_path, num_kept
from context_forcing.video.mp4 import part_name
from context_forcing.workers import engine as scheduling
from context_forcing.workers.engine import MADE, RUNNING
from context_forcing.workers.local import LocalWorkers

PROMPTS = ("A meadow by day. The camera pans right.", "A desert at night. The camera pans left.")


def write_jobs(folder, student, count, seconds=9.0):
    """A jobs file of so many short stories."""
    for i in range(count):
        segments = [{"prompt": prompt, "seconds": seconds / 2} for prompt in PROMPTS]
        (folder / f"story{i}.yaml").write_text(yaml.safe_dump({"seed": i, "segments": segments}))
    stories = [f"story{i}.yaml" for i in range(count)]
    jobs = {"output": "out/{story}.mp4", "stories": stories, "students": [str(student)], "options": {"scale": 1}}
    (folder / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    return folder / "jobs.yaml"


class Killer:
    """Kills, from `on_change`, the processes of so many videos that have a chunk and are not whole."""

    def __init__(self, batch, kills):
        self.batch, self.kills, self.killed = batch, kills, []

    def __call__(self):
        for video in self.batch.videos:
            output = video.job.output
            lock = lock_name(output)
            is_half = video.state == RUNNING and 0 < num_kept(output) < video.job.num_chunks and lock.exists()
            if is_half and output not in self.killed and len(self.killed) < self.kills:
                os.kill(int(re.match(r"pid (\d+)", lock.read_text())[1]), signal.SIGKILL)
                self.killed.append(output)


@pytest.fixture
def often(monkeypatch):
    """`on_change` is called often enough to meet every short video half-made."""
    monkeypatch.setattr(scheduling, "POLL_SECONDS", 0.02)


def check_against_single_runs(batch, kills, killer, frames_of, folder):
    assert len(killer.killed) == batch.lost_workers == kills
    assert [video.attempts for video in batch.videos if video.job.output in killer.killed] == [2] * kills
    assert batch.count(MADE) == len(batch.videos), [video.problem for video in batch.videos]
    for video in batch.videos:
        single = folder / video.job.output.name
        request = video.job.request.__class__(**vars(video.job.request) | {"output": single})
        with open_job(request) as job:
            assert job.run() == video.result
        assert frames_of(single) == frames_of(video.job.output), video.job.output
        assert num_kept(video.job.output) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_worker_loses_nothing(tmp_path, student, frames_of, run, often):
    path = write_jobs(tmp_path, student, 3)
    batch = Batch.of(read_jobs(path, "cpu"))
    killer = Killer(batch, 1)
    batch.run(LocalWorkers(2, "cpu"), on_change=killer)
    check_against_single_runs(batch, 1, killer, frames_of, tmp_path)
    again = Batch.of(read_jobs(path, "cpu"))
    assert again.count(THERE) == 3
    code, err = run("batch", path, "--device", "cpu")
    assert code == 0 and "0 made, 3 were there, 0 failed" in err


@pytest.mark.slow
def test_twelve_stories_on_a_ray_cluster(tmp_path, student, frames_of, often):
    """Two workers, of which two are killed."""
    pytest.importorskip("ray", reason="pip install ray; CONTRIBUTING.md, Tests")
    from context_forcing.workers.ray_workers import RayWorkers

    batch = Batch.of(read_jobs(write_jobs(tmp_path, student, 12), "cpu"))
    killer = Killer(batch, 2)
    batch.run(RayWorkers("local", 2, "cpu"), on_change=killer)
    check_against_single_runs(batch, 2, killer, frames_of, tmp_path)


def test_a_video_that_is_there_must_be_the_one_asked_for(tmp_path, student, run, refused):
    path = write_jobs(tmp_path, student, 1, seconds=1.5)
    (job,) = read_jobs(path, "cpu")
    job.output.parent.mkdir()
    with open_job(job.request) as made:
        made.run()
    assert read_jobs(path, "cpu")[0].is_made
    settings = yaml.safe_load(path.read_text())
    for changed, field in (
        ({"seeds": [99]}, "story"),
        ({"options": {"scale": 2}}, "scale"),
        ({"options": {"slow": 2}}, "memory"),
        ({"options": {"commit_attends": "itself"}}, "commit_attends"),
        ({"students": [{"file": str(student), "set": ["shift=4"]}]}, "card"),
        ({"students": ["demo"]}, "student"),
    ):
        path.write_text(yaml.safe_dump(settings | changed))
        refused(run("batch", path, "--device", "cpu"), "was made with another", field, "delete it, or change")
    job.output.write_bytes(b"")
    path.write_text(yaml.safe_dump(settings))
    refused(run("batch", path), job.output.name)


def test_what_a_killed_process_left_beside_a_whole_video_is_deleted(tmp_path, student, run):
    path = write_jobs(tmp_path, student, 2, seconds=1.5)
    jobs = read_jobs(path, "cpu")
    for job in jobs:
        job.output.parent.mkdir(exist_ok=True)
        with open_job(job.request) as made:
            made.run()
        journal_path(job.output).mkdir()
        (journal_path(job.output) / "chunk-000001.safetensors").touch()
        part_name(job.output).touch()
        lock_name(job.output).touch()
    mine = journal_path(jobs[1].output) / "notes.txt"
    mine.touch()
    code, err = run("batch", path, "--device", "cpu")
    assert code == 0 and "0 made, 2 were there, 0 failed" in err
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"story0.mp4", "story1.mp4", "story1.mp4.journal"} and mine.exists(), "that folder is not ours"


def test_a_story_that_changed_under_its_journal_fails_alone(tmp_path, student, run, caplog):
    path = write_jobs(tmp_path, student, 1, seconds=1.5)
    (job,) = read_jobs(path, "cpu")
    job.output.parent.mkdir()
    with pytest.raises(KeyboardInterrupt), open_job(job.request) as begun:
        begun.run(lambda finished, note: (_ for _ in ()).throw(KeyboardInterrupt))
    assert num_kept(job.output) == 1
    (tmp_path / "story0.yaml").write_text("segments: [{prompt: Snow., seconds: 1.5}]")
    code, err = run("batch", path, "--device", "cpu")
    assert code == 1 and "was begun with another story" in caplog.text
    assert "1 video: 0 made, 0 were there, 1 failed; 0 workers lost" in err and "failed" in run.out
    assert num_kept(job.output) == 1
