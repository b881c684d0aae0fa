"""Memories, students, LoRAs and pictures made by a stranger."""

import hashlib
import json
import pickle
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from context_forcing.memory.fields import one_line
from context_forcing.memory.snapshot import DIGEST_KEY, HEADER_KEY, load_memory, save_memory
from context_forcing.model.checkpoints.convert import inspect
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.sampler import seeded_noise
from context_forcing.video.reading import check_video, read_frames, read_runs, read_tags
from context_forcing.video.report import draw_report, summary

from .drill import (  # fmt: skip
    TEXTS,
    as_json,
    damaged,
    drill,
    mutated,
    safetensors_of,
    safetensors_parts,
    scalars,
    used_or_refused,
    values,
)

SHAPES = st.sampled_from(
    ([], [0], [1], [-1], [2**62], [2**31, 2**31], [2**63 - 1], [1] * 70, [65536, 65536], [3, 0, 2], [1.5], "x", None)
)
OFFSETS = st.sampled_from(([0, 0], [0, 2**62], [2**62, 0], [-8, 8], [8, 4], [0], [0, 1, 2], [0, 2**64], None))
DTYPES = st.sampled_from(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U8", "", 3, None))
PARTS = values | SHAPES | OFFSETS | DTYPES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def memory_files(tmp_path_factory, net, make_sampler, empty_memory):
    """Files of memories of several policies, with segments, references, recalls and a start."""
    folder, files = tmp_path_factory.mktemp("memories"), []
    for policy in ("novel", "recall", "released"):
        memory = empty_memory(policy=policy)
        for prompt in ("a meadow", "a desert"):
            memory = memory.begin(prompt, 3, text=torch.ones(1, 5, 64))
            *_, memory = make_sampler(net).rollout(memory, 2, sigmas=(1.0,), noise=seeded_noise(0, memory.latent_size))
        save_memory(folder / policy, memory)
        files.append((folder / policy).read_bytes())
        if memory.supports("compact"):
            save_memory(folder / "compact", memory.compact())
            files.append((folder / "compact").read_bytes())
    return files


def forged(data: bytes, header: dict) -> bytes:
    """The memory file with another header, and the digest of it as whoever forges one computes it."""
    outer, body = safetensors_parts(data)
    sha = hashlib.sha256(json.dumps(header).encode())
    names = sorted(name for name in outer if name != "__metadata__")
    kinds = {"F32": "torch.float32", "BF16": "torch.bfloat16", "F16": "torch.float16", "I64": "torch.int64"}
    for name in names:
        first, last = outer[name]["data_offsets"]
        sha.update(f"{name}{kinds[outer[name]['dtype']]}{tuple(outer[name]['shape'])}".encode())
        sha.update(body[first:last])
    outer["__metadata__"] = {HEADER_KEY: json.dumps({**header, DIGEST_KEY: sha.hexdigest()})}
    return safetensors_of(outer, body)


def use_memory(path):
    """All that Load Memory and `report` do with a memory, without a student."""
    memory = load_memory(path)
    draw_report(memory, None, 16.0)
    return summary(memory, 16.0)


def test_a_forged_digest_is_right(folder, memory_files):
    for data in memory_files:
        header = json.loads(safetensors_parts(data)[0]["__metadata__"][HEADER_KEY])
        header.pop(DIGEST_KEY)
        (folder / "m.safetensors").write_bytes(forged(data, header))
        assert load_memory("m.safetensors")


@drill(40, data=st.data(), kind=st.sampled_from(("header", "header", "tensors", "bytes", "first bytes")))
def test_memories(folder, memory_files, data, kind):
    original = data.draw(st.sampled_from(memory_files))
    outer, body = safetensors_parts(original)
    if kind == "header":
        header = json.loads(outer["__metadata__"][HEADER_KEY])
        header.pop(DIGEST_KEY)
        changed = data.draw(mutated(header))
        content = (
            forged(original, changed)
            if isinstance(changed, dict)
            else safetensors_of({**outer, "__metadata__": {HEADER_KEY: as_json(changed)}}, body)
        )
    elif kind == "tensors":
        content = safetensors_of(data.draw(mutated(outer, values=PARTS)), body)
    else:
        content = data.draw(damaged(original, 0, len(original) if kind == "bytes" else 16))
    (folder / "m.safetensors").write_bytes(content)
    used_or_refused("memories", lambda: use_memory("m.safetensors"), one_line)


@pytest.fixture(scope="module")
def student_bytes(student):
    return student.read_bytes()


def use_student(path, **options):
    """As `convert` and the loaders read a student: all stages, and one weight."""
    source = StudentSource(path, **options)
    assert inspect(source)
    opened = source.open()
    return opened.tensor(next(iter(opened.stored)))


@drill(32, data=st.data(), kind=st.sampled_from(("card", "config", "tensors", "bytes", "first bytes")))
def test_students(folder, student_bytes, data, kind):
    outer, body = safetensors_parts(student_bytes)
    if kind in ("card", "config"):
        key = {"card": "context_forcing", "config": "config"}[kind]
        text = data.draw(mutated(json.loads(outer["__metadata__"][key])).map(as_json) | st.sampled_from(TEXTS))
        outer["__metadata__"][key] = text
        content = safetensors_of(outer, body)
    elif kind == "tensors":
        content = safetensors_of(data.draw(mutated(outer, values=PARTS)), body)
    else:
        content = data.draw(damaged(student_bytes, 0, 4000 if kind == "bytes" else 16))
    name = data.draw(st.sampled_from(("s.safetensors", "s.pt", "s.sft", "s-00001-of-00002.safetensors")))
    (folder / name).write_bytes(content)
    used_or_refused("students", lambda: use_student(name), one_line)


OPTIONS = st.sampled_from(TEXTS) | st.sampled_from(
    ("steps=", "steps=0", "steps=1e400", "shift=nan", "shift=-1", "sink=9999999999", "memory.policy=x",
    "memory=released",
     "size=65536,65536", "fps=0", "size=16,16", "name=", "steps=1000,1000", "memory.chunk=0", "match_sink=2",
     "chunk=21",
     "first_steps=", "train_steps=[1]", "memory=[1]", "memory.memory.x=1", "steps.x=1", "window=1000000000"),
)  # fmt: skip


@drill(24, overrides=st.lists(OPTIONS, max_size=3), weights=st.just("auto") | OPTIONS, card=st.just("auto") | OPTIONS)
def test_options_of_a_student(student, overrides, weights, card):
    options = {"overrides": tuple(overrides), "weights": weights, "card": card}
    used_or_refused("options of a student", lambda: use_student(student, **options), one_line)


TREES = st.recursive(
    scalars | st.sampled_from(TEXTS) | st.just(torch.zeros(3)) | st.just(torch.zeros(2, 2).to_sparse()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("generator", "model", "a", "lora")),
    inner,
                                                              max_size=3),
    max_leaves=6,
)  # fmt: skip


