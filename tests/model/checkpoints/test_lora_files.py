"""LoRA files of every spelling add the same to the same weights, or are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.model.checkpoints.lora import parse_lora
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import StudentCard

from .published import SIZES, prefixed

RANK, ALPHA, STRENGTH = 2, 6.0, 0.5
WAN = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "head.head")
DIFFUSERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "proj_out")


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(**SIZES)


@pytest.fixture
def student(net, tmp_path, save_student):
    save_student(tmp_path / "student.safetensors", net, StudentCard(base="demo"))
    return tmp_path / "student.safetensors"


@pytest.fixture
def pairs(net):
    """stem -> (up, down)."""
    generator, state = torch.Generator().manual_seed(3), net.state_dict()
    draw = lambda *shape: torch.randn(shape, generator=generator)
    shapes = {stem: state[f"{stem}.weight"].shape for stem in WAN}
    return {stem: (draw(out, RANK), draw(RANK, into)) for stem, (out, into) in shapes.items()}


def spelt(pairs, up, down, prefix="", stems=WAN, alpha=None, join=lambda stem: stem):
    out = {}
    for stem, name in zip(WAN, stems):
        out[f"{prefix}{join(name)}.{up}"], out[f"{prefix}{join(name)}.{down}"] = pairs[stem]
        if alpha is not None:
            out[f"{prefix}{join(name)}.alpha"] = torch.tensor(alpha)
    return out


PEFT, KOHYA = ("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")
UNDERSCORES = lambda stem: stem.replace(".", "_")
SPELLINGS = {
    "peft": (lambda p: spelt(p, *PEFT, prefix="base_model.model."), 1),
    "peft with its adapter's name": (
        lambda p: spelt(p, "lora_B.default.weight", "lora_A.default.weight", prefix="base_model.model.model."), 1),
    "LongLive": (lambda p: {"generator_lora": spelt(p, *PEFT, prefix="base_model.model."), "step": 3,
                            "critic_lora": spelt(p, *PEFT)}, 1),
    "ComfyUI": (lambda p: spelt(p, *PEFT, prefix="diffusion_model."), 1),
    "ComfyUI with alpha": (lambda p: spelt(p, *KOHYA, prefix="diffusion_model.", alpha=ALPHA), ALPHA / RANK),
    "kohya": (lambda p: spelt(p, *KOHYA, prefix="lora_unet_", alpha=ALPHA, join=UNDERSCORES), ALPHA / RANK),
    "kohya, two underscores": (lambda p: spelt(p, *KOHYA, prefix="lora_unet__", join=UNDERSCORES), 1),
    "diffusers": (lambda p: spelt(p, *PEFT, prefix="transformer.", stems=DIFFUSERS), 1),
    "bare": (lambda p: spelt(p, "lora_B", "lora_A"), 1),
}  # fmt: skip


def write(path, tree):
    if any(isinstance(value, dict) for value in tree.values()):
        torch.save(tree, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    save_file(tree, path)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_adds_the_same(spelling, net, student, pairs, tmp_path):
    make, scale = SPELLINGS[spelling]
    path = write(tmp_path / "lora.safetensors", make(pairs))
    merged = StudentSource(student, loras=((path, STRENGTH),)).open().load()
    found = merged.state_dict()
    for name, weight in net.state_dict().items():
        up, down = pairs.get(name.removesuffix(".weight"), (None, None)) if name.endswith(".weight") else (None, None)
        expected = weight if up is None else weight + STRENGTH * scale * (up @ down)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        assert up is not None or torch.equal(found[name], weight)


def test_two_are_added_one_after_the_other(net, student, pairs, tmp_path):
    path = write(tmp_path / "lora.safetensors", spelt(pairs, *PEFT))
    merged = (
        StudentSource(
            student,
            loras=(
                (path, 1.0),
                (path, -1.0),
            ),
        )
        .open()
        .load()
    )
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_alpha_that_peft_keeps_beside_the_file(net, student, pairs, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(spelt(pairs, *PEFT, prefix="base_model.model."), folder / "adapter_model.safetensors")
    name, expected = "head.head.weight", net.head.head.weight + 3.0 * pairs["head.head"][0] @ pairs["head.head"][1]
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}}))
    for path in (folder, folder / "adapter_model.safetensors"):
        torch.testing.assert_close(StudentSource(student, loras=((path, 1.0),)).open().tensor(name), expected)
    (folder / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ValueError, match="merge it with peft first"):
        StudentSource(student, loras=((folder, 1.0),)).open()
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA})}
    path = tmp_path / "told.safetensors"
    save_file(spelt(pairs, *PEFT), path, told)
    torch.testing.assert_close(StudentSource(student, loras=((path, 1.0),)).open().tensor(name), expected)


def test_whole_differences(net, student, tmp_path):
    state = net.state_dict()
    whole = {"blocks.0.norm3.diff": torch.ones(16), "blocks.0.ffn.0.diff_b": torch.ones(32),
             "blocks.1.diff_m": torch.ones(1, 6, 16), "patch_embedding.diff": torch.ones(16, 16, 1, 2, 2)}  # fmt: skip
    path = write(tmp_path / "lora.safetensors", prefixed(whole, "diffusion_model."))
    merged = StudentSource(student, loras=((path, STRENGTH),)).open()
    changed = {"blocks.0.norm3.weight", "blocks.0.ffn.0.bias", "blocks.1.modulation", "patch_embedding.weight"}
    for name in state:
        torch.testing.assert_close(merged.tensor(name), state[name] + STRENGTH * (name in changed))


def test_our_own_adapters_read_back(net, student, tmp_path):
    pytest.importorskip("peft")
    from context_forcing.train.lora import LoraConfig, add_lora, merge_lora, save_lora

    config = LoraConfig(rank=3, alpha=5.0)
    own = add_lora(StudentSource(student).open().load(), config, seed=1)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    path, expected = tmp_path / "own_lora.safetensors", merge_lora(own.state_dict(), config)
    save_lora(path, own.state_dict(), config, {})
    merged = StudentSource(student, loras=((path, 1.0),)).open()
    assert len(merged.loras[0].pairs) == 20
    for name in net.state_dict():
        torch.testing.assert_close(merged.tensor(name), expected[name], rtol=1e-5, atol=1e-6)


BROKEN = {
    "another model": (lambda t: t | {"blocks.9.ffn.0.lora_A.weight": torch.zeros(2, 16),
                                     "blocks.9.ffn.0.lora_B.weight": torch.zeros(32, 2)}, "blocks.9.ffn.0.weight"),
    "image-to-video": (lambda t: t | {"blocks.0.cross_attn.k_img.diff": torch.zeros(3)}, "k_img"),
    "half a pair": (lambda t: {k: v for k, v in t.items() if k != "head.head.lora_B.weight"}, "head.weight has no up"),
    "alpha alone": (lambda t: t | {"blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "blocks.0.ffn.0.weight has no"),
    "another width": (lambda t: t | {"head.head.lora_A.weight": torch.zeros(2, 24)}, "another size"),
    "another rank": (lambda t: t | {"head.head.lora_A.weight": torch.zeros(3, 16)}, "not the matrices of a LoRA"),
    "rank 0": (lambda t: t | {"head.head.lora_A.weight": torch.zeros(0, 16),
                              "head.head.lora_B.weight": torch.zeros(64, 0)}, "have no rank"),
    "twice": (lambda t: t | {"head.head.lora_up.weight": torch.zeros(64, 2)}, "twice"),
    "dora": (lambda t: t | {"head.head.dora_scale": torch.zeros(64)}, "dora_scale"),
    "a student": (lambda t: {"head.head.weight": torch.zeros(2)}, "not a part of a LoRA"),
    "an alpha of many": (lambda t: t | {"head.head.alpha": torch.zeros(2)}, "alpha"),
    "a difference of another size": (lambda t: t | {"head.head.diff_b": torch.zeros(2)}, "head.head.bias"),
    "a critic's": (lambda t: {"critic_lora": t}, "critic_lora alone"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_merged_is_named(what, student, pairs, tmp_path):
    make, words = BROKEN[what]
    path = write(tmp_path / "lora.safetensors", make(spelt(pairs, *PEFT)))
    with pytest.raises(ValueError, match=words) as caught:
        StudentSource(student, loras=((path, 1.0),)).open()
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_a_file_with_its_strength():
    told = {text: (str(path), strength) for text in ("a.pt", "a.pt:0.5", "a:b.pt", "C:/a.pt:-1")
            for path, strength in [parse_lora(text)]}  # fmt: skip
    assert told == {
        "a.pt": ("a.pt", 1.0), "a.pt:0.5": ("a.pt", 0.5), "a:b.pt": ("a:b.pt", 1.0), "C:/a.pt:-1": ("C:/a.pt", -1.0),
    }  # fmt: skip
    with pytest.raises(ValueError, match="strength nan"):
        parse_lora("a.pt:nan")
