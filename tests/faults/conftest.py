"""Commands that run in processes of their own, and what each makes that nothing disturbs."""

import sys

import pytest

from context_forcing.memory import MemoryConfig
from context_forcing.model.config import StudentCard

from ..cli.conftest import refused, run, save_tiny_student, student, succeeded  # noqa: F401
from ..train.videos import film, world_frames
from .drill import COMMANDS, JOBS, SHORT, SOAK, STORY, Place, Reference, Zygote, write_yaml


@pytest.fixture(scope="session")
def zygote():
    if sys.platform == "win32":
        pytest.skip("processes are forked and ended by signals")
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, make_net, save_student, student, save_tiny_student):  # noqa: F811
    """What commands read, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    memory = MemoryConfig(sink=3, slow=4, fast=6, slow_similarity_threshold=0.999)
    card = StudentCard(base="demo", steps=(1000.0, 500.0), shift=3.0, memory=memory, size=(128, 64))
    save_student(folder / "world.safetensors", make_net(0, text_dim=4096, text_len=512), card)
    for number, length in enumerate((30, 41, 13)):
        film(folder / f"videos/{number}.mp4", world_frames(number, length))
    return {
        "story": write_yaml(folder / "story.yaml", STORY),
        "jobs": write_yaml(folder / "jobs.yaml", JOBS),
        "student": student,
        "world student": folder / "world.safetensors",
        "big student": save_tiny_student(folder / "big.safetensors", num_layers=6, dim=256, ffn_dim=1024),
        "videos": folder / "videos",
    }


@pytest.fixture(scope="session")
def references(zygote, inputs, tmp_path_factory):
    """(name of a command) -> Reference."""
    made = {}

    def reference(name: str) -> Reference:
        if name not in made:
            place = Place.of(zygote, name, tmp_path_factory.mktemp(name) / "whole", inputs)
            made[name] = Reference.of(place)
        return made[name]

    return reference


@pytest.fixture
def place(zygote, inputs, tmp_path):
    """(name of a command, name of the folder) -> Place."""
    return lambda name, folder="here": Place.of(zygote, name, tmp_path / folder, inputs)


@pytest.fixture(params=COMMANDS if SOAK else SHORT)
def name(request):
    """Every command that writes; in the short form one of each kind."""
    return request.param
