"""The report says what is so, and can be drawn at any time."""

import numpy as np
import pytest
import torch

from context_forcing.memory import Memory, MemoryConfig
from context_forcing.memory.report import COLOURS, MARGIN, WIDTH, draw_report, fates, reach_seconds, summary

A_FRAME = 2 * 2 * 6 * 4 * 8 * 4  # keys and values, 2 layers, 6 tokens, 4 x 8 elements, float32


def filled(num_chunks, **settings):
    """A memory whose frames all look different (they are random), so that slow fills at once."""
    memory = Memory(config=MemoryConfig(**settings), latent_size=(16, 4, 6)).begin("a meadow", 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_chunks):
        kept = [tuple(torch.randn(2, 1, 3, 6, 4, 8, generator=generator)) for _ in range(2)]
        memory = memory.append(torch.zeros(1, 16, 3, 4, 6), kept)
    return memory


def pictures(memory):
    return np.full((len(memory.slots.all), 32, 48, 3), 90, np.uint8)


@pytest.mark.parametrize("policy", ["novel", "clean", "fifo", "uniform"])
@pytest.mark.parametrize("num_chunks", [0, 1, 2, 9, 40])
def test_draws(policy, num_chunks):
    memory = filled(num_chunks, policy=policy)
    image = draw_report(memory, pictures(memory), fps=16)
    assert image.width == WIDTH and len(image.getcolors(10**6)) > 3


def test_draws_without_slow_memory_or_sink():
    memory = filled(4, slow=0, sink=0, fast=3)
    image = draw_report(memory, np.zeros((0, 1, 1, 3), np.uint8), fps=16)
    assert image.width == WIDTH


def test_the_timeline_shows_the_fates():
    memory = filled(40)
    image = draw_report(memory, pictures(memory), fps=16)
    a_frame = (WIDTH - 2 * MARGIN) / memory.num_frames
    for frame, fate in enumerate(fates(memory)):
        assert image.getpixel((round(MARGIN + (frame + 0.5) * a_frame), 160)) == COLOURS[fate], frame


def test_fates():
    memory = filled(10, slow=4)
    # 30 frames: 3 sink, 3 fast, of the 24 that left fast the last 4 are slow; nothing alike, so all were promoted.
    assert fates(memory) == ["sink"] * 3 + ["was slow"] * 20 + ["slow"] * 4 + ["fast"] * 3
    assert fates(filled(10, slow=0)) == ["sink"] * 3 + ["not kept"] * 24 + ["fast"] * 3
    assert fates(filled(0)) == []


def test_fates_of_a_stride():
    memory = filled(10, policy="uniform", uniform_stride=6, slow=2)
    promoted = {frame: "was slow" for frame in (6, 12)} | {frame: "slow" for frame in (18, 24)}
    assert fates(memory) == (["sink"] * 3 + [promoted.get(frame, "not kept") for frame in range(3, 27)] + ["fast"] * 3)


def test_summary_figures():
    memory = filled(20, slow=4)
    first, second, third = summary(memory, fps=16).splitlines()
    assert first == "60 latent frames (15.0 s), memory reaches back 1.5 s"
    assert second == f"sink 3 of 3, slow 4 of 4, fast 3 (+ 3 being made) of 6; {10 * A_FRAME / 1e6:.1f} MB"
    assert third == "policy novel, threshold 0.95, 100% of the frames that left fast were kept"


def test_summary_of_nothing():
    first, second, third = summary(filled(0, policy="fifo"), fps=16).splitlines()
    assert first == "0 latent frames (0.0 s), memory reaches back 0.0 s"
    assert second.startswith("sink 0 of 3, slow 0 of 12, fast 0")
    assert third == "policy fifo"


def test_reach_is_the_age_of_the_oldest_frame_outside_the_sink():
    memory = filled(20, slow=4)
    assert min(memory.slots.slow) == 53
    assert reach_seconds(memory, fps=16) == (59 - 53) * 4 / 16
    assert reach_seconds(memory, fps=24) == pytest.approx((59 - 53) * 4 / 24)
    assert reach_seconds(filled(1), fps=16) == 0
