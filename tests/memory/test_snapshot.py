"""A memory on disk: exact, or refused in one line."""

import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from context_forcing.memory.snapshot import DIGEST_KEY, HEADER_KEY, digest, load_memory, save_memory

from .conftest import SIZES, STUDENT


def refused(path, student=STUDENT):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        load_memory(path, student)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


def rewrite(path, edit_header=lambda header: None, edit_tensors=lambda tensors: None, forge=False):
    """Change a saved memory with the means of safetensors; `forge` gives it the digest of what it says then."""
    with safe_open(path, "pt") as f:
        header, tensors = json.loads(f.metadata()[HEADER_KEY]), {key: f.get_tensor(key) for key in f.keys()}
    edit_header(header)
    edit_tensors(tensors)
    if forge:
        header.pop(DIGEST_KEY)
        header[DIGEST_KEY] = digest(header, tensors)
    save_file(tensors, path, {HEADER_KEY: json.dumps(header)})


def test_round_trip_is_exact(memory, path, same_memory):
    assert same_memory(load_memory(path, STUDENT), memory)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_half_precision_round_trip_is_exact(memory, tmp_path, same_memory):
    half = memory.to("cpu", torch.bfloat16)
    save_memory(tmp_path / "half.safetensors", half)
    assert same_memory(load_memory(tmp_path / "half.safetensors"), half)


def test_an_empty_memory_round_trips(empty_memory, tmp_path, same_memory):
    for memory in (empty_memory(), empty_memory(policy="clean").begin("soon", 1)):
        save_memory(tmp_path / "empty.safetensors", memory)
        assert same_memory(load_memory(tmp_path / "empty.safetensors"), memory)


def test_continuing_a_loaded_memory_is_bit_identical(memory, path, continue_by, same_memory):
    assert same_memory(continue_by(load_memory(path, STUDENT), 4), continue_by(memory, 4))


def test_cover_continues_as_if_it_had_not_been_saved(continue_by, empty_memory, same_memory, tmp_path):
    """The similarities of slow frames are in the file; without them, as in files of before, they are computed again."""
    path = tmp_path / "cover.safetensors"
    memory = continue_by(empty_memory(**SIZES | dict(slow=3, window=8, policy="cover")).begin("a prompt", 5), 6)
    assert len(memory.store.similarities) == 3 and any(d.evicted is not None for d in memory.decisions)
    save_memory(path, memory)
    whole = continue_by(memory, 4)
    assert same_memory(load_memory(path, STUDENT), memory)
    assert same_memory(continue_by(load_memory(path, STUDENT), 4), whole)
    rewrite(path, lambda header: header.pop("similarities"), forge=True)
    assert not load_memory(path, STUDENT).store.similarities
    assert same_memory(continue_by(load_memory(path, STUDENT), 4), whole)


def test_saving_twice_gives_the_same_bytes(memory, path):
    save_memory(path.with_name("again.safetensors"), memory)
    assert path.read_bytes() == path.with_name("again.safetensors").read_bytes()


def test_a_memory_replaces_an_older_one(memory, path, continue_by, same_memory):
    longer = continue_by(memory, 1)
    save_memory(path, longer)
    assert same_memory(load_memory(path, STUDENT), longer)


def test_a_memory_is_on_the_disk_before_it_has_its_name(memory, tmp_path, monkeypatch):
    path, synced = tmp_path / "new.memory", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_size, path.exists())))
    save_memory(path, memory)
    assert synced[0] == (path.stat().st_size, False) and (len(synced) == 2 or os.name == "nt"), "file, then folder"


def test_another_student(path):
    assert "student" in refused(path, "fedcba9876543210")


def test_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100, b"\xff" * 100, b"{}" * 50], ids=repr)
def test_garbage(path, content):
    path.write_bytes(content)
    refused(path)


def test_another_kind_of_file(path):
    save_file({"film": torch.zeros(1)}, path)
    assert "not a memory" in refused(path)


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refused(path)


def test_missing_extra_and_reshaped_tensors(path):
    original = path.read_bytes()
    for edit in (
        lambda tensors: tensors.pop("film"),
        lambda tensors: tensors.pop("keys.0"),
        lambda tensors: tensors.pop("values.9"),
        lambda tensors: tensors.update({"keys.5000": tensors["keys.0"].clone()}),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update({"keys.0": tensors["keys.0"][..., :-1].clone()}),
        lambda tensors: tensors.update(film=tensors["film"][:, :, 1:].clone()),
    ):
        path.write_bytes(original)
        rewrite(path, edit_tensors=edit)
        refused(path)


