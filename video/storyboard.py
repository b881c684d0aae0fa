"""A storyboard: timed prompts in plain text, one line a segment.

    # comments and empty lines are ignored
    0:00 A meadow under a clear sky by day. The camera pans right.
    0:06 [recache blend=2] A meadow at dusk. The camera stays.
    12.5 [cut seed=7] A desert. The camera pans left.
    0:20

Times are m:ss, h:mm:ss or seconds, each with a fraction if wanted; the last line says where the video ends.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..model.sampler import MAX_SECONDS
from ..model.units import FRAMES_PER_LATENT
from .story import CHANGES, MAX_BLEND, MAX_SEED, SegmentSpec, Story, load_story

ERRORS_NAMED = 5
TEXT_NAMED = 50

LINE = re.compile(r"(?P<time>[0-9:.]+)(?=[\s\[]|$)\s*(?:\[(?P<options>[^\]]*)\])?\s*(?P<prompt>.*)")
TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", re.ASCII)
NUMBER = re.compile(r"(seed|blend)=(\d+)", re.ASCII)
MOST = {"seed": MAX_SEED, "blend": MAX_BLEND}


@dataclass(frozen=True, kw_only=True)
class StoryboardLine:
    """One line: when a prompt begins, and how."""

    where: str
    """The line's number and text, for messages."""
    begins: float
    """Seconds since the storyboard's beginning."""
    prompt: str
    seed: int | None = None
    change: str = "keep"
    blend: int = 0


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """Cues as they were written; their times do not know of chunks yet."""

    cues: tuple[StoryboardLine, ...]
    ends: float
    """Seconds."""


def parse_storyboard(text: str) -> Storyboard:
    """Read timed lines. Raises ValueError, one line, that names the lines that are wrong and the remedy."""
    numbered = ((number, raw.strip()) for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), 1))
    written = [(number, raw) for number, raw in numbered if raw and not raw.startswith("#")]
    cues, wrong = [], []
    for place, (number, raw) in enumerate(written):
        where = _where(number, raw)
        try:
            cue = _cue(where, raw)
            _check_order(cue, cues[-1] if cues else None, place == 0, place == len(written) - 1)
            cues.append(cue)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise ValueError(_joined(wrong))
    if len(cues) < 2:
        raise ValueError("storyboard: no prompt; write a line a segment, `0:00 A meadow.`, and a time at which it ends")
    return Storyboard(cues=tuple(cues[:-1]), ends=cues[-1].begins)


def chunk_story(storyboard: Storyboard, fps: float, chunk: int, seed: int = 0) -> Story:
    """A storyboard for a student that makes `chunk` latent frames at a time: every time at the nearest whole chunk.

    Raises ValueError, one line, for segments that are left with none.
    """
    chunk_seconds = FRAMES_PER_LATENT * chunk / fps
    times = [*(cue.begins for cue in storyboard.cues), storyboard.ends]
    # Times are rounded, not lengths: so errors do not add up.
    bounds = [math.floor(round(time / chunk_seconds, 6) + 0.5) for time in times]
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    wrong = [
        f"{cue.where}: {end - begin:g} s is too short for a whole chunk ({chunk_seconds:g} s); make it longer"
        for cue, length, begin, end in zip(storyboard.cues, lengths, times, times[1:])
        if length < 1
    ]
    if wrong:
        raise ValueError(_joined(wrong))
    scenes = (
        SegmentSpec(
            prompt=cue.prompt, seconds=length * chunk_seconds, seed=cue.seed, change=cue.change, blend=cue.blend
        )
        for cue, length in zip(storyboard.cues, lengths)
    )  # fmt: skip
    return Story(segments=tuple(scenes), seed=seed)


