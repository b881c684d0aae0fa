"""The journal: what is resumed is what was written, in its place; all else is made again, and said."""

import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from context_forcing.memory import empty_memory
from context_forcing.memory.config import MEMORY_PRESETS
from context_forcing.memory.snapshot import fingerprint_memory
from context_forcing.video.journal import HEADER, Journal, remove_journal

SHAPE = (1, 16, 3, 2, 2)
CHUNKS = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)) for number in range(4)]


def journal(folder, resume=True, inputs=None, num_chunks=4):
    return Journal(folder / "j", inputs or {"student": "me"}, resume, num_chunks=num_chunks, shape=SHAPE)


def chunk(folder, number):
    return folder / "j" / f"chunk-{number:06d}.safetensors"


@pytest.fixture
def written(tmp_path):
    """A folder with a journal of four chunks."""
    begun = journal(tmp_path, resume=False)
    for number, latents in enumerate(CHUNKS):
        begun.keep(number, latents)
    return tmp_path


def without_digest(folder):
    """Write a journal again as the revision before wrote it."""
    header = folder / "j" / HEADER
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 1}))
    for path in (folder / "j").glob("chunk-*.safetensors"):
        save_file(load_file(path), path)


def test_a_journal_is_whole_up_to_where_it_ends(tmp_path):
    begun = journal(tmp_path, resume=False)
    for number, latents in enumerate(CHUNKS[:3]):
        begun.keep(number, latents)
    chunk(tmp_path, 3).with_suffix(".part").write_bytes(b"half of it")
    again = journal(tmp_path)
    assert len(again.finished) == 3 and all(torch.equal(a, b) for a, b in zip(again.finished, CHUNKS))
    again.keep(0, CHUNKS[2])
    assert torch.equal(journal(tmp_path).finished[0], CHUNKS[0])
    (tmp_path / "j" / HEADER).write_text("[]")
    with pytest.raises(ValueError, match="journal.json: damaged"):
        journal(tmp_path)
    again.close()
    assert not (tmp_path / "j").exists()


def test_a_journal_begins_anew_where_nothing_is_lost(tmp_path):
    """A run that ended before its first chunk is in nobody's way; what is not a journal's is not touched."""
    folder, you = tmp_path / "j", {"student": "you"}
    journal(tmp_path, resume=False)
    begun = journal(tmp_path, resume=False, inputs=you)
    assert not begun.has_chunks
    begun.keep(0, CHUNKS[0])
    assert begun.has_chunks
    with pytest.raises(ValueError, match="holds an unfinished video"):
        journal(tmp_path, resume=False, inputs=you)
    begun.close()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a journal"):
        journal(tmp_path, resume=False)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    folder.rmdir()
    folder.write_text("mine")
    with pytest.raises(ValueError, match="is not a journal"):
        journal(tmp_path, resume=False)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def swap(path):
    other = chunk(path.parents[1], 2)
    data = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(data)


def another(change):
    return lambda path: save_file({"latents": change(load(path.read_bytes())["latents"])}, path)


def not_finite(latents):
    latents[0, 0, 0, 0, 0] = float("nan")
    return latents


