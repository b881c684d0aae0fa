"""Storyboards: timed prompts in plain text, one line per segment.

    # comments and empty lines are ignored
    0:00 A meadow under a clear sky by day. The camera pans right.
    0:06 [recache blend=2] A meadow at dusk. The camera stays.
    12.5 [cut seed=7] A desert. The camera pans left.
    0:20

Times are m:ss, h:mm:ss or seconds, optionally with a fraction. The last line is the time at which the video ends.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..memory.fields import MAX_MESSAGE, brief
from ..model.sampler import MAX_SECONDS
from ..model.units import latent_seconds
from .story import CHANGES, MAX_BLEND, MAX_SEED, SegmentSpec, Story, load_story

ROOM = 20
"""Characters of a message for the number of wrong lines that it does not name."""
MAX_TEXT = 50
"""Characters of a line that a message quotes."""

LINE = re.compile(r"(?P<time>[0-9:.]+)(?=[\s\[]|$)\s*(?:\[(?P<options>[^\]]*)\])?\s*(?P<prompt>.*)")
TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", re.ASCII)
NUMBER = re.compile(r"(seed|blend)=(\d+)", re.ASCII)
MAXIMUM = {"seed": MAX_SEED, "blend": MAX_BLEND}


@dataclass(frozen=True, kw_only=True)
class StoryboardLine:
    """One line: when a prompt begins, which, and how."""

    number: int
    """Its place in the text, from 1."""
    name: str
    """The number and text of the line, for messages."""
    begins: float
    """Seconds since the start of the storyboard."""
    prompt: str
    options: Mapping[str, Any]
    """The fields of its segment that are in brackets: `change`, `blend`, `seed`."""


@dataclass(frozen=True, kw_only=True)
class WrongLine:
    """A line that is refused."""

    number: int
    name: str
    reason: str
    """The problem and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """Lines as they are written. Their times are not rounded to chunks."""

    lines: tuple[StoryboardLine, ...]
    ends: float
    """Seconds."""
    end_line: int
    """The number of the last line, which is only a time."""


def parse_storyboard(text: str) -> Storyboard:
    """Read timed lines. Raises ValueError, one line, that names the wrong lines and the remedy."""
    lines, wrong = _read(text)
    _raise(wrong)
    if len(lines) < 2:
        raise ValueError("storyboard: no prompt; write a line per segment, `0:00 A meadow.`, and the time of its end")
    return Storyboard(lines=tuple(lines[:-1]), ends=lines[-1].begins, end_line=lines[-1].number)


def chunk_story(storyboard: Storyboard, fps: float, chunk: int, seed: int = 0) -> Story:
    """A storyboard for a student with `chunk` latent frames per chunk. Every time is rounded to the nearest chunk.

    Raises ValueError, one line, for segments without a chunk.
    """
    segments, wrong = _segments(storyboard, latent_seconds(chunk, fps))
    _raise(wrong)
    return Story(segments=tuple(segments), seed=seed)


def wrong_lines(text: str, fps: float, chunk: int) -> dict[int, str]:
    """Numbers of the lines that `parse_storyboard` or `chunk_story` refuses, each with the reason."""
    lines, wrong = _read(text)
    if not wrong and len(lines) >= 2:
        _, wrong = _segments(parse_storyboard(text), latent_seconds(chunk, fps))
    return {line.number: line.reason for line in wrong}


def write_storyboard(story: Story) -> str:
    """The storyboard of a story, as `parse_storyboard` reads it."""
    lines, time = [], 0.0
    for segment in story.segments:
        options = [segment.change] if segment.change != "keep" or segment.prompt.startswith("[") else []
        options += [f"blend={segment.blend}"] if segment.blend else []
        options += [] if segment.seed is None else [f"seed={segment.seed}"]
        lines.append(" ".join([_clock(time), *([f"[{' '.join(options)}]"] if options else []), segment.prompt]))
        time += segment.seconds
    return "\n".join([*lines, _clock(time)])


def read_story(path: str | Path, fps: float, chunk: int) -> Story:
    """A story in YAML, or a storyboard (.txt) for a student's fps and chunk. Raises ValueError, one line."""
    if Path(path).suffix.lower() != ".txt":
        return load_story(path)
    return load_story(path, lambda text: chunk_story(parse_storyboard(text), fps, chunk))


def _read(text: str) -> tuple[list[StoryboardLine], list[WrongLine]]:
    """The lines of a text, and those that cannot be read or stand in a wrong place."""
    numbered = ((number, raw.strip()) for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), 1))
    written = [(number, raw) for number, raw in numbered if raw and not raw.startswith("#")]
    lines, wrong = [], []
    for number, raw in written:
        name = _name(number, raw)
        try:
            line = _line(number, name, raw)
            _check_order(line, lines[-1] if lines else None, number == written[0][0], number == written[-1][0])
            lines.append(line)
        except ValueError as error:
            wrong.append(WrongLine(number=number, name=name, reason=str(error)))
    return lines, wrong


