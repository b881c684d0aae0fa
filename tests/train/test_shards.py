"""A set on disk: no kill breaks it, every clip comes once an epoch, ranks share an order, a position resumes it."""

import json
import shutil
import threading

import pytest
import torch
from context_forcing.train.data import shards
from context_forcing.train.data.shards import MANIFEST, Header, ShardedClips, ShardWriter, read_manifest

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
    """Everything a set says, whatever the order of its lines, and the bytes of its shards."""
    lines = sorted((folder / MANIFEST).read_text().splitlines())
    return lines, {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("set"))


def number(entry):
    """(source, start) -> the number that `clip` made it from."""
    return 10 * int(entry.source[1:]) + int(entry.start)


def take(loader, count):
    """Clip numbers of the next batches."""
    return [[number(entry) for entry in next(loader).clips] for _ in range(count)]


def test_manifest_lists_clips_finished_and_skipped(folder):
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert lines[0] == {**vars(HEADER), "size": [16, 16]}
    clips = [line for line in lines if "key" in line]
    assert len(clips) == 18 and len({line["key"] for line in clips}) == 18
    assert {"source": "s2", "skipped": "too short"} in lines and {"source": "s3", "clips": 3} in lines
    assert {line["shard"] for line in clips} == {path.name for path in folder.glob("*.safetensors")}
    assert not list(folder.glob("*.part"))


def test_batches_hold_what_was_written(folder):
    for batch in (next(loader) for loader in [ShardedClips(folder, 5, 0)] for _ in range(4)):
        rows = [1 + number(entry) % 3 for entry in batch.clips]
        assert batch.latents.shape == (5, *SHAPE) and batch.latents.dtype == torch.float32
        assert batch.text.shape == (5, max(rows), 8) and batch.text.dtype == torch.float32
        for entry, latents, text, count in zip(batch.clips, batch.latents, batch.text, rows):
            true = clip(number(entry))
            assert torch.equal(latents, true["latents"].float())
            assert torch.equal(text[:count], true["text"].float()) and not text[count:].any()
            assert entry.caption == f"caption {entry.source[1:]}"


