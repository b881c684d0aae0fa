"""Storyboards: read as written, or refused line by line; times on the grid of chunks without drift."""

import random
from pathlib import Path

import pytest

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.fields import MAX_MESSAGE
from context_forcing.memory.memory import CHANGES
from context_forcing.model.codecs.demo_text import unknown_words
from context_forcing.model.config import StudentCard
from context_forcing.model.sampler import chunks_for
from context_forcing.model.units import latent_seconds
from context_forcing.video.story import MAX_BLEND, MAX_SEED, SegmentSpec, load_story
from context_forcing.video.storyboard import StoryboardLine, chunk_story, parse_storyboard, read_story, write_storyboard

TEXT = """
# a comment

0:00 A meadow. The camera pans right.
  0:06 [recache blend=2]   A meadow at dusk: 3 [sic] birds # and a hash
12.5[seed=7 cut]\u00a0A desert.\r
0:20
"""


def refused(text, fps=16, chunk=3):
    with pytest.raises(ValueError) as caught:
        chunk_story(parse_storyboard(text), fps, chunk)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines_of(text):
    option = lambda line, name: getattr(SegmentSpec(prompt="", seconds=1, **line.options), name)
    return [
        (line.begins, line.prompt, *(option(line, name) for name in ("change", "blend", "seed")))
        for line in parse_storyboard(text).lines
    ]


def test_a_whole_storyboard():
    assert lines_of(TEXT) == [
        (0, "A meadow. The camera pans right.", "keep", 0, None),
        (6, "A meadow at dusk: 3 [sic] birds # and a hash", "recache", 2, None),
        (12.5, "A desert.", "cut", 0, 7),
    ]
    assert parse_storyboard(TEXT).ends == 20
    story = chunk_story(parse_storyboard(TEXT), fps=16, chunk=3, seed=5)
    # 12.5 s is 16.67 chunks, 20 s is 26.67.
    assert [segment.seconds for segment in story.segments] == [8 * 0.75, 9 * 0.75, 10 * 0.75]
    assert story.segments[2] == SegmentSpec(prompt="A desert.", seconds=7.5, seed=7, change="cut")
    assert story.seed == 5 and story.size is None and story.fps is None


@pytest.mark.parametrize(
    "written, seconds",
    [("6", 6), ("6.25", 6.25), ("75", 75), ("0:06", 6), ("00:06", 6), ("1:15.5", 75.5), ("90:00", 5400)]
    + [("1:02:03", 3723), ("1:02:03.5", 3723.5), ("000:00:06", 6), ("1e3", None), ("0:6", None), ("0:60", None)]
    + [("1:60:00", None), ("1:2:03", None), ("0:006", None), ("1:2:3:4", None), (".5", None), ("6.", None)]
    + [(":06", None), ("0:", None), ("0::06", None), ("1.5:00", None), ("-3", None), ("6s", None), ("12,5", None)]
    + [("9" * 400, None), ("9" * 400 + ":00", None)],
)
def test_times(written, seconds):
    text = f"0:00 A meadow.\n{written} A desert.\n2000000"
    if seconds is None:
        assert refused(text).startswith(f'line 2 ("{written[:47]}')
    else:
        assert [begins for begins, *_ in lines_of(text)] == [0, seconds]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "options, blend, seed",
    [("{}", 0, None), ("{} blend=3", 3, None), ("seed=4  {}", 0, 4), (" blend=1000 seed=0 {} ", 1000, 0)],
)
def test_every_mode_in_any_order(change, options, blend, seed):
    ((*_, change_read, blend_read, seed_read),) = lines_of(f"0 [{options.format(change)}] A meadow.\n3")
    assert (change_read, blend_read, seed_read) == (change, blend, seed)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("A meadow.", ["it must begin with a time", "0:06"]),
        ("[cut] 0:06 A meadow.", ["it must begin with a time"]),
        ("0:06A meadow.", ["it must begin with a time"]),
        ("0:75 A meadow.", ["0:75 is not a time", "two digits below 60 follow"]),
        ("1:2 A meadow.", ["1:2 is not a time", "two digits below 60 follow"]),
        ("1..2 A meadow.", ["1..2 is not a time", "12.5"]),
        ("30000000 A meadow.", ["30000000 is too late"]),
        ("0:06 [wipe] A meadow.", ["[wipe] is not known", "keep, recache, flush", "seed=N and blend=N"]),
        ("0:06 [cut, seed=3] A meadow.", ["[cut,] is not known"]),
        ("0:06 [seed=-1] A meadow.", ["[seed=-1] is not known"]),
        ("0:06 [cut flush] A meadow.", ["[flush] is the second change"]),
        ("0:06 [cut cut] A meadow.", ["[cut] is the second change"]),
        ("0:06 [seed=1 seed=1] A meadow.", ["[seed=1] is the second seed"]),
        (f"0:06 [seed={MAX_SEED + 1}] A meadow.", [f"seed is at most {MAX_SEED}"]),
        (f"0:06 [blend={MAX_BLEND + 1}] A meadow.", [f"blend is at most {MAX_BLEND}"]),
        ("0:06 [cut A meadow.", ["the bracket is not closed"]),
        ("0:06", ["the prompt is missing", "only the last line has none"]),
        ("0:06 [cut]", ["the prompt is missing"]),
        ("0:03 A meadow.", ["times must rise", "begins at 0:03"]),
        ("0:02 A meadow.", ["times must rise", "begins at 0:03"]),
    ],
)
def test_a_line_that_is_wrong_is_named(line, expected):
    message = refused(f"# comment\n0:00 A meadow.\n\n0:03 A meadow.\n{line}\n0:10")
    assert message.startswith("line 5 (") and message.count("line 5 ") == 1 and "line 6" not in message
    assert all(words in message for words in expected), message


