"""Memory ends at a random operation of torch, in any command: one line, and the next run makes the same."""

import random

import pytest

from .drill import SEED, SOAK

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SOAK, reason="make soak")]


def test_out_of_memory(name, place, references):
    there, rng = place(name, "counted"), random.Random(f"{SEED} memory {name}")
    num_operations = there.run(count_operations=True).succeeded().operations
    for number in range(SOAK):
        there = place(name, f"round{number}")
        ended = there.run(fail_at=rng.randrange(num_operations))
        # safetensors has a message of its own where it cannot map a tensor.
        assert ended.status == 2 and ("out of memory" in ended.error or "UntypedStorage" in ended.error), ended.stderr
        there.check_files(references(name))
        there.run().succeeded()
        assert there.made() == references(name).made, number
        assert there.leftovers() == []
