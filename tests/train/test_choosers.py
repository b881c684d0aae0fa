"""Policies for evaluation only: what they choose, and that what they choose is read and attended to."""

import dataclasses

import numpy as np
import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import StudentCard
from context_forcing.train.evaluation.choosers import (
    CHOOSERS,
    DIVERSITY,
    ChoosingCamera,
    candidates,
    last_chunk_mass,
    oracle,
    rag,
    tether,
)
from context_forcing.train.evaluation.rollout import Camera, branches
from context_forcing.train.world.camera import headings
from context_forcing.train.world.geometry import RING_COLUMNS
from context_forcing.train.world.prompts import ALL_STYLES
from context_forcing.train.world.scripts import benchmark_script
from context_forcing.video.pipeline import Pipeline

STYLE = ALL_STYLES[4]


@pytest.fixture(scope="module")
def pipeline(make_net, tmp_path_factory, save_student):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    card = StudentCard(base="demo", steps=(1000.0,), shift=3.0, memory=MemoryConfig(slow=4), size=(128, 64))
    save_student(path, make_net(0, text_dim=4096, text_len=512), card)
    return Pipeline.load(StudentSource(str(path)).open(), torch.device("cpu"), torch.float32)


def rolled(camera, moves):
    """The memory before every chunk as the student saw it, and the last one."""
    seen, memory = [], camera.pipeline.empty_memory(policy="fifo")
    generate = Camera.move

    def spy(self, memory, move):
        seen.append(memory)
        return generate(self, memory, move)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Camera, "move", spy)
        for move in moves:
            memory = camera.move(memory, move)
    return seen, memory


def apart(one, other):
    distance = (one - other) % RING_COLUMNS
    return min(distance, RING_COLUMNS - distance)


@pytest.mark.parametrize("columns", [9, 18])
def test_the_oracle_fills_the_slots_with_the_headings_of_the_coming_chunk(pipeline, columns):
    script = benchmark_script("dwell", 2, True, columns)
    seen, _ = rolled(ChoosingCamera(pipeline, STYLE, 1, oracle), script.moves)
    path = np.array(script.headings)
    for memory in seen[3:]:
        first = memory.num_frames
        nearest = {
            path[frame] % RING_COLUMNS: min(apart(path[frame], path[first + t]) for t in range(3))
            for frame in candidates(memory)
        }
        slow = memory.slots.slow
        held = [path[frame] % RING_COLUMNS for frame in slow]
        assert len(held) == len(set(held)) == min(4, len(nearest))
        assert sorted(nearest[heading] for heading in held) == sorted(nearest.values())[: len(held)]
        # Of each heading the oldest frame that is not sink.
        assert all(frame == min(f for f in candidates(memory) if path[f] == path[frame]) for frame in slow)
        assert memory.unread == ()
    back = seen[len(script.moves) - 1]
    assert script.target_heading in {path[frame] for frame in back.slots.slow}


def test_the_oracle_goes_around_the_ring(pipeline):
    """Nearness is on the ring: after a turn of all columns the start is near again."""
    moves = [1] * (RING_COLUMNS // 3)
    _, memory = rolled(Camera(pipeline, STYLE, 1), moves)
    path = headings([*moves, 1])
    coming = path[memory.num_frames :]
    chosen = oracle(ChoosingCamera(pipeline, STYLE, 1, oracle), memory, path)
    distance = {frame: min(apart(path[frame], heading) for heading in coming) for frame in candidates(memory)}
    assert sorted(distance[frame] for frame in chosen) == sorted(distance.values())[:4]
    assert min(chosen) < 6


@pytest.mark.parametrize("policy", CHOOSERS)
def test_branches_of_a_chooser_equal_separate_rollouts(pipeline, same_memory, policy):
    """Scripts part after a common beginning; the oracle knows of each only the coming chunk."""
    camera = ChoosingCamera(pipeline, STYLE, 3, CHOOSERS[policy])
    scripts = {kind: benchmark_script(kind, 4, False).moves for kind in ("dwell", "wander")}
    ends = dict(branches(camera, pipeline.empty_memory(policy="fifo"), scripts))
    for kind, moves in scripts.items():
        _, alone = rolled(ChoosingCamera(pipeline, STYLE, 3, CHOOSERS[policy]), moves)
        assert same_memory(ends[kind], alone), kind


def test_a_frame_that_was_read_has_the_keys_of_its_own_prompt(pipeline):
    """Keys of a frame that attends to nothing but its own chunk are those of its first pass."""
    camera = Camera(pipeline, STYLE, 0)
    memory = pipeline.empty_memory(policy="fifo", sink=0)
    memory = camera.move(memory, 1)
    expected = dict(memory.store.frame_kvs())[1].keys
    for _ in range(5):
        memory = camera.move(memory, 0)
    assert 1 not in memory.slots.all
    alone = memory.restrict_to(())
    read = dict(camera.hold(alone, [1]).store.frame_kvs())[1].keys
    assert torch.allclose(read, expected, atol=1e-5)


def test_rag_takes_the_frames_most_like_the_latest(pipeline):
    _, memory = rolled(Camera(pipeline, STYLE, 2), [0, 1, 1, 0, -1, -1])
    frames = torch.cat(memory.latent_chunks, 2)[0].movedim(1, 0).flatten(1)
    likeness = {f: float(torch.cosine_similarity(frames[f], frames[-1], dim=0)) for f in candidates(memory)}
    chosen = rag(ChoosingCamera(pipeline, STYLE, 2, rag), memory, np.zeros(0))
    assert set(chosen) == set(sorted(likeness, key=lambda frame: -likeness[frame])[:4])


def test_tether_keeps_the_best_of_what_is_held(pipeline):
    camera = ChoosingCamera(pipeline, STYLE, 5, tether)
    seen, memory = rolled(camera, [0, 1, 1, 0, -1, -1])
    assert all(len(each.slots.slow) <= 4 for each in seen)
    held = memory.slots.slow
    assert len(held) == 7
    shares = last_chunk_mass(camera.sampler(memory), memory)
    alone = dataclasses.replace(camera.sampler(memory), commit_attends="itself")
    assert last_chunk_mass(alone, memory) == shares
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4) and {*memory.slots.all} == {*shares}
    mass = {frame: shares[frame] / sum(shares[f] for f in held) for frame in held}
    span = 0.5 * (max(held) - min(held) + 1)
    score = {
        frame: mass[frame] + DIVERSITY * (1 - max(mass[f] * np.exp(-abs(f - frame) / span) for f in held if f != frame))
        for frame in held
    }
    assert set(tether(camera, memory, np.zeros(0))) == set(sorted(held, key=lambda f: -score[f])[:4])