def test_the_first_time_is_zero():
    assert refused("0:01 A meadow.\n0:06") == 'line 1 ("0:01 A meadow."): the first time must be 0:00'


def test_a_missing_end_is_asked_for():
    message = refused("0:00 A meadow.\n1:57 A desert.")
    assert message == 'line 2 ("1:57 A desert."): the end is missing; add a last line with only a time, like 2:03'


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "0:00", "\ufeff"])
def test_no_prompt(text):
    assert refused(text).startswith("storyboard: no prompt; write a line per segment")


@pytest.mark.parametrize("length, named", [(80, 2), (1, 4)])
def test_as_many_lines_are_named_as_fit(length, named):
    bad = "\n".join(["0:00 A meadow.", *["x" * length] * 7, "0:20"])
    message = refused(bad)
    assert [f"line {number} " in message for number in range(1, 9)] == [False, *[True] * named, *[False] * (7 - named)]
    assert message.endswith(f"; and {7 - named} more") and "x" * 48 not in message and len(message) <= MAX_MESSAGE
    assert refused(bad.replace("x" * length, "x" * 80)).count("x" * 47 + '..."') == 2
    assert refused("0:00 A meadow.\nx\n0:06 [wipe] y\n0:20").count("line") == 2


def test_a_segment_without_a_chunk_is_named():
    text = "0:00 A meadow.\n0:03 A desert.\n0:03.3 Snow.\n0:06"
    assert refused(text) == ('line 2 ("0:03 A desert."): 0.3 s is too short for a whole chunk (0.75 s); make it longer')
    assert len(chunk_story(parse_storyboard(text), fps=64, chunk=3).segments) == 3


@pytest.mark.parametrize("fps, chunk", [(16, 3), (24, 3), (30, 1), (23.976, 3), (12.5, 4), (7, 5)])
def test_rounding_does_not_drift(fps, chunk):
    random.seed(fps)
    piece = latent_seconds(chunk, fps)
    for _ in range(200):
        times, time = [0.0], 0.0
        for _ in range(random.randint(1, 60)):
            time = round(time + piece * random.uniform(1.001, 6), 3)
            times.append(time)
        text = "\n".join(f"{time} prompt {i}" for i, time in enumerate(times[:-1])) + f"\n{times[-1]}"
        story = chunk_story(parse_storyboard(text), fps, chunk)
        counts = [chunks_for(segment.seconds, fps, chunk) for segment in story.segments]
        assert [segment.prompt for segment in story.segments] == [f"prompt {i}" for i in range(len(times) - 1)]
        for i, time in enumerate(times):
            assert abs(sum(counts[:i]) * piece - time) <= piece / 2 + 1e-5
        assert all(abs(segment.seconds - count * piece) < 1e-9 for segment, count in zip(story.segments, counts))


def test_half_chunks_go_up():
    """To the even neighbour, as round() does, a line of 0.75 s steps that begins at half a chunk would lose one."""
    text = "0 a\n0.375 b\n1.125 c\n1.875"
    assert [segment.seconds / 0.75 for segment in chunk_story(parse_storyboard(text), 16, 3).segments] == [1, 1, 1]


def test_what_is_written_is_read_again():
    random.seed(3)
    for fps, chunk in ((16, 3), (24, 2), (30, 3)):
        piece = latent_seconds(chunk, fps)
        for _ in range(100):
            lines, time = [], 0
            for _ in range(random.randint(1, 20)):
                options = [random.choice(CHANGES)] + [f"seed={random.randint(0, 9)}"] * random.randint(0, 1)
                options += [f"blend={random.randint(0, 9)}"] * random.randint(0, 1)
                random.shuffle(options)
                prompt = random.choice(["A meadow.", "[sic] a desert", "3 birds", "0:05 [cut] snow"])
                lines.append(f"{time * piece:.6f} [{' '.join(options)}] {prompt}")
                time += random.randint(1, 200)
            story = chunk_story(parse_storyboard("\n".join([*lines, f"{time * piece:.6f}"])), fps, chunk)
            assert chunk_story(parse_storyboard(write_storyboard(story)), fps, chunk) == story
    assert write_storyboard(chunk_story(parse_storyboard(TEXT), 16, 3)).split("\n")[2:] == [
        "0:12.75 [cut seed=7] A desert.",
        "0:20.25",
    ]


def test_files(tmp_path):
    board, story = tmp_path / "story.TXT", tmp_path / "story.yaml"
    board.write_text("\ufeff0:00 A meadow.\n0:02", encoding="utf-8")
    story.write_text("segments: [{prompt: A meadow., seconds: 2.25}]")
    assert read_story(board, 16, 3) == read_story(str(story), 16, 3) == load_story(story)


@pytest.mark.parametrize(
    "content, expected",
    [(b"0:00 A meadow.", "the end is missing"), (b"\xff\xfe\x00\xd8", "not UTF-8"), (b"", "no prompt"), (None, "read")],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "story.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_story(path, 16, 3)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_sample():
    story = read_story(Path(__file__).parents[2] / "workflows" / "stories" / "storyboard.txt", 16, 3)
    assert (
        len(story.segments) == 8
        and story.resolve(StudentCard(base="demo"), empty_memory(MemoryConfig(), (16, 8, 16))).num_chunks == 40
    )
    assert not any(unknown_words(segment.prompt) for segment in story.segments)


def test_a_line_has_its_number_and_text():
    first = parse_storyboard(TEXT).lines[0]
    assert first == StoryboardLine(
        number=4, name='line 4 ("0:00 A meadow. The camera pans right.")', begins=0, prompt=first.prompt, options={}
    )
