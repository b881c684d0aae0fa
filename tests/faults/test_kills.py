"""Commands are killed at random moments, one to three times in a row; run again, they make the same."""

import random
import time

import pytest

from .drill import COMMANDS, MAX_MESSAGE, SEED, SHORT, SIGNALS, SOAK

pytestmark = pytest.mark.slow


def kill(place, rng, seconds) -> str:
    """Start a command and end it, or one of its workers, at a random moment; returns what it printed."""
    started = place.start()
    time.sleep(rng.uniform(0, seconds))
    if rng.random() < 0.7 or not started.kill_worker():
        started.send(rng.choice(SIGNALS))
    return started.end().stderr


@pytest.mark.parametrize("name", COMMANDS if SOAK else (*SHORT, "contextual", "batch"))
def test_a_killed_command_is_run_again(name, place, references):
    reference, rng = references(name), random.Random(f"{SEED} {name}")
    for number in range(SOAK or 1):
        there = place(name, f"round{number}")
        for _ in range(rng.randint(1, 3)):
            stderr = kill(there, rng, 1.1 * reference.seconds)
            assert "Traceback" not in stderr, stderr
            assert all(len(line) <= MAX_MESSAGE for line in stderr.splitlines() if "error" in line), stderr
            there.check_files(reference)
        there.run().succeeded()
        assert there.made() == reference.made, number
        assert there.leftovers() == []
