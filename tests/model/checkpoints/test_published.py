"""Every published layout loads to the same weights, or is refused in one line that says what it is."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from context_forcing.model.checkpoints.convert import convert, inspect
from context_forcing.model.checkpoints.published import PUBLISHED, override
from context_forcing.model.checkpoints.student import StudentSource, infer_config
from context_forcing.model.config import PRESETS, StudentCard
from context_forcing.model.wan import WanModel

from .published import (
    BF16,
    ROWS,
    SIZES,
    cast,
    diffusers,
    fastvideo,
    flat,
    fsdp,
    parts,
    pickled,
    prefixed,
    quantise,
    refused,
)  # fmt: skip


def same(student, state):
    return student.named.tensors.keys() == state.keys() and all(
        torch.equal(student.tensor(name).float(), tensor) for name, tensor in state.items()
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_published_row(row, state, tmp_path):
    student = StudentSource(row.make(tmp_path, state), **dict(row.reading)).open()
    assert same(student, cast(cast(state, row.dtype), torch.float32))
    assert student.card.name == row.card
    assert {tensor.dtype for tensor in student.named.tensors.values()} == {row.dtype}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_converts_to_a_file_of_ours(row, state, tmp_path):
    (tmp_path / "in").mkdir()
    source, out = row.make(tmp_path / "in", state), tmp_path / "out.safetensors"
    convert(StudentSource(source, **dict(row.reading)), out, dtype="bf16")
    again = StudentSource(out).open()
    assert same(again, state) and {tensor.dtype for tensor in again.named.tensors.values()} == {BF16}
    assert again.card.name == row.card and again.card_choice.reason == "the card in its metadata" and not again.note
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.safetensors"]


def test_what_was_asked_for_must_be_there(state, tmp_path):
    one = pickled(tmp_path, {"generator": prefixed(state, "model.")})
    assert "holds generator, no generator_ema" in refused(one, weights="generator_ema")
    assert "holds one set of weights, no generator" in refused(flat(tmp_path, state), weights="generator")
    assert "not one of auto, generator" in refused(one, weights="ema")
    assert "not one of auto, self-forcing" in refused(one, card="wan")


@pytest.mark.parametrize("row", ["self-forcing", "causal-forcing-2step", "longlive", "memflow", "krea-14b"])
def test_every_field_of_a_card_can_be_replaced(row):
    card = override(PUBLISHED[row].card, ["steps=1000,500", "shift=3", "chunk=1", "memory.slow=0", "first_steps=1000"])
    assert (card.steps, card.shift, card.first_steps) == ((1000.0, 500.0), 3.0, (1000.0,))
    assert card.memory.chunk == 1 and card.memory.slow == 0
    assert override(card, ["steps=[900]", "size=640,368", "train_steps=3"]).size == (640, 368)
    assert StudentCard.from_json(card.to_json()) == card


def five_b(state):
    return state | {"patch_embedding.weight": torch.zeros(16, 48, 1, 2, 2), "head.head.weight": torch.zeros(192, 16)}


FOREIGN = {
    "LongLive-2 5B": (lambda s: {"generator": prefixed(five_b(s), "model.")}, "Wan 2.2 5B"),
    "LongLive-2 NVFP4": (
        lambda s: {"generator": prefixed(five_b(s) | {"blocks.0.q.quantized_weight_a": torch.zeros(2)}, "model.")},
        "quantised like LongLive-2",
    ),
    "image-to-video": (lambda s: s | {"img_emb.proj.0.weight": torch.zeros(3)}, "image-to-video"),
    "image-to-video, attention": (lambda s: s | {"blocks.0.cross_attn.k_img.weight": torch.zeros(3)}, "image-to-video"),
    "image-to-video, channels": (lambda s: s | {"patch_embedding.weight": torch.zeros(16, 36, 1, 2, 2)}, "36 input"),
    "image-to-video, diffusers": (
        lambda s: diffusers(s) | {"condition_embedder.image_embedder.norm1.weight": torch.zeros(3)}, "image-to-video",
    ),
    "VACE": (lambda s: s | {"vace_blocks.0.after_proj.weight": torch.zeros(3)}, "VACE"),
    "camera": (lambda s: s | {"control_adapter.conv.weight": torch.zeros(3)}, "control_adapter"),
    "diffusers, norms mixed up": (
        lambda s: {name.replace(".norm2.", ".norm3."): tensor for name, tensor in diffusers(s).items()}, "norm3",
    ),
    "a LoRA": (lambda s: {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(3)}, "a LoRA"),
    "a text encoder": (lambda s: {"shared.weight": torch.zeros(3)}, "a text encoder"),
    "a VAE": (lambda s: {"decoder.conv1.weight": torch.zeros(3)}, "a VAE"),
    "another model": (lambda s: {"transformer.h.0.attn.weight": torch.zeros(3)}, "not a Wan 2.1 model"),
    "two networks": (lambda s: s | prefixed(s, "model."), "twice"),
    "a critic alone": (lambda s: {"critic": s, "step": 3}, "holds critic"),
    "numbers": (lambda s: {"generator": s | {"step": 3}}, "'step' is not a tensor"),
    "integers": (lambda s: s | {"head.head.bias": torch.zeros(64, dtype=torch.int32)}, "int32"),
    "nothing": (lambda s: {}, "no tensors"),
    "text": (lambda s: {"a": "b"}, "no tensors"),
    "a list": (lambda s: [torch.zeros(3)], "holds a list"),
    "a sparse tensor": (lambda s: {"a": torch.eye(3).to_sparse()}, "only tensors are read"),
    "a dtype": (lambda s: {"a": torch.float32}, "only tensors are read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_student_is_named(name, state, tmp_path):
    make, words = FOREIGN[name]
    says = refused(pickled(tmp_path, make(state)))
    assert words in says and "model.pt" in says


@pytest.mark.parametrize(
    "content, words",
    [(b"GGUF\x03\0\0\0" * 9, "ComfyUI-GGUF"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
     (b"\n<!DOCTYPE html><html>", "a web page"), (b"", "neither"), (b"hello there, I am text", "neither")],
)  # fmt: skip
def test_files_of_another_kind(content, words, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    assert words in refused(tmp_path / "a.pt")


def test_a_header_as_long_as_a_pickles_first_byte(state, tmp_path):
    """Safetensors begin with a length; 0x80 is also how pickles begin."""
    for pad in range(256):
        save_file(state, tmp_path / "a.bin", {"a": "b" * pad})
        if (tmp_path / "a.bin").read_bytes()[:1] == b"\x80":
            break
    assert (tmp_path / "a.bin").read_bytes()[:1] == b"\x80"
    assert StudentSource(tmp_path / "a.bin").open().container.kind == "safetensors"


def test_a_header_length_like_the_start_of_a_web_page(state, tmp_path):
    """15392 is b" <" in the first two bytes."""
    save_file(state, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].ljust(15392), content[8 + length :]
    (tmp_path / "a.safetensors").write_bytes((15392).to_bytes(8, "little") + header + data)
    assert same(StudentSource(tmp_path / "a.safetensors").open(), state)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("way", ["torch", "old torch", "pickle"])
def test_code_in_a_pickle_is_not_run(way, protocol, state, tmp_path):
    tree = {"generator": state | {"x": Code(f"touch {tmp_path}/ran")}}
    if way == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(tree["generator"]["x"], protocol=protocol))
    else:
        torch.save(tree, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=way == "torch")
    says = refused(tmp_path / "a.pt")
    assert "a.pt" in says and (way == "pickle" or "system" in says or protocol == 4)
    assert not (tmp_path / "ran").exists()
    os.system(f"touch {tmp_path}/ran")  # noqa: S605
    assert (tmp_path / "ran").exists(), "the command would have worked"


def test_an_object_in_a_pickle_is_named(tmp_path):
    torch.save({"config": re.compile("a"), "generator": {}}, tmp_path / "a.pt")
    assert "re._compile" in refused(tmp_path / "a.pt") and "safetensors" in refused(tmp_path / "a.pt")


def test_a_torch_that_is_not_safe_reads_no_pickle(state, tmp_path, monkeypatch):
    path = pickled(tmp_path, state)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert "2.6 or newer" in refused(path)
    assert same(StudentSource(flat(tmp_path, state)).open(), state)


def test_parts_that_are_missing_or_do_not_fit(state, tmp_path):
    index = parts(tmp_path, state)
    second = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.unlink()
    assert "download all 3 parts" in refused(index)
    second.write_bytes(content[:-9])
    assert "not a complete safetensors file" in refused(tmp_path)
    save_file({"a": torch.zeros(1)}, second)
    assert "disagree" in refused(index)
    second.write_bytes(content)
    assert same(StudentSource(index).open(), state)
    listed = json.loads(index.read_text())
    index.write_text(json.dumps(listed | {"weight_map": {"a": "../a.safetensors"}}))
    assert "not a file beside it" in refused(index)
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        refused(index)
    index.unlink()
    assert "one of 3 parts" in refused(second)


def test_folders_that_hold_no_one_model(state, tmp_path):
    assert "no .safetensors" in refused(tmp_path)
    pickled(tmp_path, state, "longlive_base.pt")
    assert same(StudentSource(tmp_path).open(), state)
    pickled(tmp_path, state, "lora.pt")
    assert "longlive_base.pt, lora.pt; give one" in refused(tmp_path)


def test_a_missing_last_block_shows_at_the_published_widths():
    """A smaller network would be whole; 1.3B has 30 blocks."""
    with torch.device("meta"):
        whole = WanModel(PRESETS["wan2.1-1.3b"]).state_dict()
    assert infer_config(whole, None, "a") == PRESETS["wan2.1-1.3b"]
    short = {name: tensor for name, tensor in whole.items() if not name.startswith("blocks.29.")}
    with pytest.raises(ValueError, match="num_layers is 29, wan2.1-1.3b has 30"):
        infer_config(short, None, "a")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_scaled_float8(spelling, prefix, state, tmp_path):
    stored, meant = quantise(state, spelling)
    path = flat(tmp_path, stored, prefix=prefix)
    student = StudentSource(path).open()
    assert same(student, meant) and len(student.named.scales) == 20
    convert(StudentSource(path), tmp_path / "out.safetensors")
    kept = StudentSource(tmp_path / "out.safetensors").open().named.tensors
    assert {tensor.dtype for tensor in kept.values()} == {BF16}
    assert all(torch.equal(kept[name], tensor.to(BF16)) for name, tensor in meant.items())


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_float8_weight_without_its_scale_is_refused(spelling, state, tmp_path):
    stored, _ = quantise(state, spelling)
    scale = "blocks.1.ffn.2." + {"old": "scale_weight", "new": "weight_scale"}[spelling]
    without = {name: tensor for name, tensor in stored.items() if name != scale}
    assert "blocks.1.ffn.2.weight has no scale" in refused(flat(tmp_path, without))
    assert "belongs to no weight" in refused(flat(tmp_path, stored | {"blocks.7.ffn.2.scale_weight": torch.ones(1)}))
    assert "has a scale" in refused(flat(tmp_path, stored | {"blocks.1.ffn.2.weight": torch.zeros(16, 32)}))


def test_other_quantisation_is_comfyuis(state, tmp_path):
    about = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    assert "nvfp4, which only ComfyUI reads" in refused(flat(tmp_path, state | {"blocks.0.ffn.0.comfy_quant": about}))
    save_file(state, tmp_path / "m.safetensors", {"_quantization_metadata": '{"layers": {"a": {"format": "int8"}}}'})
    assert "int8, which only ComfyUI reads" in refused(tmp_path / "m.safetensors")


def test_plain_float8_stays_float8(state, tmp_path):
    path = flat(tmp_path, cast(state, torch.float8_e4m3fn))
    assert same(StudentSource(path).open(), cast(cast(state, torch.float8_e4m3fn), torch.float32))
    convert(StudentSource(path), tmp_path / "out.safetensors")
    assert StudentSource(tmp_path / "out.safetensors").open().tensor("head.head.bias").dtype == torch.float8_e4m3fn


NAMINGS = {
    "Wan": lambda s: s, "model.": lambda s: prefixed(s, "model."), "fsdp": fsdp, "diffusers": diffusers,
    "fastvideo": fastvideo, "comfyui": lambda s: prefixed(s, "model.diffusion_model."),
    "ddp": lambda s: prefixed(s, "module.model."), "compiled": lambda s: prefixed(s, "_orig_mod."),
    "diffusers, wrapped": lambda s: prefixed(diffusers(s), "module._orig_mod."),
}  # fmt: skip
NESTINGS = tuple(
    names.split() for names in ("", "generator", "generator_ema", "model", "state_dict", "state_dict generator")
)
DAMAGES = ("none", "missing", "extra", "reshaped", "truncated", "renamed")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    naming=st.sampled_from(sorted(NAMINGS)), nesting=st.sampled_from(NESTINGS), dtype=st.sampled_from(["fp32", "bf16"]),
    container=st.sampled_from(["safetensors", "pickle", "old pickle"]), damage=st.sampled_from(DAMAGES), data=st.data(),
)  # fmt: skip
def test_mangled_files_load_exactly_or_are_refused(naming, nesting, dtype, container, damage, data, state, tmp_path):
    tensors = NAMINGS[naming](cast(state, BF16 if dtype == "bf16" else torch.float32))
    victim = data.draw(st.sampled_from(sorted(tensors)))
    if damage == "missing":
        del tensors[victim]
    elif damage == "extra":
        tensors[f"{victim}.more"] = torch.zeros(1)
    elif damage == "reshaped":
        tensors[victim] = torch.cat([tensors[victim].flatten(), torch.zeros(1)])
    elif damage == "renamed":
        tensors[victim[:-1]] = tensors.pop(victim)
    path = tmp_path / ("a.safetensors" if container == "safetensors" else "a.pt")
    if container == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        for name in reversed(nesting):
            tensors = {name: tensors}
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "pickle")
    if damage == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if damage == "none":
        assert same(StudentSource(path).open(), state)
    else:
        refused(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), bytes_=st.binary(min_size=1, max_size=8), zipped=st.booleans())
def test_scrambled_pickles_never_raise_anything_else(at, bytes_, zipped, tmp_path):
    """Bytes written over any place of a pickle's program."""
    torch.save({"generator": {"a.weight": torch.zeros(3), "b": [1, 2.0, "c"]}}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    content = bytearray((tmp_path / "a.pt").read_bytes())
    place = int(at * min(len(content) - 8, 600))
    content[place : place + len(bytes_)] = bytes_
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt")


def test_inspect_says_what_a_file_is(state, tmp_path):
    path = pickled(tmp_path, {"generator_ema": fsdp(state), "generator": prefixed(state, "model."), "critic": state})
    rows = dict(inspect(StudentSource(path, card="causal-forcing-2step")))
    assert rows["container"] == "torch pickle" and rows["holds"] == "generator_ema, generator, critic"
    assert rows["weights"] == "generator_ema" and rows["stored as"] == "float32 (69)" and rows["tensors"] == "69 of 69"
    assert "_fsdp_wrapped_module." in rows["layout"] and "2 layers" in rows["size"]
    assert "refused" not in rows and rows["card"].startswith("causal-forcing-2step (requested")
    short = {name: tensor for name, tensor in state.items() if name != "blocks.0.ffn.0.bias"}
    rows = dict(inspect(StudentSource(flat(tmp_path, short))))
    assert rows["tensors"] == "68 of 69" and "blocks.0.ffn.0.bias" in rows["refused"] and "card" not in rows


@pytest.fixture
def whole(make_net, tmp_path):
    return flat(tmp_path, make_net(**SIZES).state_dict(), "in.safetensors")


def test_convert_writes_over_nothing(whole, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    for words, how in (
        ("exists; give another name", dict(output=out)), ("must end in", dict(output=tmp_path / "out.pt")),
        ("is the source", dict(output=whole, force=True)),
        ("dtype", dict(output=out, dtype="int8", force=True)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            convert(StudentSource(whole), **how)
    assert out.read_text() == "mine"
    convert(StudentSource(whole, overrides=("name=mine",)), out, force=True)
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["converted_from"])["file"] == "in.safetensors"
    assert StudentSource(out).open().card.name == "mine"


PEAK = """
import json, sys, torch
from pathlib import Path
from context_forcing.model.checkpoints.convert import convert
from context_forcing.model.checkpoints.student import StudentSource
torch.set_num_threads(1)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
import context_forcing.video.pipeline
before = peak()
convert(StudentSource(sys.argv[1]), Path(sys.argv[2]), "bf16")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_converting_needs_the_file_and_one_tensor(kind, make_net, tmp_path):
    state = make_net(dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=4096).state_dict()
    nested = {"generator_ema": prefixed(state, "model.")}
    path = flat(tmp_path, state) if kind == "safetensors" else pickled(tmp_path, nested)
    size, largest = path.stat().st_size, max(tensor.numel() for tensor in state.values())
    assert size > 150e6
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    beyond = int(done.stdout.splitlines()[-1]) - size
    assert beyond < 2 * largest + 16e6, f"{beyond / 1e6:.1f} MB beyond the file of {size / 1e6:.1f} MB"


def test_dicts_that_lie_in_themselves_are_refused(tmp_path):
    inside = {"a": torch.zeros(1)}
    inside["model"] = inside
    torch.save(inside, tmp_path / "inside.pt")
    with pytest.raises(ValueError, match="inside themselves"):
        StudentSource(tmp_path / "inside.pt").open()
    both = {"a": torch.zeros(1)}
    torch.save({"generator": both, "generator_ema": both}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="not a Wan 2.1 model"):
        StudentSource(tmp_path / "twice.pt").open()


def test_a_block_beyond_all_tensors_is_refused_at_once(state, tmp_path):
    torch.save(state | {"blocks.3000000.x": torch.zeros(1)}, tmp_path / "far.pt")
    with pytest.raises(ValueError, match="block 3000000"):
        StudentSource(tmp_path / "far.pt").open()
