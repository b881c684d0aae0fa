"""The order of videos and attempts, with workers that do nothing."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys

import pytest
import yaml

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.video import jobs
from context_forcing.video.batch import Batch
from context_forcing.video.generate import GenerateRequest
from context_forcing.video.jobs import VideoJob, read_jobs
from context_forcing.workers.engine import FAILED, MADE, WAITING
from context_forcing.workers.job import Death, Outcome, Worker
from context_forcing.workers.local import LocalWorkers

MADE_IT, DIED = Outcome(result=12), Death(reason="ended by SIGKILL")


class Scripted:
    """Workers that give the outcomes of a video one after the other; the last one stays."""

    def __init__(self, count, **outcomes):
        self.count, self.outcomes, self.running, self.given, self.closed = count, outcomes, {}, [], False
        self.most = 0

    def give(self, place, job):
        assert place not in self.running and place < self.count
        self.running[place] = job.output.stem
        self.given.append(job.output.stem)
        self.most = max(self.most, len(self.running))

    def wait(self, seconds):
        place, name = self.running.popitem()
        script = self.outcomes.get(name, [MADE_IT])
        outcome = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return [(place, outcome)]

    def close(self):
        self.closed = True


@pytest.fixture
def batch(tmp_path):
    names = "abcde"
    for name in names:
        (tmp_path / f"{name}.yaml").write_text("segments: [{prompt: A meadow by day., seconds: 1}]")
    jobs = {"output": "out/{story}.mp4", "stories": [f"{name}.yaml" for name in names]}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    return Batch.of(read_jobs(tmp_path / "jobs.yaml"))


def states(batch):
    return {video.job.output.stem: video.state for video in batch.videos}


def test_every_place_works_and_every_video_is_made_once(batch):
    workers = Scripted(2)
    batch.run(workers)
    assert sorted(workers.given) == list("abcde") and workers.most == 2 and workers.closed
    assert set(states(batch).values()) == {MADE} and batch.lost_workers == 0


def test_a_video_is_tried_again_when_its_worker_dies_and_before_the_others(batch):
    workers = Scripted(1, b=[DIED, DIED, MADE_IT])
    batch.run(workers, retries=2)
    assert workers.given == list("abbbcde") and batch.count(MADE) == 5 and batch.lost_workers == 2


def test_retries_have_an_end(batch):
    workers = Scripted(2, b=[DIED])
    batch.run(workers, retries=2)
    assert workers.given.count("b") == 3 and batch.count(MADE) == 4
    (failed,) = (video for video in batch.videos if video.state == FAILED)
    assert failed.problem == "its worker died 3 times, the last ended by SIGKILL; 0 chunks are kept"


def test_a_problem_of_the_video_is_not_tried_again(batch):
    workers = Scripted(2, c=[Outcome(problem="story: no")])
    batch.run(workers, retries=9)
    assert workers.given.count("c") == 1 and states(batch)["c"] == FAILED and batch.count(MADE) == 4


def test_an_interrupt_ends_the_workers(batch):
    workers = Scripted(1, b=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        batch.run(workers)
    assert workers.closed and states(batch)["a"] == MADE and batch.count(WAITING) == 3


def test_a_wrong_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="--workers: 10000 is not from 1 to"):
        LocalWorkers(10_000, "cpu")


def test_an_error_of_the_disk_is_a_problem_of_the_video(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "film.mp4")

    monkeypatch.setattr(jobs, "open_job", full)
    request = GenerateRequest(story=tmp_path / "a.yaml", output=tmp_path / "film.mp4", student=StudentSource())
    job = VideoJob(request=request, num_chunks=1, chunk_frames=12, is_made=False)
    assert Worker().do(job).problem == "film.mp4: No space left on device; check the name and the disk"


ENDLESS = """
import multiprocessing, os, pathlib, signal, sys
from context_forcing.workers import local

def endless(worker, job):
    print(os.getpid(), *map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True)
    while True:
        signal.pause()

local.Worker.do = endless
local.multiprocessing = type("Forking", (), {"get_context": lambda way: multiprocessing.get_context("fork")})
place = local.LocalWorkers(1, "cpu")
place.give(0, None)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_worker_ends_with_its_parent_and_not_by_an_interrupt():
    """Its output ends when no process has it open any more."""
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], stdin=pipe, stdout=pipe, text=True)
    assert parent.stdin and parent.stdout
    pid, *blocked = map(int, parent.stdout.readline().split())
    try:
        assert blocked == [signal.SIGINT]
        os.kill(pid, signal.SIGINT)
        os.kill(pid, 0)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.wait(60) == -signal.SIGKILL
        assert select.select([parent.stdout], [], [], 60)[0] and parent.stdout.read() == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        parent.kill()
