"""Stories: prompts with seconds, read from YAML."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..memory.fields import check_keys, checked_fields, quoted
from ..memory.files import read_text
from ..memory.kinds import MEMORY, VIDEO
from ..memory.memory import CHANGES, Memory
from ..memory.view import ATTENDS
from ..model.config import StudentCard
from ..model.sampler import MAX_SECONDS, chunks_for
from ..model.settings import read_yaml
from ..model.units import check_size, latent_seconds, pixel_size

log = logging.getLogger("context_forcing")

MAX_SEED = 2**63 - 1
MAX_BLEND = 1000
INSTEAD = {
    kind: f"a story is a text file; did you mean {option}?"
    for kind, option in ((VIDEO, "--like"), (MEMORY, "--memory-in"))
}
"""Remedies for other files in the place of a story."""


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """One segment as it is written: a prompt and how long it lasts."""

    prompt: str
    seconds: float
    seed: int | None = None
    """None: the story's seed."""
    change: str = "keep"
    """How the prompt replaces the one before: one of memory.CHANGES."""
    blend: int = 0
    """Chunks over which the text moves from the old prompt to this one."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """A picture that is remembered and is not in the video (docs/memory.md, References)."""

    image: str
    """A file; in a story relative to the story's folder."""
    prompt: str = ""
    """What it shows; empty: it is read under the prompt of the first segment."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSegment(SegmentSpec):
    """One segment with every default filled in; `seconds` are those of its whole chunks."""

    seed: int = 0
    num_chunks: int


@dataclass(frozen=True, kw_only=True)
class ResolvedStory:
    """A story for one student and one memory, with every default filled in."""

    segments: tuple[ResolvedSegment, ...]
    size: tuple[int, int]
    """Width and height in pixels."""
    fps: float
    commit_attends: str
    """What the commit pass attends to (view.ATTENDS)."""

    @property
    def num_chunks(self) -> int:
        return sum(segment.num_chunks for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class Story:
    """Segments as they are written. They continue each other over one memory."""

    segments: tuple[SegmentSpec, ...]
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: those of the student's training."""
    fps: int | None = None
    """None: that of the student's training."""
    seed: int = 0
    commit_attends: str | None = None
    """What the commit pass attends to (view.ATTENDS); None: as the student's card says."""
    references: tuple[ReferenceSpec, ...] = ()

    def with_seed(self, seed: int) -> "Story":
        """The same story with one seed for all segments."""
        segments = tuple(dataclasses.replace(segment, seed=None) for segment in self.segments)
        return dataclasses.replace(self, seed=seed, segments=segments)

    def without_folders(self) -> "Story":
        """The same story with names of pictures for their paths."""
        references = tuple(dataclasses.replace(each, image=Path(each.image).name) for each in self.references)
        return dataclasses.replace(self, references=references)

    def resolve(self, card: StudentCard, memory: Memory) -> ResolvedStory:
        """Fill in every default for a student and the memory that the video continues; round up to whole chunks.

        Logs the segments that become longer. Raises ValueError if the memory has another size, or does not support the
        change of a segment.
        """
        size, fps = pixel_size(memory.latent_size), self.fps or card.fps
        if self.size not in (None, size):
            raise ValueError(
                f"size: the story has {list(self.size)}, the memory {list(size)}; remove it from the story"
            )
        chunk_seconds = latent_seconds(memory.config.chunk, fps)
        segments = []
        for i, segment in enumerate(self.segments):
            if i or memory.latent_chunks:
                memory.check_change(segment.change)
            num_chunks = chunks_for(segment.seconds, fps, memory.config.chunk)
            seconds = num_chunks * chunk_seconds
            if abs(seconds - segment.seconds) > 1e-6:
                log.info(
                    "segments[%d]: %g s rounded up to %g s, whole chunks of %g s",
                    i, segment.seconds, seconds, chunk_seconds,
                )  # fmt: skip
            seed = self.seed if segment.seed is None else segment.seed
            values = {**vars(segment), "seed": seed, "seconds": seconds}
            segments.append(ResolvedSegment(**values, num_chunks=num_chunks))
        commit_attends = self.commit_attends or card.commit_attends
        return ResolvedStory(segments=tuple(segments), size=size, fps=fps, commit_attends=commit_attends)


def load_story(path: str | Path, parse: Callable[[str], Story] | None = None) -> Story:
    """Read a story from a text file: YAML, or what `parse` reads.

    Raises ValueError, one line, that names the file, the field, the value and the remedy.
    """
    path = Path(path)
    text = read_text(path, instead=INSTEAD)
    try:
        story = parse(text) if parse else parse_story(read_yaml(text))
        at = lambda spec: dataclasses.replace(spec, image=str(path.parent / spec.image))
        return dataclasses.replace(story, references=tuple(map(at, story.references)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_story(raw: object) -> Story:
    """A story from plain values. Raises ValueError."""
    values = check_keys(Story, raw, "story")
    segments = values.get("segments")
    if not isinstance(segments, list) or not segments:
        raise ValueError("segments: give a list with at least one `prompt` and `seconds`")
    return Story(
        segments=tuple(_segment(f"segments[{i}]", segment) for i, segment in enumerate(segments)),
        size=_size(values["size"]) if "size" in values else None,
        fps=_integer("fps", values["fps"], 1, 240) if "fps" in values else None,
        seed=_integer("seed", values.get("seed", 0), 0, MAX_SEED),
        commit_attends=_choice("commit_attends", values["commit_attends"], ATTENDS)
        if "commit_attends" in values
        else None,
        references=_references(values.get("references", [])),
    )


def plain_story(story: Story) -> dict:
    """The plain values that `parse_story` reads as this story."""
    known = lambda spec: {name: value for name, value in vars(spec).items() if value is not None}
    lists = {name: [known(each) for each in getattr(story, name)] for name in ("segments", "references")}
    return {**known(story), **lists}


def _segment(where: str, raw: object) -> SegmentSpec:
    values = checked_fields(SegmentSpec, raw, where)
    prompt, seconds = values["prompt"], values["seconds"]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}.prompt: {quoted(prompt)} is not text")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < MAX_SECONDS:
        raise ValueError(f"{where}.seconds: {quoted(seconds)} is not a number above 0 and below {MAX_SECONDS:g}")
    _choice(f"{where}.change", values.get("change", "keep"), CHANGES)
    _integer(f"{where}.seed", values.get("seed", 0), 0, MAX_SEED)
    _integer(f"{where}.blend", values.get("blend", 0), 0, MAX_BLEND)
    return SegmentSpec(**{**values, "seconds": float(seconds)})


def _references(raw: object) -> tuple[ReferenceSpec, ...]:
    if not isinstance(raw, list):
        raise ValueError(
            f"references: {quoted(raw)} is not a list; give paths of pictures, or `image` and `prompt` of each"
        )
    references = []
    for i, each in enumerate(raw):
        values = checked_fields(ReferenceSpec, {"image": each} if isinstance(each, str) else each, f"references[{i}]")
        for name, value in values.items():
            if not isinstance(value, str):
                raise ValueError(f"references[{i}].{name}: {quoted(value)} is not text")
        references.append(ReferenceSpec(**values))
    return tuple(references)


def _size(raw: object) -> tuple[int, int]:
    if not isinstance(raw, list) or len(raw) != 2:
        raise ValueError(f"size: {quoted(raw)} is not [width, height]")
    width, height = (_integer("size", side, 1, 2**15) for side in raw)
    check_size(width, height)
    return width, height


def _choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {quoted(value)} is not one of {', '.join(choices)}")
    return value


def _integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {quoted(value)} is not a whole number from {least} to {most}")
    return value