def write_storyboard(story: Story) -> str:
    """The storyboard of a story: what `parse_storyboard` reads."""
    lines, time = [], 0.0
    for scene in story.segments:
        options = [scene.change] if scene.change != "keep" or scene.prompt.startswith("[") else []
        options += [f"blend={scene.blend}"] if scene.blend else []
        options += [] if scene.seed is None else [f"seed={scene.seed}"]
        lines.append(" ".join([_clock(time), *([f"[{' '.join(options)}]"] if options else []), scene.prompt]))
        time += scene.seconds
    return "\n".join([*lines, _clock(time)])


def read_story(path: str | Path, fps: float, chunk: int) -> Story:
    """A story in YAML, or a storyboard (.txt) for a student's fps and chunk. Raises ValueError, one line."""
    path = Path(path)
    if path.suffix.lower() != ".txt":
        return load_story(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    try:
        return chunk_story(parse_storyboard(text), fps, chunk)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _cue(where: str, raw: str) -> StoryboardLine:
    found = LINE.fullmatch(raw)
    if not found:
        raise ValueError("it must begin with a time, 0:06, 1:02:03 or 12.5")
    begins, prompt = _seconds(found["time"]), found["prompt"]
    if found["options"] is None and prompt.startswith("["):
        raise ValueError("the bracket is not closed; put ] before the prompt")
    return StoryboardLine(where=where, begins=begins, prompt=prompt, **_options(found["options"] or ""))


def _seconds(written: str) -> float:
    found = TIME.fullmatch(written)
    if not found:
        raise ValueError(f"{written} is not a time; write 0:06, 1:02:03 or 12.5")
    hours, minutes, seconds = found[1], found[2], found[3]
    short = minutes is not None and (float(seconds) >= 60 or len(seconds.split(".")[0]) != 2)
    if short or (hours is not None and (float(minutes) >= 60 or len(minutes) != 2)):
        raise ValueError(f"{written} is not a time; after a colon come two digits below 60")
    time = float(hours or 0) * 3600 + float(minutes or 0) * 60 + float(seconds)
    if time >= MAX_SECONDS:
        raise ValueError(f"{written} is too late; it must be below {MAX_SECONDS:g} seconds")
    return time


def _options(written: str) -> dict[str, str | int]:
    """Words in brackets -> fields of a Cue."""
    options = {}
    for word in written.split():
        number = NUMBER.fullmatch(word)
        if not number and word not in CHANGES:
            raise ValueError(f"[{word}] is not known; it can be {', '.join(CHANGES)}, seed=N or blend=N")
        name, value = (number[1], int(number[2])) if number else ("change", word)
        if name in options:
            raise ValueError(f"[{word}] is the second {name}; leave one")
        if number and value > MOST[name]:
            raise ValueError(f"[{word}] is too large; {name} is at most {MOST[name]}")
        options[name] = value
    return options


def _check_order(cue: StoryboardLine, before: StoryboardLine | None, is_first: bool, is_last: bool) -> None:
    if is_first and cue.begins != 0:
        raise ValueError("the first time must be 0:00")
    if before is not None and cue.begins <= before.begins:
        raise ValueError(f"times must rise, and a line before begins at {_clock(before.begins)}")
    if is_last and cue.prompt:
        raise ValueError(f"its end is missing; add a last line with only a time, like {_clock(cue.begins + 6)}")
    if not is_last and not cue.prompt:
        raise ValueError("it has no prompt; write one behind the time (only the last line has none)")


def _clock(seconds: float) -> str:
    """75.5 -> 1:15.5"""
    # Whole microseconds: never 0:60.
    whole, fraction = divmod(round(seconds * 10**6), 10**6)
    minutes, left = divmod(whole, 60)
    return f"{minutes}:{left:02}" + (f".{fraction:06}".rstrip("0") if fraction else "")


def _where(number: int, raw: str) -> str:
    text = " ".join(raw.split())
    return f'line {number} ("{text if len(text) <= TEXT_NAMED else text[: TEXT_NAMED - 3] + "..."}")'


def _joined(wrong: list[str]) -> str:
    more = len(wrong) - ERRORS_NAMED
    return "; ".join(wrong[:ERRORS_NAMED]) + (f"; and {more} more" if more > 0 else "")
