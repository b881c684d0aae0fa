"""The report says what is so, and can be drawn at any time."""

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.history import forgotten_frames, frame_status, reach_frames
from context_forcing.memory.references import Reference
from context_forcing.memory.stores import FrameKV
from context_forcing.video.report import COLOURS, draw_report, per_part, summary
from context_forcing.video.sheet import LEFT, MARGIN, RIGHT, WIDTH, at_time, shortened

A_FRAME = 2 * 2 * 6 * 4 * 8 * 4  # keys and values, 2 layers, 6 tokens, 4 x 8 elements, float32


def filled(num_chunks, **settings):
    """A memory whose frames all look different (they are random), so that slow fills at once."""
    memory = empty_memory(MemoryConfig(**settings), (16, 4, 6)).begin("a meadow", 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_chunks):
        kept = [FrameKV(*torch.randn(2, 2, 1, 6, 4, 8, generator=generator)) for _ in range(3)]
        memory = memory.append(torch.zeros(1, 16, 3, 4, 6), kept)
    return memory


def pictures(memory):
    return np.full((len(memory.slots.all), 32, 48, 3), 90, np.uint8)


@pytest.fixture
def written(monkeypatch):
    """Every piece of text that is drawn, with the box it fills."""
    boxes, real = [], ImageDraw.ImageDraw.text

    def note(draw, at, text, fill=None, font=None, anchor=None):
        boxes.append((text, draw.textbbox(at, text, font, anchor)))
        real(draw, at, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return boxes


def words(written):
    return " | ".join(text for text, _ in written)


@pytest.mark.parametrize("policy", ["novel", "cover", "clean", "fifo", "uniform"])
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
    memory = memory_of("keep", "flush", "cut", "cut_new_sink")
    image = np.asarray(draw_report(memory, pictures(memory), fps=16))
    a_frame = (RIGHT - LEFT) / memory.num_frames
    columns = [round(LEFT + (frame + 0.5) * a_frame) for frame in range(memory.num_frames)]
    expected = [COLOURS[fate] for fate in frame_status(memory)]
    assert {"sink", "slow", "fast", "was slow", "forgotten"} <= set(frame_status(memory))
    assert any((row[columns] == expected).all() for row in image)


def segments_of(changes, chunks, memory=None):
    memory = memory or empty_memory(MemoryConfig(slow=4), (16, 4, 6))
    generator = torch.Generator().manual_seed(1)
    for number, change in enumerate(changes):
        memory = memory.begin(f"scene {number}", 7, change=change)
        for _ in range(chunks):
            kept = [FrameKV(*torch.randn(2, 2, 1, 6, 4, 8, generator=generator)) for _ in range(3)]
            memory = memory.append(torch.zeros(1, 16, 3, 4, 6), kept)
    return memory


def memory_of(*changes, chunks=5):
    """A segment of chunks a change; all frames look different."""
    return segments_of(changes, chunks)


@pytest.mark.parametrize("change", ["flush", "cut", "cut_new_sink"])
def test_what_a_change_takes_is_told_from_what_the_policy_let_go(change):
    before = memory_of("keep")
    memory = segments_of([change], 5, before)
    survivors = before.begin("", 7, change=change).slots.all
    lost = [frame for frame in before.slots.all if frame not in survivors]
    assert lost and [frame for frame, fate in enumerate(frame_status(memory)) if fate == "forgotten"] == sorted(lost)
    assert set(forgotten_frames(memory).values()) == {memory.segments[-1]}
    assert f"forgotten: {len(lost)} frames by the {change} at 3.75 s" in summary(memory, fps=16)


def test_every_forgotten_frame_goes_to_the_change_that_took_it():
    """Against the slots as they were before and after each change."""
    memory, lost = memory_of("keep"), {}
    for change in ("flush", "cut", "keep", "flush", "cut_new_sink", "recache", "cut", "flush"):
        begun = memory.begin("", 7, change=change)
        lost |= {frame: begun.segments[-1] for frame in memory.slots.all if frame not in begun.slots.all}
        memory = segments_of([change], 3, memory)
        # The names are those of segments_of; places and changes are what is compared.
    places = lambda taken: {frame: (segment.first_frame, segment.change) for frame, segment in taken.items()}
    assert places(forgotten_frames(memory)) == places(lost)


def test_many_changes_are_summed_up():
    memory = memory_of("keep", *["cut"] * 40, chunks=2)
    (line,) = [line for line in summary(memory, 16).splitlines() if line.startswith("forgotten")]
    assert line == f"forgotten: {len(forgotten_frames(memory))} frames by 40 flushes and cuts"


def test_keep_and_recache_forget_nothing():
    memory = memory_of("keep", "recache", "keep")
    assert not forgotten_frames(memory) and "forgotten" not in frame_status(memory)


def test_the_picture_says_what_happened(written):
    memory = memory_of("keep", "recache", "cut")
    draw_report(memory, pictures(memory), fps=16)
    text = words(written)
    for expected in ("1 | ", "2 recache", "3 cut", "scene 0", "scene 1", "scene 2", "the memory reaches back 1.5 s"):
        assert expected in text, expected
    taken = len(forgotten_frames(memory))
    assert f"cut, {taken} forgotten" in text and "forgotten at a flush or cut" in text and "not kept" in text


def test_a_segment_that_goes_on_as_before_is_no_boundary(written):
    memory = memory_of("keep")
    parted = memory
    for _ in range(2):
        parted = parted.begin("scene 0", 7)
    for each in (memory, parted):
        written.clear()
        draw_report(each, pictures(each), fps=16)
        assert sum(text == "scene 0" for text, _ in written) == 1


@pytest.mark.parametrize("num_segments, chunks", [(1, 13), (2, 1), (16, 10), (60, 1), (160, 1)])
def test_no_text_lies_on_another(written, num_segments, chunks):
    """10 s to 2 minutes, segments of a single chunk among them."""
    changes = ["keep", "recache", "flush", "cut", "cut_new_sink"]
    memory = memory_of(*(changes[number % 5] for number in range(num_segments)), chunks=chunks)
    share = [1 / (len(memory.slots.all) + 3)] * (len(memory.slots.all) + 3)
    image = draw_report(memory, pictures(memory), 16, {1.0: share, 0.5: share})
    for number, (text, (left, top, right, bottom)) in enumerate(written):
        assert 0 <= left and right <= image.width and 0 <= top and bottom <= image.height, text
        for other, (a, b, c, d) in written[:number]:
            assert right <= a or c <= left or bottom <= b or d <= top, (text, other)


def test_long_prompts_are_cut_short(written):
    memory = empty_memory(MemoryConfig(), (16, 4, 6)).begin("a meadow " * 100, 7)
    draw_report(memory, pictures(memory), fps=16)
    ((_, box),) = [each for each in written if each[0].startswith("a meadow")]
    assert box[2] <= WIDTH - MARGIN


def test_attention_is_shown_per_part_and_per_frame(written):
    memory = filled(20, slow=4)
    share = [0.02] * 3 + [0.1] * 4 + [0.05] * 3 + [0.13] * 3
    per = per_part(memory, share)
    assert list(per) == ["sink", "slow", "fast", "the chunk itself"]
    assert list(per.values()) == pytest.approx([0.06, 0.4, 0.15, 0.39])
    image = draw_report(memory, pictures(memory), 16, {0.9: share})
    text = words(written)
    for expected in ("noise 0.90", "sink 6.0%", "slow 40.0%", "fast 15.0%", "the chunk 39.0%", "mean over layers"):
        assert expected in text, expected
    assert text.count("10.0%") == 4, "under the slow frames"
    plain = draw_report(memory, pictures(memory), 16)
    assert plain.height < image.height
    last = summary(memory, 16, {0.9: share}).splitlines()[-1]
    assert last.endswith("noise levels: sink 6.0%, slow 40.0%, fast 15.0%, the chunk itself 39.0%")


def with_references(*changes):
    pinned = [Reference(latents=torch.zeros(1, 16, 1, 4, 6), prompt=prompt) for prompt in ("a fox " * 40, "")]
    memory = empty_memory(MemoryConfig(slow=4), (16, 4, 6)).with_references(pinned)
    kept = [FrameKV(*(torch.zeros(2, 1, 6, 4, 8),) * 2) for _ in pinned]
    return segments_of(changes, 5, memory.write((-2, -1), kept))


def test_references_have_their_own_status(written):
    memory = with_references("keep")
    assert frame_status(memory) == ["sink"] + ["was slow"] * 7 + ["slow"] * 4 + ["fast"] * 3
    assert "sink 3 of 3 (2 references), slow 4 of 4" in summary(memory, 16)
    share = [0.05, 0.1, 0.02, *[0.05] * 4, *[0.1] * 3, *[0.11] * 3]
    parts = per_part(memory, share)
    assert list(parts) == ["reference", "sink", "slow", "fast", "the chunk itself"]
    assert list(parts.values()) == pytest.approx([0.15, 0.02, 0.2, 0.3, 0.33])
    image = np.asarray(draw_report(memory, pictures(memory), 16, {0.9: share}))
    assert (image == COLOURS["reference"]).all(-1).sum() > 1000
    text = words(written)
    for expected in ("reference 1 5.0% a fox a fox", "reference 2 10.0%", "reference 15.0%", "not in the video"):
        assert expected in text, expected
    for number, (text, (left, top, right, bottom)) in enumerate(written):
        assert 0 <= left and right <= WIDTH, text
        for other, (a, b, c, d) in written[:number]:
            assert right <= a or c <= left or bottom <= b or d <= top, (text, other)


def test_without_references_nothing_is_said_of_them(written):
    memory = memory_of("keep")
    image = np.asarray(draw_report(memory, pictures(memory), fps=16))
    assert "reference" not in words(written) + summary(memory, 16)
    assert not (image == COLOURS["reference"]).all(-1).any()


@pytest.mark.parametrize("change", ["flush", "cut", "cut_new_sink"])
def test_what_a_change_takes_beside_references(change):
    before = with_references("keep")
    memory = segments_of([change], 5, before)
    survivors = before.begin("", 7, change=change).slots.all
    lost = sorted(frame for frame in before.slots.all if frame not in survivors)
    assert lost and min(lost) >= 0 and sorted(forgotten_frames(memory)) == lost


def test_without_a_codec_no_frames_are_drawn(written):
    memory = filled(9)
    assert draw_report(memory, None, 16).height < draw_report(memory, pictures(memory), 16).height
    assert "The remembered frames are not drawn." in words(written)


def test_fates():
    memory = filled(10, slow=4)
    # 30 frames: 3 sink, 3 fast, of the 24 that left fast the last 4 are slow; nothing alike, so all were promoted.
    assert frame_status(memory) == ["sink"] * 3 + ["was slow"] * 20 + ["slow"] * 4 + ["fast"] * 3
    assert frame_status(filled(10, slow=0)) == ["sink"] * 3 + ["not kept"] * 24 + ["fast"] * 3
    assert frame_status(filled(0)) == []


def test_fates_of_a_stride():
    memory = filled(10, policy="uniform", uniform_stride=6, slow=2)
    promoted = dict.fromkeys((6, 12), "was slow") | dict.fromkeys((18, 24), "slow")
    assert frame_status(memory) == (
        ["sink"] * 3 + [promoted.get(frame, "not kept") for frame in range(3, 27)] + ["fast"] * 3
    )


def test_summary_figures():
    memory = filled(20, slow=4)
    first, second, third = summary(memory, fps=16).splitlines()
    assert first == "60 latent frames (15 s), memory reaches back 1.5 s"
    assert second == f"sink 3 of 3, slow 4 of 4, fast 3 of 6 (the next chunk is 3); {10 * A_FRAME / 1e6:.1f} MB"
    assert (
        third
        == "policy novel, threshold 0.95, 100% of the frames that left fast were kept, the latest of them from 14 s"
    )


def test_summary_of_nothing():
    first, second, third = summary(filled(0, policy="fifo"), fps=16).splitlines()
    assert first == "0 latent frames (0 s), memory reaches back 0 s"
    assert second.startswith("sink 0 of 3, slow 0 of 12, fast 0")
    assert third == "policy fifo"


def test_summary_of_a_scene_that_stands_still():
    memory = empty_memory(MemoryConfig(), (16, 4, 6)).begin("a meadow", 7)
    for _ in range(9):
        kept = [FrameKV(*(torch.ones(1, 1, 6, 4, 8),) * 2) for _ in range(3)]
        memory = memory.append(torch.zeros(1, 16, 3, 4, 6), kept)
    assert summary(memory, fps=16).endswith("none of the frames that left fast was kept")
    assert frame_status(memory) == ["sink"] * 3 + ["not kept"] * 21 + ["fast"] * 3


@pytest.mark.parametrize(
    "seconds, whole, text",
    [
        (7.5, 10, "7.5 s"),
        (0, 10, "0 s"),
        (67.5, 120, "1:07.5"),
        (60, 120, "1:00"),
        (59.999, 120, "1:00"),
        (3601, 7200, "60:01"),
    ],
)
def test_times(seconds, whole, text):
    assert at_time(seconds, whole) == text


def test_shortened():
    assert shortened("a  line\nof words", 500, 13) == "a line of words"
    assert shortened("a line of words", 40, 13).endswith("...") and shortened("a line", 0, 13) == "..."


def test_reach_is_the_age_of_the_oldest_frame_outside_the_sink():
    memory = filled(20, slow=4)
    assert min(memory.slots.slow) == 53
    assert reach_frames(memory) == 59 - 53 and reach_frames(filled(1)) == 0
    assert "memory reaches back 1.5 s" in summary(memory, fps=16) and "reaches back 1 s" in summary(memory, fps=24)
