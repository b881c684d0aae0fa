import shutil

import pytest
from safetensors.torch import save_file

from context_forcing.model.config import PRESETS

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
