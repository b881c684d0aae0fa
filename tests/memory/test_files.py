"""A lock is one process's, and goes with it; a file that has its name is whole."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from context_forcing.memory import files as disk
from context_forcing.memory.files import OURS, HeldError, atomic_path, check_writable, hold_folder, lock, lock_name
from context_forcing.video.mp4 import hold_output

HOLDER = """
import sys, time
from pathlib import Path
from context_forcing.memory.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock, and the lock."""
    path = tmp_path / "a.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process, path
    process.kill()
    process.communicate()


def test_another_process_is_refused_and_told_who_holds_it(holder):
    process, path = holder
    said = path.read_bytes()
    holder = rf"^pid {process.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"
    with pytest.raises(HeldError, match=holder), lock(path):
        pass
    assert path.read_bytes() == said
    process.communicate("\n")
    assert not path.exists()
    with lock(path):
        assert f"pid {os.getpid()} " in path.read_text()
    assert not path.exists()


def test_a_killed_process_holds_nothing(holder):
    process, path = holder
    process.kill()
    process.wait()
    assert path.exists()
    with lock(path):
        assert path.read_text().startswith(f"pid {os.getpid()} on ")
    assert not path.exists()


def test_an_error_lets_go(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "a.lock"):
        raise KeyError
    with lock(tmp_path / "a.lock"), pytest.raises(HeldError), lock(tmp_path / "a.lock"):
        pass


def test_a_lock_that_was_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    """Another process lets go and deletes the file between our opening and our locking it."""
    path, opened = tmp_path / "a.lock", []

    def open_late(*arguments):
        fd = os_open(*arguments)
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()
        return fd

    os_open = os.open
    monkeypatch.setattr(disk.os, "open", open_late)
    with lock(path):
        monkeypatch.undo()
        assert len(opened) == 2 and os.path.samestat(os.fstat(opened[1]), path.stat())
        with pytest.raises(HeldError), lock(path):
            pass


def take_turns(path, inside, entered):
    for _ in range(200):
        try:
            with lock(path):
                # Made by one at a time, or this raises.
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                inside.unlink()
                with entered.get_lock():
                    entered.value += 1
        except HeldError:
            pass


def test_processes_are_never_inside_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered = context.Value("i", 0)
    arguments = (tmp_path / "a.lock", tmp_path / "inside", entered)
    processes = [context.Process(target=take_turns, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0] and entered.value > 50
    assert not list(tmp_path.iterdir())


def test_where_no_file_can_stand(tmp_path):
    with pytest.raises(FileNotFoundError), lock(tmp_path / "missing" / "a.lock"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(disk.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / "a.lock"):
        pass
    assert "has no locks" in caplog.text and not list(tmp_path.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(disk.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_mode))
    with atomic_path(tmp_path / "a.txt") as part:
        part.write_bytes(b"all of it")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_bytes() == b"all of it" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert len(synced) == 2 or os.name == "nt"

    def replace(*_):
        raise OSError(disk.errno.EIO, "Input/output error")

    monkeypatch.setattr(disk.os, "replace", replace)
    for error in (OSError, KeyError):
        with pytest.raises(error), atomic_path(tmp_path / "a.txt") as part:
            part.write_bytes(b"half of it")
            if error is KeyError:
                raise KeyError
        assert (tmp_path / "a.txt").read_bytes() == b"all of it" and len(list(tmp_path.iterdir())) == 1


def test_locks_that_a_killed_process_left_go_with_the_next_one(tmp_path):
    left, held = (lock_name(tmp_path / name) for name in ("left", "held"))
    left.touch()
    with lock(held):
        with hold_folder("output", tmp_path):
            assert (tmp_path / f"{OURS}.lock").exists()
        assert list(tmp_path.iterdir()) == [held]


@pytest.mark.parametrize("length", [200, 224, 250])
def test_a_long_name_has_a_lock_and_is_written(tmp_path, length):
    path = tmp_path / ("x" * length)
    with atomic_path(path) as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    assert lock_name(path) != lock_name(path.with_name("y" * length))


def test_files_of_others_stay(tmp_path):
    """A lock and an unfinished file have names of our own: those of an editor, a build or a browser are not touched."""
    (tmp_path / "sub").mkdir()
    names = (".lock", ".keep.lock", "sub/.deps.lock", ".film.mp4.lock", "film.mp4.part", ".film.part.mp4", "film.part")
    theirs = [tmp_path / name for name in names]
    for path in theirs:
        path.write_text(f"{path.name} of somebody else")
    left = lock_name(tmp_path / "sub" / "left")
    left.touch()
    with hold_folder("output", tmp_path):
        check_writable("--memory-out", tmp_path / "film.mp4")
        with atomic_path(tmp_path / "film.mp4") as part:
            part.write_bytes(b"all of it")
            assert part.name == ".film.mp4.context_forcing.part"
        (tmp_path / "film.mp4").unlink()
        with hold_output(tmp_path / "film.mp4"):
            assert lock_name(tmp_path / "film.mp4").exists()
    assert not left.exists()
    assert all(path.read_text() == f"{path.name} of somebody else" for path in theirs)
    assert sorted(tmp_path.rglob("*.*")) == sorted(theirs)
