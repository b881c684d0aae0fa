"""Rows of an evaluation: their settings reach the film, and settings that cannot be used are refused."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.memory.packed import TYPES
from context_forcing.model.config import StudentCard
from context_forcing.model.sampler import CausalSampler
from context_forcing.train.evaluation.evaluate import Plan, evaluate, parse_students
from context_forcing.train.evaluation.rollout import branches
from context_forcing.train.evaluation.variants import Variant
from context_forcing.train.world.prompts import ALL_STYLES

from .helpers import generated


def test_the_settings_of_a_row_are_those_of_the_film(pipeline, same_memory):
    style, moves = ALL_STYLES[3], (0, 1, 1, -1, 0, 0, 0)
    roll = lambda name: next(
        end
        for _, end in branches(
            Variant.parse(name).camera(pipeline, style, 7), Variant.parse(name).empty_memory(pipeline), {0: moves}
        )
    )
    given = roll("fifo:sink=1:slow=2:fast=5:eviction=redundant:commit_attends=itself:match_sink=0.5")
    empty = pipeline.empty_memory(policy="fifo", sink=1, slow=2, fast=5, eviction="redundant")
    card = dataclasses.replace(pipeline.card, commit_attends="itself", match_sink=0.5)
    alone = generated(dataclasses.replace(pipeline, card=card), empty, style, 7, moves)
    assert same_memory(given, alone)
    assert not same_memory(roll("fifo:sink=1:slow=2:fast=5:eviction=redundant"), alone)


def test_a_row_is_recached_every_so_many_chunks(pipeline, same_memory, monkeypatch):
    recached = []
    own = CausalSampler.recache
    monkeypatch.setattr(
        CausalSampler, "recache", lambda self, memory: recached.append(memory.num_frames) or own(self, memory)
    )
    row = Variant.parse("fifo:recache=2")
    memory, camera = row.empty_memory(pipeline), row.camera(pipeline, ALL_STYLES[0], 3)
    once = Variant.parse("fifo").camera(pipeline, ALL_STYLES[0], 3)
    for _ in range(5):
        before, memory = memory, camera.move(memory, 1)
    assert recached == [6, 12]
    assert not same_memory(memory, once.move(before, 1))


@pytest.mark.parametrize("row", ["recall:kv_dtype=int8", "oracle:kv_dtype=fp8"])
def test_a_row_stores_sink_and_slow_in_eight_bits(pipeline, row):
    row = Variant.parse(row)
    memory, camera = row.empty_memory(pipeline), row.camera(pipeline, ALL_STYLES[0], 3)
    for move in (1, 1, 0, -1, -1):
        memory = camera.move(memory, move)
    assert memory.slots.slow and memory.slots.fast
    packed = {*memory.slots.sink, *memory.slots.slow}
    for frame, kv in memory.store.frame_kvs():
        keys, *_ = kv.tensors()
        assert keys.dtype == (TYPES[row.kv_dtype] if frame in packed else torch.float32)


@pytest.mark.parametrize(
    "policies, match",
    [
        ("best", "policies: 'best' is not one of none, novel"),
        ("novel:window=3", "'window' in 'novel:window=3' is not one of recache"),
        ("novel:slow=2:slow=3", "'slow' in .* each once"),
        ("novel:recache=often", "recache 'often' is not a whole number"),
        ("novel:commit_attends=most", "commit_attends 'most' is not one of all"),
        ("recall:kv_dtype=int4", "policies: kv_dtype 'int4' is not one of auto, int8, fp8"),
        ("novel:match_sink=1.5", "match_sink '1.5' is not a share; it must be a number in"),
        ("novel,nvel", "policies: 'nvel' is not one of none, novel, .*oracle, rag, tether"),
    ],
)
def test_a_row_that_does_not_exist_is_refused(policies, match):
    with pytest.raises(ValueError, match=match):
        parse_students("demo", [], policies)


@pytest.fixture
def without_slow(make_net, tmp_path, save_student):
    path = tmp_path / "without_slow.safetensors"
    card = StudentCard(base="demo", steps=(1000.0,), shift=3.0, memory=MemoryConfig(slow=0), size=(128, 64))
    save_student(path, make_net(3, text_dim=4096, text_len=512), card)
    return str(path)


def test_policies_that_a_student_cannot_use_are_left_out(without_slow, tmp_path, caplog):
    students = parse_students(without_slow, [], "oracle,released:kv_dtype=int8,fifo")
    plan = Plan(students=students, gaps=(0,), columns=(9,), rollouts=2)
    cells, _ = evaluate(plan, "cpu", "fp32", tmp_path / "out")
    shown = {column.header: list(column.cells) for column in cells.columns}
    assert shown["who"] == ["fifo", "fifo"] and all(shown["motion"])
    assert "without_slow cannot be measured under policy oracle: slow: 0 latent frames" in caplog.text
    assert "under policy released:kv_dtype=int8: kv_dtype: with policy released" in caplog.text
    with pytest.raises(ValueError, match="policies: the students can use none of them"):
        evaluate(dataclasses.replace(plan, students=parse_students(without_slow, [], "rag")), "cpu", "fp32", tmp_path)
