"""Encoded sets on disk: a kill at any time damages nothing, and every sample number has its clip."""

import json
import os
import shutil
import stat

import pytest
import torch

from context_forcing.train.data import shards
from context_forcing.train.data.manifest import MANIFEST, Header, read_manifest
from context_forcing.train.data.shards import EncodedSet, ShardWriter

HEADER = Header(
    source="/videos", model="demo", vae="v", text_encoder="t", dtype="fp16", fps=16, size=(16, 16), frames=3
)
PROMPTS = Header(source="/prompts.txt", model="demo", vae=None, text_encoder="t", dtype="fp16")
SHAPE = (16, 3, 2, 2)
A_CLIP = 2 * 16 * 3 * 2 * 2
"""Bytes of the latents of a clip."""


def clip(i, shape=SHAPE):
    """Clip number i: latents and text that are its own."""
    generator = torch.Generator().manual_seed(i)
    text = torch.randn(1 + i % 3, 8, generator=generator)
    return {"latents": torch.randn(shape, generator=generator).half(), "text": text.half()}


def write(folder, num_sources=7, clips_each=3, shard_bytes=4 * A_CLIP, header=HEADER):
    """A set of num_sources * clips_each clips, about four a shard; source 2 is skipped, then comes all the rest."""
    writer = ShardWriter(folder, header, shard_bytes)
    for i in range(num_sources):
        if f"s{i}" in writer.manifest.finished or f"s{i}" in writer.manifest.skipped:
            continue
        if i == 2:
            writer.skip("s2", "too short")
            continue
        for k in range(writer.clips_of(f"s{i}"), clips_each):
            writer.add(f"s{i}", float(k), f"caption {i}", clip(10 * i + k))
        writer.finish(f"s{i}", clips_each)
    writer.flush()
    return folder


def contents(folder):
    """The lines of the manifest, sorted, and the bytes of the shards."""
    lines = sorted((folder / MANIFEST).read_text().splitlines())
    return lines, {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("set"))


def clip_numbers(encoded, samples):
    """The number that `clip` made each sample from."""
    entries = [encoded.entry(sample) for sample in samples]
    return [10 * int(entry.source[1:]) + int(entry.start) for entry in entries]


def test_manifest_lists_clips_finished_and_skipped(folder):
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert lines[0] == {**vars(HEADER), "size": [16, 16]}
    clips = [line for line in lines if "key" in line]
    assert len(clips) == 18 and len({line["key"] for line in clips}) == 18
    assert {"source": "s2", "skipped": "too short"} in lines and {"source": "s3", "clips": 3} in lines
    assert {line["shard"] for line in clips} == {path.name for path in folder.glob("*.safetensors")}
    assert not list(folder.glob("*.part"))


def test_samples_are_what_was_written(folder):
    encoded = EncodedSet(folder, 0)
    for sample, number in enumerate(clip_numbers(encoded, range(20))):
        latents, text = encoded.sample(sample)
        expected = clip(number)
        assert torch.equal(latents, expected["latents"].float()[None])
        assert torch.equal(text, expected["text"].float()[None]) and torch.equal(text, encoded.text(sample))
        assert encoded.entry(sample).caption == f"caption {number // 10}"
    assert torch.equal(EncodedSet(folder, 0, 2).sample(5)[0], encoded.sample(5)[0][:, :, :2])