SEEN_BY_SHAPE = {
    "no safetensors": (lambda path: path.write_bytes(b"damaged"), "not a whole chunk"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole chunk"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "not a whole chunk"),
    "no latents": (lambda path: save_file({"film": CHUNKS[1]}, path), "not a whole chunk"),
    "another dtype": (another(lambda latents: latents.bfloat16()), "holds torch.bfloat16"),
    "another shape": (another(lambda latents: latents[:, :, :2].contiguous()), "of shape (1, 16, 2, 2, 2)"),
    "NaN": (another(not_finite), "not finite"),
    "infinite": (another(lambda latents: latents / 0), "not finite"),
    "gone": (lambda path: path.unlink(), "chunk-000001.safetensors is missing"),
}
SEEN_BY_DIGEST = {
    "a flipped bit": (flip, "does not have the digest"),
    "swapped": (swap, "does not have the digest"),
    "doubled": (lambda path: path.write_bytes(chunk(path.parents[1], 0).read_bytes()), "does not have the digest"),
    "no digest": (another(lambda latents: latents), "has no digest"),
}


@pytest.mark.parametrize("has_digests", [True, False], ids=["format 2", "format 1"])
@pytest.mark.parametrize("harm, words", SEEN_BY_SHAPE.values(), ids=SEEN_BY_SHAPE)
def test_a_bad_chunk_and_what_follows_is_made_again(written, caplog, harm, words, has_digests):
    if not has_digests:
        without_digest(written)
    harm(chunk(written, 1))
    again = journal(written)
    (record,) = caplog.records
    assert words in record.message and record.message.endswith("it and the later chunks are generated again")
    assert len(again.finished) == 1 and torch.equal(again.finished[0], CHUNKS[0])
    assert [path.name for path in (written / "j").glob("chunk*")] == [chunk(written, 0).name]
    for number, latents in enumerate(CHUNKS):
        again.keep(number, latents)
    caplog.clear()
    assert all(torch.equal(a, b) for a, b in zip(journal(written).finished, CHUNKS, strict=True)) and not caplog.records


@pytest.mark.parametrize("harm, words", SEEN_BY_DIGEST.values(), ids=SEEN_BY_DIGEST)
def test_a_chunk_that_only_its_digest_tells(written, caplog, harm, words):
    harm(chunk(written, 1))
    assert len(journal(written).finished) == 1
    (record,) = caplog.records
    assert words in record.message and chunk(written, 1).name in record.message


def test_a_chunk_of_another_video(written, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("other")
    other = journal(folder, resume=False, inputs={"student": "you"})
    other.keep(0, CHUNKS[0])
    chunk(written, 0).write_bytes(chunk(folder, 0).read_bytes())
    assert not journal(written).finished and "does not have the digest" in caplog.text


def test_more_chunks_than_the_story_has(written, caplog):
    again = journal(written, num_chunks=3)
    assert len(again.finished) == 3 and not chunk(written, 3).exists()
    (record,) = caplog.records
    assert "chunk-000003.safetensors: the video has 3 chunks; it and the later chunks are deleted" in record.message


def test_a_journal_of_the_revision_before_goes_on(written, caplog):
    """It says nothing of it; chunks that are made now have their digest."""
    without_digest(written)
    chunk(written, 3).unlink()
    again = journal(written)
    assert len(again.finished) == 3
    again.keep(3, CHUNKS[3])
    assert all(torch.equal(a, b) for a, b in zip(journal(written).finished, CHUNKS, strict=True)) and not caplog.records
    flip(chunk(written, 3))
    assert len(journal(written).finished) == 3 and "does not have the digest" in caplog.text


def test_inputs_that_only_one_of_both_has(written):
    """A journal with options that are not the defaults is not resumed with the defaults, and the other way round."""
    header = written / "j" / HEADER
    with pytest.raises(ValueError, match="another commit attends;"):
        journal(written, inputs={"student": "me", "commit attends": "no sink"})
    header.write_text(json.dumps({**json.loads(header.read_text()), "commit attends": "no sink"}))
    with pytest.raises(ValueError, match="another commit attends;"):
        journal(written)


def test_a_format_to_come_is_refused(written):
    header = written / "j" / HEADER
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 3}))
    with pytest.raises(ValueError, match="another format"):
        journal(written)


def test_the_fingerprint_of_a_memory_never_changes():
    """Journals of every revision hold it; these are from the first."""
    fingerprints = {"slow-fast": "018d92baa3a02e35", "released": "6e052d05a711748f"}
    for name, expected in fingerprints.items():
        assert fingerprint_memory(empty_memory(MEMORY_PRESETS[name], (16, 4, 6))) == expected


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path):
    begun = journal(tmp_path, resume=False)
    chunk(tmp_path, 0).mkdir()
    with pytest.raises(ValueError, match="chunk-000000.safetensors: cannot be written"):
        begun.keep(0, CHUNKS[0])
    assert {path.name for path in (tmp_path / "j").iterdir()} == {HEADER, chunk(tmp_path, 0).name}
    with pytest.raises(ValueError, match="cannot be written"):
        journal(tmp_path / "missing", resume=False)


@pytest.mark.parametrize("left", [".{}.context_forcing.part", ".{}.context_forcing.lock", "{}.part", ".{}.lock"])
def test_a_journal_with_what_a_killed_process_left_is_deleted(written, left):
    """Also by an earlier release."""
    for name in (HEADER, chunk(written, 1).name):
        (written / "j" / left.format(name)).touch()
    remove_journal(written / "j")
    assert not (written / "j").exists()


def test_a_folder_that_is_no_journal_stays(written):
    (written / "j" / ".mine.context_forcing.part").touch()
    with pytest.raises(ValueError, match="is not a journal"):
        remove_journal(written / "j")
    assert len(list((written / "j").iterdir())) == 6
