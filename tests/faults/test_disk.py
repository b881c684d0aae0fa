"""A full disk, a folder that is read-only, two processes at once: one line, nothing half-written, then the same result.

A limit on the size of files stands in for a full disk: the write fails in the middle, as on one.
"""

import random
import signal
import time

import pytest

from .drill import SEED, SOAK

pytestmark = pytest.mark.slow
LARGEST = {"generate": 40_000, "encode": 60_000, "convert": 400_000, "evaluate": 20_000}
"""Bytes that the files of a command have; those of a training stage have more."""


def test_a_full_disk(name, place, references):
    rng = random.Random(f"{SEED} disk {name}")
    for number in range(SOAK or 1):
        there = place(name, f"round{number}")
        ended = there.run(most_bytes=rng.randrange(100, LARGEST.get(name, 200_000)))
        there.check_end(ended)
        there.check_files(references(name))
        there.run().succeeded()
        assert there.made() == references(name).made, number
        assert there.leftovers() == []


def test_a_read_only_folder(name, place, references):
    """Also one that becomes read-only when the command has begun."""
    there = place(name)
    before = sorted(there.folder.rglob("*"))
    there.folder.chmod(0o555)
    ended = there.run(read_only=True)
    assert ended.status == 2 and "Permission denied" in ended.error, ended.stderr
    assert sorted(there.folder.rglob("*")) == before
    there.folder.chmod(0o755)
    started = there.start(read_only=True)
    time.sleep(random.Random(f"{SEED} read-only {name}").uniform(0, references(name).seconds))
    folders = [there.folder, *(path for path in there.folder.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    ended = started.end()
    for folder in folders:
        folder.chmod(0o755)
    there.check_end(ended)
    there.check_files(references(name))
    there.run().succeeded()
    assert there.made() == references(name).made


def test_two_processes(name, place, references):
    """One is refused, or both write the same, one after the other."""
    there = place(name)
    first = there.start()
    time.sleep(references(name).seconds / 2)
    first.send(signal.SIGSTOP)
    second = there.run()
    first.send(signal.SIGCONT)
    both = [first.end(), second]
    for ended in both:
        there.check_end(ended)  # Training refuses a run that is finished.
    assert not all(ended.status for ended in both)
    there.check_files(references(name))
    there.run().succeeded()
    assert there.made() == references(name).made
    assert there.leftovers() == []