@drill(24, tree=TREES, is_zip=st.booleans(), name=st.sampled_from(("a.pt", "a.safetensors")), data=st.data())
def test_torch_files(folder, tree, is_zip, name, data):
    torch.save(tree, name, _use_new_zipfile_serialization=is_zip)
    content = (folder / name).read_bytes()
    if data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(damaged(content, 0, 900) | st.just(pickle.dumps(tree, protocol=2))))
    used_or_refused("torch files", lambda: use_student(name), one_line)


JSONS = st.sampled_from(("a-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json",
                         "scheduler/scheduler_config.json", "transformer/config.json"))  # fmt: skip
INDEX = {"weight_map": {"a": "a-00001-of-00002.safetensors", "b": "../../x"}, "_class_name": "WanModel", "num_heads": 2}


@drill(16, name=JSONS, tree=mutated(INDEX, values=values | st.sampled_from(("../x", "/etc/passwd", "a.safetensors"))))
def test_folders_of_a_student(folder, student_bytes, name, tree):
    for each in ("m", "m/scheduler", "m/transformer"):
        (folder / each).mkdir(exist_ok=True)
    (folder / "m" / "model.safetensors").write_bytes(student_bytes)
    (folder / "m" / name).write_text(as_json(tree), encoding="utf-8", errors="surrogatepass")
    used_or_refused("students", lambda: use_student("m"), one_line)
    (folder / "m" / name).unlink()


