"""Memories, students, LoRAs and pictures made by a stranger."""

import json
import pickle
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from context_forcing.memory.fields import one_line
from context_forcing.memory.memory import CHANGES
from context_forcing.memory.references import Reference
from context_forcing.memory.snapshot import DIGEST_KEY, HEADER_KEY, digest, load_memory, save_memory
from context_forcing.model.checkpoints.convert import inspect
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.segment import generate_segment
from context_forcing.video.journal import Journal
from context_forcing.video.reading import check_video, read_frames, read_runs, read_tags
from context_forcing.video.report import draw_report, summary

from .drill import (  # fmt: skip
    BITS,
    TEXTS,
    as_json,
    damaged,
    drill,
    mutated,
    other_numbers,
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
DTYPES = st.sampled_from((*BITS, "", 3, None))
PARTS = values | SHAPES | OFFSETS | DTYPES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = dict(sink=2, slow=2, fast=4, chunk=2, window=8, slow_similarity_threshold=0.9999)
TEXTS_OF = {prompt: torch.randn(1, 5, 32) for prompt in ("a meadow", "a desert")}


@pytest.fixture(scope="module")
def continued(net, make_sampler):
    """(memory, **how) -> the memory under another prompt, and two chunks longer."""

    def go(memory, prompt, seed=3, **how):
        sampler = lambda text: make_sampler(net, text=text)
        text = TEXTS_OF[prompt]
        *_, memory = generate_segment(
            sampler, memory, text, prompt=prompt, seed=seed, num_chunks=2, sigmas=(1.0,), **how
        )
        return memory

    return go


@pytest.fixture(scope="module")
def memory_files(tmp_path_factory, empty_memory, continued):
    """Files of memories of several policies, with segments, references, recalls and a start, exact and compact."""
    path, files = tmp_path_factory.mktemp("memories") / "memory", []

    def keep(memory):
        save_memory(path, memory)
        files.append(path.read_bytes())

    for policy in ("novel", "cover", "recall", "released"):
        memory = empty_memory(policy=policy, **SMALL)
        if policy == "cover":
            keep(memory := memory.with_start_latents(torch.randn(1, 16, 3, 4, 6)))
        if policy in ("novel", "recall"):
            picture = Reference(latents=torch.randn(1, 16, 1, 4, 6), text=TEXTS_OF["a desert"])
            memory = memory.with_references([picture])
        for prompt in ("a meadow", "a desert", "a meadow"):
            memory = continued(memory, prompt)
        keep(memory.to("cpu", torch.bfloat16))
        if memory.supports("compact"):
            keep(memory.packed("int8"))
            keep(memory.compact())
    return files


def forge(path, outer, body, header):
    """Write a memory with another header and other tensors, and the digest of them that a stranger computes."""
    path.write_bytes(safetensors_of(outer, body))
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, AttributeError):
        return  # torch has no such numbers: whoever reads the file has no digest of them either
    outer = {**outer, "__metadata__": {HEADER_KEY: as_json({**header, DIGEST_KEY: digest(header, tensors)})}}
    path.write_bytes(safetensors_of(outer, body))


@pytest.fixture(scope="module")
def use_memory(continued):
    """All that Load Memory, `report` and `generate --memory-in` do with a memory."""

    def use(path, **how):
        memory = load_memory(path)
        assert all(tensor.is_floating_point() for tensor in memory.latent_chunks)
        draw_report(memory, None, 16.0)
        assert summary(memory, 16.0)
        return continued(memory, "a desert", **how)

    return use


NEAR = values | st.integers(-1, 12) | st.floats(-1, 1)
"""Also numbers that could stand in a memory."""


def header_of(outer):
    header = json.loads(outer["__metadata__"][HEADER_KEY])
    header.pop(DIGEST_KEY)
    return header


def test_a_forged_digest_is_right(folder, memory_files, use_memory):
    for data in memory_files:
        outer, body = safetensors_parts(data)
        forge(folder / "m.safetensors", outer, body, header_of(outer))
        assert use_memory("m.safetensors")


