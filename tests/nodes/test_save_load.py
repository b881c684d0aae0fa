"""Where memories are kept, which files are listed, and what autosave writes, without ComfyUI."""

import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def files(node_module, tmp_path, monkeypatch):
    module = node_module("save_load")
    for kind in ("output", "input"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(module.folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    (tmp_path / "output" / "a").mkdir()
    numbers = itertools.count(7)
    monkeypatch.setattr(
        module.folder_paths,
        "get_save_image_path",
        lambda prefix, root, *size: (os.path.join(root, "a"), "b", next(numbers), "a", prefix),
    )
    module.list_again()
    return module


@pytest.fixture
def folder_reads(monkeypatch):
    """Folders that were read, as a list that grows."""
    reads, scandir = [], os.scandir

    def noted(path):
        reads.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    return reads


def memories(tmp_path):
    return sorted(path.name for path in (tmp_path / "output" / "a").iterdir())


def test_the_latest_memories_come_first(files, tmp_path):
    for age, name in enumerate(
        ("output/context_forcing/new", "output/other", "output/context_forcing/old", "input/any")
    ):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "input" / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "input" / "image.png").touch()
    assert files.memory_files() == [
        "context_forcing/new.safetensors [output]", "context_forcing/old.safetensors [output]",
        "any.safetensors [input]",
    ]  # fmt: skip


def test_a_folder_is_read_again_after_a_change_only(files, tmp_path, folder_reads):
    """ComfyUI asks for the list several times in a run; 100,000 pictures may lie there."""
    folder = tmp_path / "output" / "context_forcing"
    folder.mkdir()
    (folder / "one.safetensors").touch()
    folders = [tmp_path / "input", folder.parent / "a", folder, folder.parent]

    def an_hour_passes():
        for number, path in enumerate(folders):
            os.utime(path, (time.time() - 3600 + number,) * 2)

    an_hour_passes()
    assert len(files.memory_files()) == 1
    folder_reads.clear()
    assert len(files.memory_files()) == 1 and not folder_reads
    (folder / "two.safetensors").touch()
    assert len(files.memory_files()) == 2 and folder_reads == [str(folder)]
    (folder / "three.safetensors").touch()
    assert len(files.memory_files()) == 3, "a change in the same tick of the clock"
    (folder / "one.safetensors").unlink()
    assert len(files.memory_files()) == 2


def test_what_is_written_here_is_listed_at_once(files, empty_memory, rollout, tmp_path, monkeypatch):
    """Also where the time of a folder does not change."""
    monkeypatch.setattr(files, "FOLDER", "a")
    past = (time.time() - 3600,) * 2
    for path in (tmp_path / "output" / "a", tmp_path / "output", tmp_path / "input"):
        os.utime(path, past)
    assert not files.memory_files()
    files.write_autosave(rollout(empty_memory()), None, True)
    os.utime(tmp_path / "output" / "a", past)
    assert files.memory_files() == ["a/b_00007_.safetensors [output]"]


def test_a_file_that_vanishes_while_the_list_is_made_is_left_out(files, tmp_path, monkeypatch):
    for name in ("gone", "here"):
        (tmp_path / "input" / f"{name}.safetensors").touch()
    getmtime, stat = os.path.getmtime, os.stat

    def vanished(path, of, *args, **options):
        if str(path).endswith("gone.safetensors"):
            raise FileNotFoundError(path)
        return of(path, *args, **options)

    monkeypatch.setattr(os.path, "getmtime", lambda path: vanished(path, getmtime))
    monkeypatch.setattr(files.os, "stat", lambda path, *args, **options: vanished(path, stat, *args, **options))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    assert files.memory_files() == ["here.safetensors [input]"]


def test_a_memory_is_kept_where_it_is_asked_for(files, empty_memory, rollout, monkeypatch):
    monkeypatch.setattr(files.mm, "intermediate_device", lambda: CPU)
    before = rollout(empty_memory())
    after = rollout(before)
    assert files.keep_memory(after, "GPU", before) is after
    assert files.keep_memory(after, "compact", before).is_compact
    shared = {id(tensor) for tensor in before.tensors()}
    assert len([t for t in files.keep_memory(after, "RAM", before).tensors() if id(t) in shared]) > 2


def test_autosaves_are_compact_and_all_stay(files, empty_memory, rollout, tmp_path):
    first = rollout(empty_memory())
    path = files.write_autosave(first, None, True)
    assert path == files.write_autosave(rollout(first), path, True) is None
    assert memories(tmp_path) == ["b_00007_.safetensors", "b_00008_.safetensors"]
    assert files.load_memory(tmp_path / "output" / "a" / "b_00008_.safetensors").is_compact


def test_of_exact_autosaves_of_a_chain_the_newest_stays(files, empty_memory, rollout, tmp_path, monkeypatch):
    """Policy released cannot be compact, and a file has several GB. Every branch has one."""
    first = rollout(empty_memory(policy="released"))
    trunk = files.write_autosave(first, None, True)
    assert not files.load_memory(trunk.path).is_compact
    assert files.write_autosave(rollout(first), trunk, False) == trunk, "an interrupted segment is not the newest whole"
    assert memories(tmp_path) == ["b_00007_.safetensors", "b_00008_.safetensors"]
    branches = [files.write_autosave(rollout(first), trunk, True) for _ in range(2)]
    assert memories(tmp_path) == ["b_00008_.safetensors", *(os.path.basename(branch.path) for branch in branches)]
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_memory", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert files.write_autosave(rollout(first), branches[0], True) == branches[0]
    assert os.path.isfile(branches[0].path)
    os.unlink(branches[0].path)
    Path(branches[0].path).write_text("another memory that got the name")
    files.write_autosave(rollout(first), branches[0], True)
    assert os.path.isfile(branches[0].path)


def test_a_sampler_hands_its_autosave_on(node_module, empty_memory, rollout):
    handle = node_module("handle").MemoryHandle
    before, after = handle.of(empty_memory()), handle.of(rollout(empty_memory()), autosave="a file")
    inputs, samples = SimpleNamespace(), torch.zeros(1)
    before.remember(inputs, after, samples, {})
    found, *_ = before.find(inputs)
    assert found.autosave == "a file" and not before.autosave


def test_a_failed_autosave_is_logged(files, empty_memory, rollout, monkeypatch, caplog):
    def refuse(path, memory):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_memory", refuse)
    files.write_autosave(rollout(empty_memory()), None, True)
    assert "autosave: disk full" in caplog.text
