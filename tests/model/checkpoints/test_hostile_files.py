"""Model files that are not what their name says, or are made to take long: refused in one short line, in short time."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.memory.files import MAX_TENSORS
from context_forcing.memory.snapshot import HEADER_KEY, load_memory
from context_forcing.model.checkpoints import containers
from context_forcing.model.checkpoints.containers import open_container

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}


def refused(path, read=open_container):
    """The one line with which a file is refused, without its path."""
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value).removeprefix(f"{path}: ")
    assert "\n" not in message and len(message) <= 250
    return message


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["student.safetensors", "student.sft", "student.pt"])
def test_the_first_bytes_say_what_a_pickle_is(tmp_path, name, is_zip):
    torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    container = open_container(tmp_path / name)
    assert container.kind == "torch pickle" and container.tree.keys() == WEIGHTS.keys()
    assert all(torch.equal(container.tree[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("name", ["student.safetensors", "student.pt"])
def test_a_pickle_of_objects_is_refused_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(print))
    assert "not a complete torch file" in refused(tmp_path / name)
    torch.save({"a": print}, tmp_path / name)
    assert "print" in refused(tmp_path / name)


def test_a_pickle_of_many_parts_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_READS", 1000)
    path = tmp_path / "marks.pt"
    path.write_bytes(b"\x80\x02" + b"(" * 10**6 + b".")
    assert "more than 1000 parts" in refused(path)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert open_container(path).tree.keys() == WEIGHTS.keys()


def rezipped(path, compression=zipfile.ZIP_STORED, pickled=None):
    """A torch file packed again, with another pickle."""
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, pickled if pickled and name.endswith(".pkl") else data)
    return path


def test_a_zip_that_is_compressed_or_has_a_large_pickle_is_refused(tmp_path, monkeypatch):
    bomb = rezipped(tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, b"\x80\x02" + b"(" * 2**20 + b".")
    assert bomb.stat().st_size < 2**14 and "it is compressed" in refused(bomb)
    monkeypatch.setattr(containers, "MAX_PICKLE", 1000)
    large = rezipped(tmp_path / "large.pt", pickled=b"\x80\x02" + b"(" * 2000 + b".")
    assert "its pickle has more than 1000 bytes" in refused(large)


def empties(path, num, metadata):
    """A safetensors file of empty tensors."""
    tensors = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(num)}
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_many_empty_tensors_are_not_read(tmp_path):
    path = empties(tmp_path / "many.safetensors", MAX_TENSORS + 1, {HEADER_KEY: "{}"})
    assert f"holds {MAX_TENSORS + 1} tensors" in refused(path)
    assert f"holds {MAX_TENSORS + 1} tensors" in refused(path, load_memory)
    assert "not a memory" in refused(empties(path, MAX_TENSORS + 1, {}), load_memory)


def test_a_header_that_claims_more_than_the_file_has(tmp_path):
    path = tmp_path / "claims.safetensors"
    save_file(WEIGHTS, path)
    for size in (2**62, 2**40, path.stat().st_size):
        data = bytearray(path.read_bytes())
        data[:8] = struct.pack("<Q", size)
        path.write_bytes(data)
        refused(path)
