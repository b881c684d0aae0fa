"""The command in this process, a tiny student for it, and what is read from its results."""

import sys

import imageio_ffmpeg
import pytest

from context_forcing import cli
from context_forcing.memory import MemoryConfig
from context_forcing.model.config import StudentCard


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> exit code, stderr; stdout is run.out."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["context-forcing", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        run.out, err = capsys.readouterr()
        return code, err

    return run


@pytest.fixture(scope="session")
def save_tiny_student(make_net, save_student):
    """(path, base, **sizes of the network) -> a tiny random student, to be changed by `edit` before it is written."""

    def save(path, base="demo", edit=lambda net: None, **sizes):
        net = make_net(text_dim=4096, text_len=512, **sizes)
        edit(net)
        memory = MemoryConfig(sink=3, slow=4, fast=6, slow_similarity_threshold=0.999)
        card = StudentCard(base=base, steps=(1000.0, 500.0), shift=3.0, memory=memory, size=(48, 32))
        save_student(path, net, card)
        return path

    return save


@pytest.fixture(scope="session")
def student(save_tiny_student, tmp_path_factory):
    """A tiny random student that the demo's text encoder and codec fit."""
    return save_tiny_student(tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.fixture(scope="session")
def frames_of():
    """(path of a video) -> (width, height), raw bytes per frame."""

    def frames_of(path):
        reader = imageio_ffmpeg.read_frames(str(path))
        size = next(reader)["source_size"]
        return size, [bytes(frame) for frame in reader]

    return frames_of


@pytest.fixture(scope="session")
def refused():
    """((exit code, stderr), words) -> asserts that the command was refused with one line that has the words."""

    def refused(result, *words):
        code, err = result
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        assert all(str(word) in err for word in words), err

    return refused


@pytest.fixture(scope="session")
def succeeded():
    """(exit code, stderr) -> stderr; asserts that the command succeeded."""

    def succeeded(result):
        code, err = result
        assert code == 0, err
        return err

    return succeeded