NAMES = ("blocks.0.self_attn.q", "lora_unet__blocks_0_self_attn_q", "diffusion_model.blocks.1.ffn.0", "x",
    "blocks.9.ffn.0",
         "base_model.model.blocks.0.ffn.2", "transformer.blocks.0.attn1.to_q", "", "blocks.0.norm3",
         "patch_embedding")  # fmt: skip
ENDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b", "weight",
    "lora_A",
        "dora_scale", "diff_m")  # fmt: skip
SIZES = (
    (),
    (0,),
    (1,),
    (64,),
    (4, 64),
    (64, 4),
    (0, 64),
    (64, 0),
    (128, 4),
    (4, 128),
    (4, 64, 1, 1),
    (1, 3, 64),
    (3, 3),
    (0, 0),
)
TENSORS = st.dictionaries(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(ENDS)).map(".".join),
    st.tuples(st.sampled_from(SIZES), st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.bool,
    torch.uint8))),
    max_size=5,
)  # fmt: skip
WHOLE_LORA = {
    "blocks.0.self_attn.q.lora_A.weight": ((4, 64), torch.float32),
    "blocks.0.self_attn.q.lora_B.weight": ((64, 4), torch.float32),
}
ADAPTER = {"lora_alpha": 4, "rank_pattern": {}, "transformer.lora_alpha": 8}


@drill(
    40,
    tensors=TENSORS,
    config=st.none() | mutated(ADAPTER),
    strength=st.sampled_from(("", ":1", ":nan", ":1e400", ":x", ":")),
)
def test_loras(folder, student, tensors, config, strength):
    from context_forcing.model.checkpoints.lora import parse_lora

    data = {name: torch.ones(size).to(dtype) for name, (size, dtype) in {**WHOLE_LORA, **tensors}.items()}
    metadata = None if config is None else {"lora_adapter_metadata": as_json(config)}
    (folder / "lora.safetensors").write_bytes(save(data, metadata))

    def use():
        return use_student(student, loras=(parse_lora(f"lora.safetensors{strength}"),))

    used_or_refused("LoRAs", use, one_line)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Small files that ffmpeg reads, by suffix."""
    folder = tmp_path_factory.mktemp("films")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    for suffix in (".png", ".gif", ".webp", ".jpg"):
        picture.save(folder / f"a{suffix}")
    for suffix in (".mp4", ".mkv"):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"{folder / 'a.png'}", "-vf", "loop=5:1"]
        subprocess.run([*command, "-pix_fmt", "yuv420p", f"{folder / f'a{suffix}'}"], check=True)
    return {path.suffix: path.read_bytes() for path in sorted(folder.iterdir())}


def use_film(path):
    check_video(path)
    assert len(list(read_tags(path))) < 100 if path.endswith(".mp4") else True
    return len(list(read_frames(path)[1])), [run.shape for run in read_runs(path, 4, (48, 32), 8)]


@drill(2, data=st.data(), end=st.sampled_from((64, 400, 2000, None)))
def test_videos_and_pictures(folder, films, data, end):
    suffix = data.draw(st.sampled_from(sorted(films)))
    (folder / f"film{suffix}").write_bytes(data.draw(damaged(films[suffix], 0, end)))
    door = lambda error: one_line(f"start: film{suffix}: {error}")
    used_or_refused("videos", lambda: use_film(f"film{suffix}"), door)