def _segments(storyboard: Storyboard, chunk_seconds: float) -> tuple[list[SegmentSpec], list[WrongLine]]:
    """Segments of whole chunks, and the lines whose segment has none."""
    times = [*(line.begins for line in storyboard.lines), storyboard.ends]
    # Times are rounded, not lengths, so that errors do not add up.
    bounds = [math.floor(round(time / chunk_seconds, 6) + 0.5) for time in times]
    segments, wrong = [], []
    for line, (first, last), (begins, ends) in zip(
        storyboard.lines, itertools.pairwise(bounds), itertools.pairwise(times)
    ):
        if first == last:
            reason = f"{ends - begins:g} s is too short for a whole chunk ({chunk_seconds:g} s); make it longer"
            wrong.append(WrongLine(number=line.number, name=line.name, reason=reason))
        segments.append(SegmentSpec(prompt=line.prompt, seconds=(last - first) * chunk_seconds, **line.options))
    return segments, wrong


def _line(number: int, name: str, raw: str) -> StoryboardLine:
    match = LINE.fullmatch(raw)
    if not match:
        raise ValueError("it must begin with a time, 0:06, 1:02:03 or 12.5")
    begins, prompt = _seconds(match["time"]), match["prompt"]
    if match["options"] is None and prompt.startswith("["):
        raise ValueError("the bracket is not closed; put ] before the prompt")
    options = _options(match["options"] or "")
    return StoryboardLine(number=number, name=name, begins=begins, prompt=prompt, options=options)


def _seconds(text: str) -> float:
    match = TIME.fullmatch(text)
    if not match:
        raise ValueError(f"{brief(text, MAX_TEXT)} is not a time; write 0:06, 1:02:03 or 12.5")
    hours, minutes, seconds = match[1] or "", match[2] or "", match[3]
    after_colon = [minutes] * bool(hours) + [seconds.split(".")[0]] * bool(minutes)
    if any(len(digits) != 2 or int(digits) >= 60 for digits in after_colon):
        raise ValueError(f"{brief(text, MAX_TEXT)} is not a time; two digits below 60 follow a colon")
    time = float(hours or 0) * 3600 + float(minutes or 0) * 60 + float(seconds)
    if time >= MAX_SECONDS:
        raise ValueError(f"{brief(text, MAX_TEXT)} is too late; it must be below {MAX_SECONDS:g} seconds")
    return time


def _options(text: str) -> dict[str, Any]:
    """Words in brackets -> fields of a SegmentSpec."""
    options: dict[str, Any] = {}
    for word in text.split():
        match = NUMBER.fullmatch(word)
        if not match and word not in CHANGES:
            raise ValueError(
                f"[{brief(word, MAX_TEXT)}] is not known; options are {', '.join(CHANGES)}, seed=N and blend=N"
            )
        name, value = (match[1], int(match[2])) if match else ("change", word)
        if name in options:
            raise ValueError(f"[{brief(word, MAX_TEXT)}] is the second {name}; remove one")
        if match and int(match[2]) > MAXIMUM[name]:
            raise ValueError(f"[{brief(word, MAX_TEXT)}] is too large; {name} is at most {MAXIMUM[name]}")
        options[name] = value
    return options


def _check_order(line: StoryboardLine, before: StoryboardLine | None, is_first: bool, is_last: bool) -> None:
    if is_first and line.begins != 0:
        raise ValueError("the first time must be 0:00")
    if before is not None and line.begins <= before.begins:
        raise ValueError(f"times must rise, and a line before it begins at {_clock(before.begins)}")
    if is_last and line.prompt:
        raise ValueError(f"the end is missing; add a last line with only a time, like {_clock(line.begins + 6)}")
    if not is_last and not line.prompt:
        raise ValueError("the prompt is missing; only the last line has none")


def _clock(seconds: float) -> str:
    """75.5 -> 1:15.5"""
    # Whole microseconds: never 0:60.
    whole, fraction = divmod(round(seconds * 10**6), 10**6)
    minutes, left = divmod(whole, 60)
    return f"{minutes}:{left:02}" + (f".{fraction:06}".rstrip("0") if fraction else "")


def _name(number: int, raw: str) -> str:
    return f'line {number} ("{brief(raw, MAX_TEXT)}")'


def _raise(wrong: Sequence[WrongLine]) -> None:
    """Raises ValueError, one line, unless no line is wrong."""
    if wrong:
        texts = [f"{line.name}: {line.reason}" for line in wrong]
        ends = list(itertools.accumulate(len(text) + 2 for text in texts))
        count = max(1, sum(end <= MAX_MESSAGE - ROOM for end in ends))
        more = f"; and {len(wrong) - count} more" if len(wrong) > count else ""
        raise ValueError("; ".join(texts[:count]) + more)