@pytest.mark.parametrize("batch, window", [(1, 1), (3, 2), (5, 4), (18, 99)])
def test_every_epoch_is_every_clip_once(folder, batch, window):
    """Also where batches span epochs: 18 clips in batches of 5."""
    loader = ShardedClips(folder, batch, 3, window=window)
    stream = sum(take(loader, 5 * 18 // batch), [])
    epochs = [stream[i : i + 18] for i in range(0, len(stream) - 17, 18)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == sorted(number(entry) for entry in loader.entries) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has an order of its own"


@pytest.mark.parametrize("world_size, batch", [(2, 3), (3, 2), (6, 1)])
def test_ranks_see_together_what_one_sees(folder, world_size, batch):
    whole = take(ShardedClips(folder, world_size * batch, 1), 10)
    ranks = [take(ShardedClips(folder, batch, 1, rank=r, world_size=world_size), 10) for r in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole


def test_the_order_is_a_function_of_the_seed(folder):
    assert take(ShardedClips(folder, 4, 1), 9) == take(ShardedClips(folder, 4, 1), 9)
    assert take(ShardedClips(folder, 4, 1), 9) != take(ShardedClips(folder, 4, 2), 9)


@pytest.mark.parametrize("done", [0, 1, 4, 11])
def test_a_position_gives_the_batches_that_would_have_come(folder, done):
    loader = ShardedClips(folder, 4, 1)
    take(loader, done)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"position": 4 * done}
    whole = [next(loader) for _ in range(6)]
    again = ShardedClips(folder, 4, 1)
    again.load_state_dict(state)
    for one, other in zip(whole, (next(again) for _ in range(6))):
        assert (
            one.clips == other.clips and torch.equal(one.latents, other.latents) and torch.equal(one.text, other.text)
        )
    halves = [ShardedClips(folder, 2, 1, rank=r, world_size=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    pairs = zip(*(take(half, 6) for half in halves))
    assert [a + b for a, b in pairs] == [[number(entry) for entry in batch.clips] for batch in whole]


def test_reading_stays_within_a_window_of_shards(folder):
    loader = ShardedClips(folder, 1, 0, window=2)
    order = loader.order(0)
    assert len(order.windows) == -(-len(loader._by_shard) // 2)
    begin = 0
    for shard_names, end in zip(order.windows, order.ends):
        assert {loader.entries[i].shard for i in order.clips[begin:end]} == set(shard_names)
        begin = end
    most = 0
    for _ in range(60):
        next(loader)
        most = max(most, len(loader._open))
    assert most == 4, "two windows of open shards at most, however long it runs"


def test_the_next_window_is_read_in_the_background(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(
        shards, "read_through", lambda paths: calls.append((threading.current_thread(), [p.name for p in paths]))
    )
    loader = ShardedClips(folder, 1, 0, window=2)
    used, asked_by = [], {}
    for step in range(40):
        shard = next(loader).clips[0].shard
        if not used or used[-1] != shard:
            used.append(shard)
        for thread in threading.enumerate():
            if thread.name == "shard prefetch":
                thread.join()
        for _, names in calls:
            for name in names:
                asked_by.setdefault(name, step)
    assert all(thread is not threading.main_thread() for thread, _ in calls)
    order = loader.order(0)
    coming = [*order.windows[1:], loader.order(1).windows[0]]
    assert [tuple(names) for _, names in calls][: len(coming)] == coming
    assert asked_by[order.windows[1][0]] == 0, "the second window is read while the first is used"


def test_read_through_is_harmless(folder):
    shards.read_through([*folder.glob("shard-*"), folder / "none"])


def test_a_set_of_prompts_has_no_latents(tmp_path):
    writer = ShardWriter(tmp_path, PROMPTS, 10**6)
    writer.write_empty_text(torch.zeros(0, 8).half())
    for i in range(5):
        writer.add(f"prompt {i}", None, f"prompt {i}", {"text": clip(i)["text"]})
    writer.flush()
    loader = ShardedClips(tmp_path, 5, 0)
    batch = next(loader)
    assert batch.latents is None and batch.text.shape == (5, 3, 8)
    for entry, text in zip(batch.clips, batch.text):
        rows = clip(int(entry.caption[-1]))["text"].float()
        assert torch.equal(text[: len(rows)], rows)
    assert torch.equal(loader.empty_text(), torch.zeros(1, 1, 8)), "no row is one row of zeros: the model pads"


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
def test_an_error_while_writing_loses_nothing_whole(folder, tmp_path, monkeypatch, name):
    """A full disk at the first, second ... sixth time that something is written through or put in its place."""
    true = getattr(shards.os, name)
    for failing in range(1, 7):
        calls = 0

        def fail(*args):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            return true(*args)

        again = tmp_path / str(failing)
        with monkeypatch.context() as patch:
            patch.setattr(shards.os, name, fail)
            with pytest.raises(ValueError, match="output: .* cannot be written .No space"):
                write(again)
        before = read_manifest(again).entries if (again / MANIFEST).exists() else []
        write(again)
        assert contents(again) == contents(folder)
        assert read_manifest(again).entries[: len(before)] == before


def test_a_set_can_be_read_while_it_is_written(tmp_path):
    writer = ShardWriter(tmp_path, HEADER, 4 * A_CLIP)
    for i in range(10):
        writer.add(f"s{i}", 0.0, f"caption {i}", clip(10 * i))
    count = len(ShardedClips(tmp_path, 1, 0))
    assert 4 <= count < 10
    with open(tmp_path / MANIFEST, "a") as file:
        file.write('{"source": "s1')
    assert len(ShardedClips(tmp_path, 1, 0)) == count


def test_another_header_is_refused(folder):
    other = Header(**{**vars(HEADER), "frames": 4})
    with pytest.raises(ValueError, match="frames: 4 now, 3 when .* was begun"):
        ShardWriter(folder, other, 1)


def test_shards_without_a_manifest_are_not_written_over(tmp_path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="choose another folder"):
        ShardWriter(tmp_path, HEADER, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


BAD_ARGUMENTS = {
    "batch of none": (dict(batch_size=0), "batch_size: 0"),
    "batch larger than the set": (dict(batch_size=19), "batch_size: 19 .* 18 clips"),
    "ranks take more than the set": (dict(batch_size=10, rank=1, world_size=2), "batch_size: 10 on 2 ranks"),
    "negative seed": (dict(seed=-1), "seed: -1"),
    "no window": (dict(window=0), "window: 0"),
    "rank out of range": (dict(rank=2, world_size=2), "rank: 2"),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardedClips(folder, **{"batch_size": 1, "seed": 0, **arguments})


def test_bad_positions(folder):
    for position in (-1, 1.5, None):
        with pytest.raises(ValueError, match="position"):
            ShardedClips(folder, 1, 0).load_state_dict({"position": position})


def test_folders_that_hold_no_set(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest.jsonl; make a set"):
        ShardedClips(tmp_path, 1, 0)
    ShardWriter(tmp_path, HEADER, 1).flush()
    with pytest.raises(ValueError, match="no clips in this set"):
        ShardedClips(tmp_path, 1, 0)


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


@pytest.mark.parametrize("shard", ["shard-00001.safetensors", "shard-00004.safetensors"])
def test_missing_and_cut_shards(damaged, shard):
    path = damaged / shard
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{shard}: not a whole safetensors file"):
        ShardedClips(damaged, 1, 0)
    path.unlink()
    with pytest.raises(ValueError, match=f"{shard}: this shard of the set is missing"):
        ShardedClips(damaged, 1, 0)


def test_clips_of_different_shapes(tmp_path):
    writer = ShardWriter(tmp_path, HEADER, 1)
    writer.add("a", 0.0, "a", clip(0))
    writer.add("b", 0.0, "b", clip(1, (16, 3, 2, 4)))
    writer.flush()
    with pytest.raises(ValueError, match=r"clip 00000001 of b has latents \(16, 3, 2, 4\)"):
        ShardedClips(tmp_path, 1, 0)


def test_a_clip_that_its_shard_does_not_hold(damaged):
    path = damaged / MANIFEST
    path.write_text(path.read_text().replace('"key": "00000000"', '"key": "00000099"'))
    with pytest.raises(ValueError, match="00000099.text is missing"):
        ShardedClips(damaged, 1, 0)


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
