"""A full disk, a killed ffmpeg, a second run at once, a damaged journal: no film is lost, and none is another."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from context_forcing import cli
from context_forcing.train.data.manifest import read_manifest
from context_forcing.video.journal import Journal

from ..train.videos import film, world_frames

STORY = {
    "size": [48, 32], "seed": 4,
    "segments": [
        {"prompt": "a meadow by day, the camera pans right", "seconds": 3},
        {"prompt": "a desert", "seconds": 3},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(student, tmp_path_factory):
    """A folder with the film as it should be, and the journal of a run that was stopped right after its last chunk."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "story.yaml").write_text(yaml.safe_dump(STORY))
    arguments = ["generate", folder / "story.yaml", "-o", folder / "film.mp4", "--student", student]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["context-forcing", *map(str, arguments)])
        patch.setattr(Journal, "close", lambda self: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return folder


@pytest.fixture
def generate(run, student, finished, tmp_path):
    """(options) -> exit code, the message in one line; of film.mp4."""
    shutil.copy(finished / "story.yaml", tmp_path)

    def generate(*options):
        code, message = run(
            "generate", tmp_path / "story.yaml", "-o", tmp_path / "film.mp4", "--student", student, *options
        )
        return code, " ".join(message.split())

    return generate


@pytest.fixture
def whole(finished):
    return (finished / "film.mp4").read_bytes()


@pytest.fixture
def stopped(finished, tmp_path):
    """The journal, in the folder of this test."""
    return Path(shutil.copytree(finished / "film.mp4.journal", tmp_path / "film.mp4.journal"))


@pytest.mark.parametrize(
    "does, words",
    [
        (("trap '' XFSZ; ulimit -f 4", ":"), "File too large (exit status"),
        ((":", "kill -9 $$"), "ended by signal 9"),
        ((":", 'head -c 3000 "$file" >"$file.x"; mv "$file.x" "$file"'), "does not decode"),
    ],
    ids=["full disk", "killed", "half a file"],
)
def test_a_film_that_was_not_written_goes_on(generate, whole, ffmpeg_that, monkeypatch, tmp_path, does, words):
    ffmpeg_that(*does)
    code, message = generate()
    assert code == 2 and words in message and "film.mp4" in message and "--resume continues it" in message
    assert "Traceback" not in message and "frames, " not in message.partition("error:")[2]
    assert {path.name for path in tmp_path.iterdir()} == {"story.yaml", "film.mp4.journal"}
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    assert generate("--resume")[0] == 0
    assert (tmp_path / "film.mp4").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"story.yaml", "film.mp4"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def swap(path):
    other = path.with_name("chunk-000004.safetensors")
    data = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(data)


def another(change):
    return lambda path: save_file({"latents": change(load_file(path)["latents"])}, path)


def more(path):
    last = max(path.parent.glob("chunk-*"))
    number = int(last.stem.partition("-")[2])
    last.with_name(f"chunk-{number + 1:06d}.safetensors").write_bytes(last.read_bytes())


HARMS = {
    "a flipped bit": (flip, "chunk-000002.safetensors: does not have the digest"),
    "swapped": (swap, "chunk-000002.safetensors: does not have the digest"),
    "NaN": (another(lambda x: x * float("nan")), "chunk-000002.safetensors: holds values that are not finite"),
    "another dtype": (another(lambda x: x.half()), "chunk-000002.safetensors: holds torch.float16"),
    "another shape": (another(lambda x: x[..., :2].clone()), "chunk-000002.safetensors: holds torch.float32 of shape"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:100]), "chunk-000002.safetensors: not a whole chunk"),
    "one too many": (more, "chunk-000008.safetensors: the video has 8 chunks"),
}  # fmt: skip


@pytest.mark.parametrize("harm, words", HARMS.values(), ids=HARMS)
def test_a_damaged_journal_gives_the_same_film(generate, whole, stopped, tmp_path, caplog, harm, words):
    harm(stopped / "chunk-000002.safetensors")
    code, message = generate("--resume")
    assert code == 0, message
    assert (tmp_path / "film.mp4").read_bytes() == whole
    assert sum(words in record.message for record in caplog.records) == 1


def test_a_journal_that_is_whole_is_taken_as_it_is(generate, whole, stopped, tmp_path, caplog, monkeypatch):
    made = []
    monkeypatch.setattr(Journal, "keep", lambda self, number, latents: made.append(number >= len(self.finished)))
    assert generate("--resume")[0] == 0
    assert (tmp_path / "film.mp4").read_bytes() == whole and made == [False] * 8
    assert not [record for record in caplog.records if "chunk" in record.message]


def state(folder):
    """Of every file but what ffmpeg writes, which goes on by itself."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {
        path: (stat.st_ino, None if ".part" in path.name else (stat.st_mtime_ns, stat.st_size))
        for path, stat in stats.items()
    }


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a process is stopped by a signal")
def test_one_run_at_a_time(generate, whole, stopped, student, tmp_path):
    """The second is refused at once, whatever it asks for, and touches nothing; the first comes out whole."""
    command = [sys.executable, "-c", "from context_forcing.cli import main; main()", "generate", "story.yaml"]
    command += ["-o", "film.mp4", "--student", str(student), "--resume"]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / ".film.context_forcing.part.mp4").exists():
            assert first.poll() is None
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)
        before = state(tmp_path)
        for options in ((), ("--resume",)):
            code, message = generate(*options)
            assert (
                code == 2
                and "film.mp4 is being written by another process" in message
                and f"pid {first.pid} on " in message
            )
        assert state(tmp_path) == before
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    finally:
        first.kill()
    assert (tmp_path / "film.mp4").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"story.yaml", "film.mp4"}


def test_a_killed_reader_is_no_bad_video(run, tmp_path, monkeypatch):
    """`encode` ends with one line; the same command then has every clip, and none is skipped."""
    videos = tmp_path / "videos"
    film(videos / "a.mp4", world_frames(0, 30))
    reader = tmp_path / "ffmpeg"
    reader.write_text("#!/bin/sh\nkill -9 $$\n")
    reader.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(reader))
        code, err = run("encode", videos, "-o", tmp_path / "set", "--frames", 4)
    assert code == 2 and "a.mp4: ffmpeg was ended by signal 9; run it again" in " ".join(err.split()), err
    assert run("encode", videos, "-o", tmp_path / "set", "--frames", 4)[0] == 0
    manifest = read_manifest(tmp_path / "set")
    assert manifest.finished == {"a.mp4": 2} and not manifest.skipped
