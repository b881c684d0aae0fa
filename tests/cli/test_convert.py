"""`context-forcing convert`: published files in, one of ours out; and what generate does with them."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from context_forcing.model.checkpoints import containers
from context_forcing.model.checkpoints.student import StudentSource

STORY = {"size": [48, 32], "seed": 4, "segments": [{"prompt": "A meadow by day.", "seconds": 0.75}]}
AS_DEMO = ("--set", "base=demo size=48,32", "--set", "steps=1000,500")


@pytest.fixture
def published(make_net, tmp_path):
    net = make_net(dim=128, ffn_dim=64, num_heads=1, text_dim=4096, text_len=512)
    tree = {name: {f"model.{key}": (value + extra) for key, value in net.state_dict().items()}
            for name, extra in (("generator_ema", 0), ("generator", 1e-3))}  # fmt: skip
    torch.save(tree, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_convert_and_look(run, published, tmp_path):
    out = tmp_path / "student.safetensors"
    code, err = run("convert", published, "-o", out, "--card", "longlive", "--dtype", "bf16", *AS_DEMO)
    assert code == 0 and "student.safetensors: longlive" in run.out and "ranks in the memory" in err
    card = StudentSource(out).open().card
    assert (card.name, card.base, card.steps, card.memory.window) == ("longlive", "demo", (1000.0, 500.0), 12)
    code, _ = run("convert", "--inspect", out)
    assert code == 0 and "bfloat16" in run.out and "69 of 69" in run.out and "the card in its metadata" in run.out
    code, err = run("convert", published, "-o", out)
    assert code == 2 and "exists; give another name" in err and StudentSource(out).open().card == card


def test_looking_at_what_cannot_be_used(run, tmp_path):
    save_file({"decoder.conv1.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    code, _ = run("convert", "--inspect", tmp_path / "vae.safetensors")
    assert code == 2 and "a VAE" in run.out and "refused" in run.out
    assert run("convert", tmp_path / "vae.safetensors")[0] == 2


def test_generate_reads_a_published_file_as_its_converted_one(run, published, tmp_path):
    """The same latents to the bit; the other set of weights makes others."""
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    out = tmp_path / "student.safetensors"
    assert run("convert", published, "-o", out, *AS_DEMO)[0] == 0
    made = {}
    for name, student, options in (
        ("converted", out, ()), ("published", published, AS_DEMO),
        ("generator", published, (*AS_DEMO, "--weights", "generator")),
    ):  # fmt: skip
        memory = tmp_path / f"{name}.memory"
        code, err = run("generate", tmp_path / "story.yaml", "-o", tmp_path / f"{name}.mp4", "--student", student,
                           "--memory-out", memory, *options)  # fmt: skip
        assert code == 0, err
        made[name] = memory.read_bytes()
    assert made["converted"] == made["published"] != made["generator"]


def test_generate_opens_each_file_once(run, published, tmp_path, monkeypatch):
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    loras = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path in loras:
        save_file({"head.head.lora_A.weight": torch.ones(2, 128), "head.head.lora_B.weight": torch.ones(64, 2)}, path)
    opened, read = [], containers._read_file
    monkeypatch.setattr(containers, "_read_file", lambda path: opened.append(path) or read(path))
    options = [part for path in loras for part in ("--lora", f"{path}:0.1")]
    code, err = run(
        "generate", tmp_path / "story.yaml", "-o", tmp_path / "film.mp4", "--student", published, *AS_DEMO, *options
    )
    assert code == 0, err
    assert opened == [published, *loras]
