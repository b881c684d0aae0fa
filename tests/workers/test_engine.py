"""The order of jobs, and what becomes of one whose worker dies. Workers do them in this process."""

import logging
from dataclasses import dataclass

import pytest
import torch

from context_forcing.workers.engine import AHEAD, FAILED, MADE, Engine
from context_forcing.workers.job import Loaded, Worker

from .here import Here


@dataclass(frozen=True)
class Double:
    """Doubles a number; an error is raised."""

    value: object

    @property
    def name(self):
        return f"n{self.value}"

    def num_kept(self):
        return 0

    def run(self, loaded):
        if isinstance(self.value, Exception):
            raise self.value
        logging.getLogger("context_forcing").info("doubled")
        return 2 * self.value


def test_jobs_are_taken_in_their_order_whatever_ends_first(caplog):
    with Engine(Here(3)) as engine, caplog.at_level(logging.INFO):
        taken = list(engine.in_order(map(Double, range(20)), 20))
    assert [progress.result for progress in taken] == [2 * number for number in range(20)]
    assert engine.num_ended == engine.total == 20 and not engine.lost_workers and engine.workers.is_closed
    assert [line for line in caplog.messages if ":" in line][:2] == ["n0: doubled", "n1: doubled"]


@pytest.mark.parametrize("count", [1, 3])
def test_few_jobs_are_begun_before_the_first_is_taken(count):
    drawn = []
    workers = Here(count)
    with Engine(workers) as engine:
        jobs = engine.in_order((drawn.append(number) or Double(number) for number in range(99)), 99)
        assert next(jobs).result == 0
        assert len(drawn) == AHEAD * count
        assert next(jobs).result == 2 and len(drawn) == AHEAD * count + 1


def test_a_job_is_tried_again_when_its_worker_dies_and_keeps_its_place():
    workers = Here(1, n1=2)
    with Engine(workers, retries=2) as engine:
        taken = list(engine.in_order(map(Double, range(3)), 3))
    assert workers.begun == ["n0", "n1", "n1", "n1", "n2"] and engine.lost_workers == 2
    assert [(each.state, each.attempts, each.result) for each in taken] == [(MADE, 1, 0), (MADE, 3, 2), (MADE, 1, 4)]


def test_retries_have_an_end_and_the_others_go_on():
    with Engine(Here(1, n1=9), retries=1) as engine:
        first, dead, last = engine.in_order(map(Double, range(3)), 3)
    assert (first.state, dead.state, last.state) == (MADE, FAILED, MADE)
    with pytest.raises(ValueError, match="^n1: its worker died 2 times, the last ended by SIGKILL$"):
        dead.result


@pytest.mark.parametrize(
    "error, problem",
    [
        (ValueError("a: no"), "a: no"),
        (FloatingPointError("not finite"), "not finite"),
        (OSError(28, "No space left on device", "film.mp4"), "film.mp4: No space left on device; check the name"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory (CUDA out of memory.); close other programs"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_another_attempt_would_meet_is_a_problem_of_the_job(error, problem):
    outcome = Worker().do(Double(error))
    assert outcome.problem.startswith(problem) and outcome.result is None
    with Engine(Here(), retries=9) as engine:
        (progress,) = engine.in_order([Double(error)], 1)
    assert progress.attempts == 1
    with pytest.raises(ValueError) as raised:
        progress.result
    assert str(raised.value) == outcome.problem


def test_an_error_of_ours_ends_the_worker():
    with pytest.raises(ZeroDivisionError):
        Worker().do(Double(ZeroDivisionError()))


def test_what_was_loaded_is_kept_until_something_else_is():
    loaded, made = Loaded(), []
    load = lambda name: loaded.get(name, lambda: made.append(name) or name.upper())
    assert [load(name) for name in "aabba"] == list("AABBA") and made == list("aba")
