"""Every file that is read back, with a flipped byte or cut short: one line, or exactly what was written."""

import json
import random
import shutil

import pytest
import torch

from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.train.checkpoints import Checkpoints, newest_checkpoint
from context_forcing.train.data.manifest import Header
from context_forcing.train.data.shards import EncodedSet, ShardWriter
from context_forcing.train.evaluation.evaluate import Results
from context_forcing.train.presets import load_config
from context_forcing.train.stages.codec import VaeStage
from context_forcing.video.journal import Journal

from ..train.helpers import ALONE
from .drill import MAX_MESSAGE, SEED, SOAK

SHAPE = (1, 16, 3, 4, 6)
WITHOUT_DIGEST = ("student", "results")
"""A changed figure or weight is taken as it is; the fingerprint of a student changes with it."""


def make_journal(folder, tools):
    journal = Journal(folder / "j", {"a": 1}, False, num_chunks=4, shape=SHAPE)
    for number in range(4):
        journal.keep(number, torch.full(SHAPE, float(number)))


def read_journal(folder, tools):
    """The chunks before the first that is damaged are kept."""
    chunks = Journal(folder / "j", {"a": 1}, True, num_chunks=4, shape=SHAPE).finished
    return [*chunks, *(torch.full(SHAPE, float(number)) for number in range(len(chunks), 4))]


def make_memory(folder, tools):
    save_memory(folder / "m", tools["memory"])


def read_memory(folder, tools):
    return load_memory(folder / "m").tensors()


def make_set(folder, tools):
    header = Header(source="/v", model="demo", vae="v", text_encoder="t", dtype="fp16", fps=16, size=(16, 16), frames=3)
    writer = ShardWriter(folder / "set", header, 2000)
    for number in range(5):
        clip = {"latents": torch.full((16, 3, 2, 2), float(number)), "text": torch.full((2, 8), float(number))}
        writer.add("a", float(number), "caption", {name: tensor.half() for name, tensor in clip.items()})
    writer.finish("a", 5)
    writer.flush()


def read_set(folder, tools):
    encoded = EncodedSet(folder / "set", 0)
    return [tensor for number in range(5) for tensor in encoded.sample(number)]


def make_checkpoint(folder, tools):
    Checkpoints(folder, tools["stage"], "vae").save(3, 1.0, "r")


def read_checkpoint(folder, tools):
    run = Checkpoints(folder, tools["stage"], "vae").load()
    assert run["step"] == 3
    return [*tools["stage"].trained["codec"].weights().values()]


def make_student(folder, tools):
    shutil.copy(tools["student"], folder / "s.safetensors")


def read_student(folder, tools):
    return [*StudentSource(folder / "s.safetensors").open().load().state_dict().values()]


def make_results(folder, tools):
    Results(folder, {"format": 5}).add([])


def read_results(folder, tools):
    return [torch.tensor(len(Results(folder, {"format": 5}).records))]


KINDS = {
    "journal": (make_journal, read_journal),
    "memory": (make_memory, read_memory),
    "encoded set": (make_set, read_set),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "student": (make_student, read_student),
    "results": (make_results, read_results),
}


@pytest.fixture(scope="module")
def tools(student, net, make_sampler, empty_memory):
    memory = empty_memory(sink=3, slow=4, fast=6)
    sampler = make_sampler(net)
    for _ in range(3):
        x0 = torch.randn(1, *memory.latent_size[:1], 3, *memory.latent_size[1:])
        memory = sampler.commit(memory, x0)
    return {"student": student, "memory": memory, "stage": VaeStage(load_config("vae", "smoke"), ALONE)}


def harm(path, rng):
    """Flip a bit, or cut the file."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.7:
        # Half of the flips are in the header.
        place = rng.randrange(min(len(data), 2000)) if rng.random() < 0.5 else rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, tools, tmp_path):
    make, read = KINDS[kind]
    rng, told = random.Random(f"{SEED} damage {kind}"), 0
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole", tools)
    expected = [tensor.clone() for tensor in read(tmp_path / "whole", tools)]
    for number in range(SOAK * 20 or 12):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        harm(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())), rng)
        try:
            found = read(folder, tools)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) <= MAX_MESSAGE + len(str(folder)), message
            told += 1
        else:
            same = len(found) == len(expected) and all(map(torch.equal, found, expected))
            assert same or kind in WITHOUT_DIGEST, number
        shutil.rmtree(folder)
    assert told


def test_a_damaged_checkpoint_names_the_way_out(tools, tmp_path):
    for step in (3, 4):
        Checkpoints(tmp_path, tools["stage"], "vae").save(step, 1.0, "r")
    path = newest_checkpoint(tmp_path)
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {"step": 5}))
    with pytest.raises(ValueError, match="step-00000004: not a whole checkpoint .*delete it, the one before it"):
        Checkpoints(tmp_path, tools["stage"], "vae").load()
    shutil.rmtree(path)
    assert Checkpoints(tmp_path, tools["stage"], "vae").load()["step"] == 3