@drill(
    64,
    data=st.data(),
    kind=st.sampled_from(("header", "numbers", "numbers", "numbers", "both", "tensors", "bytes", "first bytes")),
    change=st.sampled_from(("keep", *CHANGES)),
    most=st.sampled_from((1, 3)),
)
def test_memories(folder, memory_files, use_memory, data, kind, change, most):
    original, path = data.draw(st.sampled_from(memory_files)), folder / "m.safetensors"
    outer, body = safetensors_parts(original)
    header = header_of(outer)
    if kind in ("header", "both"):
        header = data.draw(mutated(header, most=most, values=NEAR))
    if kind in ("numbers", "both"):
        outer, body = data.draw(other_numbers(outer, body, most=most))
    if kind == "tensors":
        path.write_bytes(safetensors_of(data.draw(mutated(outer, values=PARTS)), body))
    elif "bytes" in kind:
        path.write_bytes(data.draw(damaged(original, 0, len(original) if kind == "bytes" else 16)))
    elif isinstance(header, dict):
        forge(path, outer, body, header)
    else:
        path.write_bytes(safetensors_of({**outer, "__metadata__": {HEADER_KEY: as_json(header)}}, body))
    used_or_refused("memories", lambda: use_memory("m.safetensors", change=change, blend=1), one_line)


SHAPE = (1, 16, 3, 4, 6)


def resumed(folder):
    return Journal(folder / "j", {"student": "me"}, True, num_chunks=3, shape=SHAPE)


@pytest.fixture(scope="module")
def journal_files(tmp_path_factory):
    """The files of a journal of three chunks."""
    folder = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(folder, {"student": "me"}, False, num_chunks=3, shape=SHAPE)
    for number in range(3):
        journal.keep(number, torch.full(SHAPE, float(number)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@drill(24, data=st.data(), kind=st.sampled_from(("header", "numbers", "numbers", "tensors", "bytes")))
def test_journals(folder, journal_files, data, kind):
    (folder / "j").mkdir(exist_ok=True)
    for name, content in journal_files.items():
        (folder / "j" / name).write_bytes(content)
    path = folder / "j" / ("journal.json" if kind == "header" else "chunk-000001.safetensors")
    original = path.read_bytes()
    if kind == "header":
        path.write_text(as_json(data.draw(mutated(json.loads(original)))), errors="surrogatepass")
    elif kind == "bytes":
        path.write_bytes(data.draw(damaged(original)))
    else:
        outer, body = safetensors_parts(original)
        if kind == "numbers":
            outer, body = data.draw(other_numbers(outer, body))
        else:
            outer = data.draw(mutated(outer, values=PARTS))
        path.write_bytes(safetensors_of(outer, body))
    journal = used_or_refused("journals", lambda: resumed(folder), one_line)
    for chunk in journal.finished if journal else ():
        assert chunk.shape == SHAPE and chunk.dtype == torch.float32 and chunk.isfinite().all()


@pytest.fixture(scope="module")
def student_bytes(student):
    return student.read_bytes()


def use_student(path, **options):
    """As `convert` and the loaders read a student: all stages, and all weights."""
    source = StudentSource(path, **options)
    assert inspect(source)
    return source.open().load()


@drill(
    40,
    data=st.data(),
    kind=st.sampled_from(("card", "config", "numbers", "numbers", "tensors", "bytes", "first bytes")),
)
def test_students(folder, student_bytes, data, kind):
    outer, body = safetensors_parts(student_bytes)
    if kind in ("card", "config"):
        key = {"card": "context_forcing", "config": "config"}[kind]
        text = data.draw(mutated(json.loads(outer["__metadata__"][key])).map(as_json) | st.sampled_from(TEXTS))
        outer["__metadata__"][key] = text
        content = safetensors_of(outer, body)
    elif kind == "numbers":
        content = safetensors_of(*data.draw(other_numbers(outer, body)))
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
    torch.uint8, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn, torch.float64))),
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