@pytest.mark.parametrize("window", [1, 2, 4, 99])
def test_every_epoch_contains_every_clip_once(folder, window, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW", window)
    encoded = EncodedSet(folder, 3)
    epochs = [clip_numbers(encoded, range(18 * k, 18 * k + 18)) for k in range(5)]
    everything = [10 * i + k for i in range(7) if i != 2 for k in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has its own order"


def test_the_order_never_changes(folder):
    """Runs that were begun with earlier versions resume with the same samples."""
    first = [62, 40, 12, 41, 11, 32, 42, 1, 2, 10, 30, 61, 31, 0, 60, 50, 52, 51, 2, 0, 51, 50, 1, 30]
    assert clip_numbers(EncodedSet(folder, 1), range(24)) == first
    assert clip_numbers(EncodedSet(folder, 1), reversed(range(24))) == first[::-1]
    assert clip_numbers(EncodedSet(folder, 3), range(8)) == [50, 51, 30, 42, 62, 60, 32, 40]


def test_clips_are_read_from_few_shards_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW", 2)
    encoded = EncodedSet(folder, 0)
    used = [encoded.entry(sample).shard for sample in range(18)]
    assert len(set(used)) == 5
    ends = [len(set(used[:count])) for count in range(1, 19)]
    assert all(len(set(used[count:])) <= 5 - seen + 2 for count, seen in enumerate(ends)), "windows of two shards"
    for sample in range(60):
        encoded.sample(sample)
    assert encoded.open.cache_info().currsize == 4, "two windows of open shards at most"


def test_a_set_of_prompts_has_no_latents(tmp_path):
    writer = ShardWriter(tmp_path, PROMPTS, 10**6)
    writer.write_empty_text(lambda: torch.zeros(0, 8).half())
    for i in range(5):
        writer.add(f"prompt {i}", None, f"prompt {i}", {"text": clip(i)["text"]})
    writer.flush()
    encoded = EncodedSet(tmp_path, 0)
    for sample in range(5):
        rows = clip(int(encoded.entry(sample).caption[-1]))["text"].float()
        assert torch.equal(encoded.text(sample), rows[None])
    assert torch.equal(encoded.empty, torch.zeros(1, 1, 8)), "the model pads, so no row is one row of zeros"


def test_wherever_the_manifest_is_cut_the_set_is_made_whole(folder, tmp_path):
    """A kill leaves the manifest cut at any byte, and shards that it does not list."""
    text, whole = (folder / MANIFEST).read_bytes(), contents(folder)
    header = text.index(b"\n") + 1
    for cut in range(header, len(text) + 1, 37):
        again = tmp_path / str(cut)
        shutil.copytree(folder, again)
        (again / MANIFEST).write_bytes(text[:cut])
        (again / "shard-00004.safetensors.part").write_bytes(b"half")
        write(again)
        (again / "shard-00004.safetensors.part").unlink(missing_ok=True)
        assert contents(again) == whole, cut
        shutil.rmtree(again)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("failing", range(1, 7))
def test_an_error_while_writing_loses_nothing_that_was_complete(folder, tmp_path, monkeypatch, name, failing):
    """A full disk at the first, second ... sixth time that a file is flushed or renamed."""
    original, calls = getattr(shards.os, name), 0

    def fail(*args):
        nonlocal calls
        # An error of a folder's fsync is ignored: some file systems do not support it.
        calls += name == "replace" or stat.S_ISREG(os.fstat(args[0]).st_mode)
        if calls == failing:
            raise OSError(28, "No space left on device")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, name, fail)
        with pytest.raises(ValueError, match="output: .* cannot be written .No space"):
            write(tmp_path)
    before = read_manifest(tmp_path).entries if (tmp_path / MANIFEST).exists() else []
    write(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert read_manifest(tmp_path).entries[: len(before)] == before


@pytest.mark.parametrize("listed", range(1, 4))
def test_a_kill_while_a_shard_is_continued_loses_no_clip_of_it(folder, tmp_path, monkeypatch, listed):
    """After the shard is written again, before the manifest lists it."""
    writer = ShardWriter(tmp_path, HEADER, 4 * A_CLIP)
    for k in range(listed):
        writer.add("s0", float(k), "caption 0", clip(k))
    writer.flush()
    before, replace = read_manifest(tmp_path).entries, os.replace

    def fail(source, target):
        if str(target).endswith(MANIFEST):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot be written"):
        patch.setattr(shards.os, "replace", fail)
        write(tmp_path)
    assert len(shards.open_shard(tmp_path / "shard-00000.safetensors").keys()) > 2 * listed
    assert read_manifest(tmp_path).entries == before and len(before) == listed
    write(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_a_failed_write_can_be_tried_again(tmp_path, monkeypatch):
    """Lines that were written in part are written again, and none is there twice."""
    writer = ShardWriter(tmp_path, HEADER, 9 * A_CLIP)
    writer.add("s0", 0.0, "caption 0", clip(0))
    writer.flush()
    writer.finish("s0", 1)

    def fail(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot be written"):
        patch.setattr(shards.os, "fsync", fail)
        writer.finish("s1", 1)
    with open(tmp_path / MANIFEST, "a") as file:
        file.write('{"source": "s')
    writer.flush()
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [line["source"] for line in lines[1:]] == ["s0", "s0", "s1"]


def test_a_damaged_shard_is_not_continued(tmp_path):
    writer = ShardWriter(tmp_path, HEADER, 4 * A_CLIP)
    writer.add("s0", 0.0, "caption 0", clip(0))
    writer.flush()
    path = tmp_path / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="shard-00000.safetensors: .* is damaged, it does not have its digest"):
        write(tmp_path)
    assert path.read_bytes() == content


def test_a_set_can_be_read_while_it_is_written(tmp_path):
    writer = ShardWriter(tmp_path, HEADER, 4 * A_CLIP)
    for i in range(10):
        writer.add(f"s{i}", 0.0, f"caption {i}", clip(10 * i))
    count = len(EncodedSet(tmp_path, 0).entries)
    assert 4 <= count < 10
    with open(tmp_path / MANIFEST, "a") as file:
        file.write('{"source": "s1')
    assert len(EncodedSet(tmp_path, 0).entries) == count


def test_another_header_is_refused(folder):
    other = Header(**{**vars(HEADER), "frames": 4})
    with pytest.raises(ValueError, match="frames: 4 now, 3 when .* was begun"):
        ShardWriter(folder, other, 1)


def test_shards_without_a_manifest_are_not_written_over(tmp_path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="choose another folder"):
        ShardWriter(tmp_path, HEADER, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_folders_that_hold_no_set(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest.jsonl; make a set"):
        EncodedSet(tmp_path, 0)
    ShardWriter(tmp_path, HEADER, 1).flush()
    with pytest.raises(ValueError, match="the set has no clips"):
        EncodedSet(tmp_path, 0)


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


@pytest.mark.parametrize("shard", ["shard-00001.safetensors", "shard-00004.safetensors"])
def test_missing_and_cut_shards(damaged, shard):
    path = damaged / shard
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{shard}: not a whole safetensors file"):
        EncodedSet(damaged, 0)
    path.unlink()
    with pytest.raises(ValueError, match=f"{shard}: this shard of the set is missing"):
        EncodedSet(damaged, 0)


def test_clips_of_different_shapes(tmp_path):
    writer = ShardWriter(tmp_path, HEADER, 1)
    writer.add("a", 0.0, "a", clip(0))
    writer.add("b", 0.0, "b", clip(1, (16, 3, 2, 4)))
    writer.flush()
    with pytest.raises(ValueError, match=r"clip 00000001 of b has latents \(16, 3, 2, 4\)"):
        EncodedSet(tmp_path, 0)


def test_a_clip_that_its_shard_does_not_hold(damaged):
    path = damaged / MANIFEST
    path.write_text(path.read_text().replace('"key": "00000000"', '"key": "00000099"'))
    with pytest.raises(ValueError, match="00000099.text is missing"):
        EncodedSet(damaged, 0)


@pytest.mark.parametrize(
    "line, message",
    [("nonsense", "line 2 is damaged"), ('{"source": "a"}', "line 2 is damaged"), ("[]", "line 2 is damaged")],
)
def test_a_damaged_manifest(damaged, line, message):
    path = damaged / MANIFEST
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{line}\n{rest}")
    with pytest.raises(ValueError, match=message):
        read_manifest(damaged)


def test_a_manifest_of_another_version(damaged):
    path = damaged / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 9', 1))
    with pytest.raises(ValueError, match="version 9"):
        read_manifest(damaged)