HEADER_EDITS = {
    "version": lambda h: h.update(version=1),
    "no version": lambda h: h.pop("version"),
    "no student": lambda h: h.pop("student"),
    "no slots": lambda h: h.pop("slots"),
    "no config": lambda h: h.pop("config"),
    "no chunks": lambda h: h.pop("chunks"),
    "unknown setting": lambda h: h["config"].update(slots=3),
    "impossible setting": lambda h: h["config"].update(chunk=0),
    "unknown policy": lambda h: h["config"].update(policy="newest"),
    "size as text": lambda h: h["config"].update(sink="3"),
    "window too small": lambda h: h["config"].update(window=6),
    "unknown slots": lambda h: h["slots"].update(medium=[]),
    "slots as number": lambda h: h["slots"].update(slow=3),
    "frame beyond the film": lambda h: h["slots"]["slow"].append(5000),
    "one frame fewer": lambda h: h["slots"]["slow"].pop(),
    "film longer": lambda h: h["chunks"].append(2),
    "film shorter": lambda h: h["chunks"].pop(),
    "chunks as text": lambda h: h.update(chunks="2222"),
    "another latent size": lambda h: h.update(latent_size=[16, 6, 4]),
    "two numbers of latent size": lambda h: h.update(latent_size=[16, 4]),
    "decision without score": lambda h: h["decisions"].append([3, True]),
    "decisions as number": lambda h: h.update(decisions=5),
    "segment with more": lambda h: h["segments"].append([1, "a", 2, 3]),
}


@pytest.mark.parametrize("edit", HEADER_EDITS.values(), ids=HEADER_EDITS.keys())
def test_edited_header(path, edit):
    rewrite(path, edit)
    refused(path)


SUBTLE_EDITS = {
    "size as fraction": lambda h: h["config"].update(uniform_stride=2.5),
    "another policy": lambda h: h["config"].update(policy="fifo"),
    "another threshold": lambda h: h["config"].update(slow_similarity_threshold=0.5),
    "smaller slow": lambda h: h["config"].update(slow=1),
    "smaller sink": lambda h: h["config"].update(sink=0),
    "frame twice": lambda h: h["slots"]["slow"].append(h["slots"]["sink"][0]),
    "out of order": lambda h: h["slots"]["fast"].reverse(),
    "sink and slow exchanged": lambda h: h["slots"].update(sink=h["slots"]["slow"], slow=h["slots"]["sink"]),
    "no likeness": lambda h: h["slots"].update(likeness=[]),
    "decisions missing": lambda h: h["decisions"].pop(),
    "decision as text": lambda h: h["decisions"][0].__setitem__(1, "yes"),
    "other prompt": lambda h: h["segments"][0].__setitem__(1, "another prompt"),
    "segment as text": lambda h: h["segments"][0].__setitem__(0, "zero"),
    "negative chunk": lambda h: h.update(chunks=[-2, 12]),
    "chunks split otherwise": lambda h: h.update(chunks=[10]),
}


@pytest.mark.parametrize("edit", SUBTLE_EDITS.values(), ids=SUBTLE_EDITS.keys())
def test_subtly_edited_header(path, edit):
    rewrite(path, edit)
    refused(path)


def mutations(path, num, first, last):
    """`num` random damages of a file's bytes [first, last): a byte changed, a run zeroed or the end cut off."""
    rng, original = random.Random(0), path.read_bytes()
    for _ in range(num):
        content = bytearray(original)
        at = rng.randrange(first, last)
        kind = rng.choice(["flip", "flip", "byte", "zeros", "cut"])
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            content[at] = rng.randrange(256)
        elif kind == "zeros":
            content[at : at + 8] = bytes(len(content[at : at + 8]))
        else:
            del content[at:]
        if content != original:
            path.write_bytes(content)
            yield f"{kind} at {at}"


def header_end(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def load_or_refuse(path):
    """The memory, or None for a refusal in one line; anything else fails the test."""
    try:
        return load_memory(path, STUDENT)
    except ValueError as error:
        assert "\n" not in str(error)
        return None


def test_damage_never_raises_anything_but_valueerror(path):
    refusals = 0
    for _ in mutations(path, 600, 0, header_end(path)):
        refusals += load_or_refuse(path) is None
    assert refusals > 200


@pytest.mark.parametrize("where", ["header", "tensors"])
def test_damage_is_refused_or_harmless(memory, path, same_memory, where):
    end, size = header_end(path), path.stat().st_size
    first, last = (0, end) if where == "header" else (end, size)
    wrong = [
        what
        for what in mutations(path, 200, first, last)
        if (loaded := load_or_refuse(path)) is not None and not same_memory(loaded, memory)
    ]
    assert not wrong, f"{len(wrong)} of 200 damaged files were taken for whole: {wrong[:5]}"


def test_unwritable_is_one_line(memory, tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "memory.safetensors"):
        with pytest.raises(ValueError) as caught:
            save_memory(path, memory)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.parent.glob("*.part")) and not list(tmp_path.iterdir())
