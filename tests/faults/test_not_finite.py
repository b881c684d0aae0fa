"""A student, a memory or a start that is not finite: one line, exit code 2, no video, and what was finished stays."""

import dataclasses
import math
import random

import pytest
import torch
import yaml
from safetensors.torch import load_file

from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.codecs.demo_vae import DemoCodec
from context_forcing.model.sampler import seeded_noise

from .drill import SEED, SOAK

NAN = float("nan")


@pytest.fixture
def generate(run, tmp_path):
    """(seconds, options) -> exit code, stderr."""

    def generate(seconds, *options):
        segment = {"prompt": "a meadow by day", "seconds": seconds}
        (tmp_path / "story.yaml").write_text(yaml.safe_dump({"size": [48, 32], "seed": 4, "segments": [segment]}))
        return run(
            "generate", tmp_path / "story.yaml", "-o", tmp_path / "film.mp4", "--memory-out", tmp_path / "memory.st",
            "--student", tmp_path / "student.safetensors", "--device", "cpu", *options,
        )  # fmt: skip

    return generate


@pytest.fixture
def save(save_tiny_student, tmp_path):
    """(name of a weight to break) -> student.safetensors."""

    def save(broken=None):
        def edit(net):
            if broken:
                net.get_parameter(broken).data.flatten()[0] = NAN

        save_tiny_student(tmp_path / "student.safetensors", edit=edit, num_layers=3)

    return save


def test_a_student(generate, save, tmp_path):
    save("blocks.2.ffn.0.weight")
    code, err = generate(1.5)
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and "Traceback" not in err and len(errors) == 1
    assert "error: chunk 1 (latent frames 0-2), step 1 (noise level 1): NaN or infinity in" in errors[0]
    assert "the weight blocks.2.ffn.0.weight" in errors[0]
    assert not (tmp_path / "film.mp4").exists() and not (tmp_path / "memory.st").exists()


def test_the_journal_and_the_memory_keep_what_was_finished(generate, save, tmp_path, monkeypatch):
    """Noise that is NaN from latent frame 6 on, as a device at fault would make it."""
    save()
    broken = lambda seed, size: lambda frame, step: seeded_noise(seed, size)(frame, step) * (NAN if frame >= 6 else 1)
    monkeypatch.setattr("context_forcing.model.segment.seeded_noise", broken)
    code, err = generate(3)
    assert code == 2 and "error: chunk 3 (latent frames 6-8), step 1 " in err and "--resume continues it" in err
    journal = tmp_path / "film.mp4.journal"
    assert sorted(path.name for path in journal.glob("chunk-*")) == [f"chunk-00000{n}.safetensors" for n in (0, 1)]
    assert (
        load_file(tmp_path / "memory.st")["film"].shape[2] == 6 and load_memory(tmp_path / "memory.st").num_frames == 6
    )
    assert not (tmp_path / "film.mp4").exists()
    monkeypatch.undo()
    assert generate(3, "--resume")[0] == 0 and not journal.exists()


def test_a_memory(generate, save, tmp_path):
    save()
    assert generate(0.75)[0] == 0
    memory = load_memory(tmp_path / "memory.st")
    held = dataclasses.replace(memory.store.frames[1], values=torch.full_like(memory.store.frames[1].values, NAN))
    save_memory(
        tmp_path / "bad.st",
        dataclasses.replace(memory, store=dataclasses.replace(memory.store, frames=memory.store.frames | {1: held})),
    )
    (tmp_path / "film.mp4").unlink()
    code, err = generate(0.75, "--memory-in", tmp_path / "bad.st")
    assert code == 2 and "bad.st: NaN or infinity in values.1" in err and not (tmp_path / "film.mp4").exists()


def test_any_weight(generate, save, save_tiny_student, tmp_path):
    """The chunk, the step and the layer are named, whichever weight is broken."""
    names = []
    save_tiny_student(tmp_path / "names.st", edit=lambda net: names.extend(dict(net.named_parameters())), num_layers=3)
    for name in names if SOAK else random.Random(SEED).sample(names, 3):
        save(name)
        code, err = generate(0.75)
        line = err.strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: chunk 1 (latent frames 0-2), step 1 ") and len(line) <= 300, line
        assert "layer" in line and f"the weight {name}" in line, line
        assert not (tmp_path / "film.mp4").exists() and not (tmp_path / "memory.st").exists()


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_vae(generate, save, tmp_path, monkeypatch, value):
    """Finite latents whose pixels are not: they would be black frames."""
    save()
    decode = DemoCodec.decode_stream

    def broken(self, chunks):
        for number, pixels in enumerate(decode(self, chunks)):
            yield pixels * (value if number == 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(DemoCodec, "decode_stream", broken)
        code, err = generate(3)
    line = err.strip().splitlines()[-1]
    assert code == 2 and "NaN or infinity in pixel frames 9-20 from the VAE" in line and len(line) <= 300, err
    assert not (tmp_path / "film.mp4").exists() and (tmp_path / "film.mp4.journal").is_dir()
    assert generate(3, "--resume")[0] == 0
