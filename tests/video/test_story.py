"""Stories: read as written, or refused by field, value and remedy."""

import dataclasses

import pytest

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.config import MEMORY_PRESETS
from context_forcing.model.codecs.demo_text import canonical_words, encode_demo_text, unknown_words
from context_forcing.model.config import StudentCard
from context_forcing.model.units import check_size
from context_forcing.video.story import MAX_SEED, ReferenceSpec, ResolvedSegment, SegmentSpec, load_story, parse_story

SEGMENT = {"prompt": "a meadow", "seconds": 3}


def refused(raw):
    with pytest.raises(ValueError) as caught:
        parse_story(raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    return str(caught.value)


def test_a_whole_story():
    story = parse_story(
        {"size": [128, 64], "fps": 24, "seed": 5, "segments": [SEGMENT, {"prompt": "", "seconds": 0.5, "seed": 9}]}
    )
    assert (story.size, story.fps, story.seed) == ((128, 64), 24, 5)
    assert story.segments == (SegmentSpec(prompt="a meadow", seconds=3.0), SegmentSpec(prompt="", seconds=0.5, seed=9))
    story = parse_story({"segments": [SEGMENT]})
    assert story.size is None and story.commit_attends is None
    assert parse_story({"segments": [SEGMENT], "commit_attends": "itself"}).commit_attends == "itself"


def test_references_are_files_beside_the_story(tmp_path):
    (tmp_path / "story.yaml").write_text(
        "references: [fox.png, {image: /far/place.png, prompt: a meadow}]\nsegments: [{prompt: a meadow, seconds: 3}]"
    )
    first, second = load_story(tmp_path / "story.yaml").references
    assert first == ReferenceSpec(image=str(tmp_path / "fox.png"))
    assert second == ReferenceSpec(image="/far/place.png", prompt="a meadow")
    assert parse_story({"segments": [SEGMENT]}).references == ()


def test_a_resolved_story_has_every_default(caplog):
    caplog.set_level("INFO", "context_forcing")
    card, memory = StudentCard(base="demo", fps=16, size=(48, 32)), empty_memory(MemoryConfig(), (16, 4, 6))
    story = parse_story({"seed": 5, "segments": [SEGMENT, {**SEGMENT, "seconds": 1, "seed": 9, "change": "cut"}]})
    resolved = story.resolve(card, memory)
    assert (resolved.size, resolved.fps, resolved.num_chunks) == ((48, 32), 16, 4 + 2)
    first, second = resolved.segments
    assert first == ResolvedSegment(prompt="a meadow", seconds=3, num_chunks=4, seed=5, change="keep", blend=0)
    assert (second.seconds, second.num_chunks, second.seed, second.change) == (1.5, 2, 9, "cut")
    assert caplog.messages == ["segments[1]: 1 s rounded up to 1.5 s, whole chunks of 0.75 s"]
    assert dataclasses.replace(story, fps=12).resolve(card, memory).segments[1].seconds == 1
    with pytest.raises(ValueError, match=r"size: the story has \[32, 48\], the memory \[48, 32\]"):
        dataclasses.replace(story, size=(32, 48)).resolve(card, memory)
    card = dataclasses.replace(card, commit_attends="no sink")
    assert resolved.commit_attends == "all" and story.resolve(card, memory).commit_attends == "no sink"
    assert dataclasses.replace(story, commit_attends="itself").resolve(card, memory).commit_attends == "itself"
    released = empty_memory(MEMORY_PRESETS["released"], (16, 4, 6))
    with pytest.raises(ValueError, match="change: cut"):
        story.resolve(card, released)


def test_with_seed_replaces_every_seed():
    story = parse_story({"seed": 5, "segments": [SEGMENT, {**SEGMENT, "seed": 9}]}).with_seed(7)
    assert story.seed == 7 and all(segment.seed is None for segment in story.segments)


@pytest.mark.parametrize(
    "raw, field, value",
    [
        (None, "story", "is empty"),
        ({"segments": [SEGMENT], "commit_attends": "sink"}, "commit_attends", "'sink' is not one of all, no sink"),
        ({"segments": [SEGMENT], "commit_attends": ["all"]}, "commit_attends", "['all']"),
        ({"segments": [SEGMENT], "commit_attends": None}, "commit_attends", "None"),
        ([SEGMENT], "story", "mapping"),
        ("text", "story", "text"),
        ({}, "segments", "at least one"),
        ({"segments": []}, "segments", "at least one"),
        ({"segments": None}, "segments", "at least one"),
        ({"segments": SEGMENT}, "segments", "list"),
        ({"segments": [SEGMENT], "length": 3}, "story", "length"),
        ({"segments": [SEGMENT], 3: 3}, "story", "3"),
        ({"segments": [SEGMENT, "a meadow"]}, "segments[1]", "a meadow"),
        ({"segments": [SEGMENT, {"prompt": "x"}]}, "segments[1].seconds", "missing"),
        ({"segments": [{"seconds": 1}]}, "segments[0].prompt", "missing"),
        ({"segments": [{**SEGMENT, "second": 3}]}, "segments[0]", "second"),
        ({"segments": [{**SEGMENT, "prompt": 5}]}, "segments[0].prompt", "5"),
        ({"segments": [{**SEGMENT, "prompt": None}]}, "segments[0].prompt", "None"),
        ({"segments": [{**SEGMENT, "seconds": 0}]}, "segments[0].seconds", "0"),
        ({"segments": [{**SEGMENT, "seconds": -2}]}, "segments[0].seconds", "-2"),
        ({"segments": [{**SEGMENT, "seconds": "3"}]}, "segments[0].seconds", "'3'"),
        ({"segments": [{**SEGMENT, "seconds": True}]}, "segments[0].seconds", "True"),
        ({"segments": [{**SEGMENT, "seconds": float("nan")}]}, "segments[0].seconds", "nan"),
        ({"segments": [{**SEGMENT, "seconds": float("inf")}]}, "segments[0].seconds", "inf"),
        ({"segments": [{**SEGMENT, "seed": -1}]}, "segments[0].seed", "-1"),
        ({"segments": [SEGMENT], "seed": 1.5}, "seed", "1.5"),
        ({"segments": [SEGMENT], "seed": MAX_SEED + 1}, "seed", str(MAX_SEED + 1)),
        ({"segments": [SEGMENT], "references": "fox.png"}, "references", "'fox.png' is not a list"),
        ({"segments": [SEGMENT], "references": [3]}, "references[0]", "3"),
        ({"segments": [SEGMENT], "references": ["a", {"prompt": "x"}]}, "references[1].image", "missing"),
        ({"segments": [SEGMENT], "references": [{"image": "a", "text": "x"}]}, "references[0].text", "unknown"),
        ({"segments": [SEGMENT], "references": [{"image": "a", "prompt": None}]}, "references[0].prompt", "None"),
        ({"segments": [SEGMENT], "fps": 0}, "fps", "0"),
        ({"segments": [SEGMENT], "fps": "16"}, "fps", "'16'"),
        ({"segments": [SEGMENT], "fps": None}, "fps", "None"),
        ({"segments": [SEGMENT], "size": [130, 64]}, "size", "130"),
        ({"segments": [SEGMENT], "size": [128, 63]}, "size", "63"),
        ({"segments": [SEGMENT], "size": [0, 64]}, "size", "0"),
        ({"segments": [SEGMENT], "size": [128, -64]}, "size", "-64"),
        ({"segments": [SEGMENT], "size": [128]}, "size", "[128]"),
        ({"segments": [SEGMENT], "size": "128x64"}, "size", "128x64"),
        ({"segments": [SEGMENT], "size": [128.0, 64]}, "size", "128.0"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_stories(raw, field, value):
    message = refused(raw)
    assert message.startswith(field) and value in message


def test_the_nearest_size_is_named():
    with pytest.raises(ValueError, match="width 130 .* 128 is the nearest"):
        check_size(130, 64)
    with pytest.raises(ValueError, match="height 3 .* 16 is the nearest"):
        check_size(128, 3)
    check_size(832, 480)


@pytest.mark.parametrize(
    "content",
    [b"segments: [", b"a: b: c", b"\xff\xfe\x00\xd8", b"\t- x", b"!!python/object:os.system {}", b"", b"5", b"\x00"],
    ids=repr,
)
def test_not_yaml(tmp_path, content):
    path = tmp_path / "story.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_story(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_an_impossible_date(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_text("segments: [{prompt: 2024-99-99, seconds: 3}]")
    with pytest.raises(ValueError) as caught:
        load_story(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_unreadable(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read"):
        load_story(tmp_path / name)


def test_prompts_that_name_the_same_concepts_are_the_same():
    import torch

    a = encode_demo_text("A sunny MEADOW by day. The camera pans left.")
    b = encode_demo_text("the camera is panning leftwards; daylight, clear, grassland")
    assert torch.equal(a, b) and a.shape == (1, 512, 4096)
    assert not torch.equal(a, encode_demo_text("A sunny meadow by day. The camera pans right."))
    assert a.ne(0).any(-1).sum() == 5
    assert not encode_demo_text("").any()
    assert canonical_words("dunes, dunes!") == ["desert", "desert"]
    assert unknown_words("a dragon over the meadow, a dragon") == ["dragon"]


def aliases(first, each, num):
    """A story whose prompt is a list; its n-th element names the one before ten times."""
    lines = [f"&a0 {first}", *(f"&a{n} {each % ', '.join([f'*a{n - 1}'] * 10)}" for n in range(1, num))]
    return f"segments: [{{prompt: [{', '.join(lines)}], seconds: 3}}]"


HOSTILE = {
    "aliases": (aliases("[x, x]", "[%s]", 9), "aliases expanded"),
    "merged aliases": (aliases("{x: 1}", "{<<: [%s]}", 9), "aliases expanded"),
    "a few aliases": (aliases("[x, x]", "[%s]", 4), "prompt: [["),
    "an alias of itself": ("segments: [{prompt: &a [*a], seconds: 3}]", "prompt: [[["),
    "no bool": ("segments: [{prompt: !!bool x, seconds: 3}]", "fit its tag"),
    "no timestamp": ("segments: [{prompt: !!timestamp x, seconds: 3}]", "fit its tag"),
    "no int": ('segments: [{prompt: a, seconds: !!int ""}]', "fit its tag"),
    "an object": ("segments: [{prompt: !!python/object/apply:os.getcwd [], seconds: 3}]", "could not determine"),
    "deep lists": ("segments: " + "[" * 600 + "]" * 600, "inside each other"),
    "deep mappings": ("segments: " + "{a: " * 600 + "}" * 600, "inside each other"),
    "400 digits": (f"segments: [{{prompt: a, seconds: {'9' * 400}}}]", "segments[0].seconds: a number of 1329 bits"),
    "5000 digits": (f"segments: [{{prompt: a, seconds: {'9' * 5000}}}]", "4300 digits"),
    "a year": ("segments: [{prompt: a, seconds: 31536000}]", "below 3e+07"),
    "a huge frame": ("size: [32768, 32768]\nsegments: [{prompt: a, seconds: 3}]", "size: 32768x32768 is more than"),
    "a long key": (f"? {'k' * 5000}\n: 1", "unknown key"),
    "a long word": (f"segments: [{{prompt: a, seconds: 3, change: {'c' * 5000}}}]", "is not one of keep"),
}  # fmt: skip


@pytest.mark.parametrize("text, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_one_short_line(tmp_path, text, words):
    path = tmp_path / "story.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_story(path)
    message = str(caught.value).removeprefix(f"{path}: ")
    assert words in message and "\n" not in message and len(message) <= 250


def test_aliases_of_a_few_values_are_allowed(tmp_path):
    segment = "{prompt: a meadow, seconds: 3}"
    (tmp_path / "story.yaml").write_text(f"segments: [&a {segment}, *a, {{<<: *a, seed: 9}}]")
    first, second, third = load_story(tmp_path / "story.yaml").segments
    assert first == second == dataclasses.replace(third, seed=None) and third.seed == 9
