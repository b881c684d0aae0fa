import shutil

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.memory import MemoryConfig
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import PRESETS, StudentCard
from context_forcing.video.pipeline import Pipeline

from .helpers import TINY
from .videos import LENGTHS, film, world_frames


@pytest.fixture
def tiny(monkeypatch):
    """The demo preset, much smaller."""
    monkeypatch.setitem(PRESETS, "demo", TINY)


@pytest.fixture(scope="session")
def files(make_net, tmp_path_factory):
    """Two tiny networks without zero weights, as plain files in Wan's layout: student and teacher."""
    folder, text = tmp_path_factory.mktemp("networks"), dict(text_dim=4096, text_len=512)
    paths = []
    for seed, name in enumerate(("student", "teacher")):
        net = make_net(seed, dim=32, ffn_dim=64, num_heads=1, num_layers=2, **text)
        paths.append(folder / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, paths[-1])
    return [f"student={paths[0]}", f"teacher={paths[1]}"]


@pytest.fixture(scope="session")
def students(make_net, tmp_path_factory, save_student):
    """Two tiny random students of the demo world, in folders of their own."""
    paths = []
    for seed in range(2):
        path = tmp_path_factory.mktemp(f"run{seed}") / "student.safetensors"
        memory = MemoryConfig(sink=3, slow=4, fast=6, slow_similarity_threshold=0.999)
        card = StudentCard(base="demo", steps=(1000.0, 500.0), shift=3.0, memory=memory, size=(128, 64))
        save_student(path, make_net(seed, text_dim=4096, text_len=512), card)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def pipeline(students):
    return Pipeline.load(StudentSource(students[0]).open(), torch.device("cpu"), torch.float32)


@pytest.fixture
def trained_net(net):
    net.requires_grad_(True)
    yield net
    net.zero_grad()
    net.requires_grad_(False)


@pytest.fixture(scope="session")
def whole_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, length) in enumerate(LENGTHS.items()):
        film(folder / name, world_frames(seed, length))
    return folder


@pytest.fixture
def videos(whole_videos, tmp_path):
    """Three good videos in a folder of one's own."""
    return shutil.copytree(whole_videos, tmp_path / "videos")
