"""A story: prompts with seconds, in YAML; what `context-forcing generate` takes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..memory.memory import CHANGES, Memory
from ..model.sampler import chunks_for
from ..model.units import check_size, latent_seconds, pixel_size

MAX_SEED = 2**63 - 1
MAX_BLEND = 1000


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """One segment: a prompt and how long it lasts."""

    prompt: str
    seconds: float
    seed: int | None = None
    """None takes the story's."""
    change: str = "keep"
    """How the prompt takes over from the one before (memory.CHANGES)."""
    blend: int = 0
    """Chunks over which the text moves from the old prompt to this one."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """Segments that continue each other over one memory."""

    segments: tuple[SegmentSpec, ...]
    size: tuple[int, int] | None = None
    """Width and height in pixels; None is what the student was trained with."""
    fps: int | None = None
    """None is what the student was trained with."""
    seed: int = 0

    def with_seed(self, seed: int) -> "Story":
        """The same story with one seed for all segments."""
        segments = tuple(dataclasses.replace(scene, seed=None) for scene in self.segments)
        return dataclasses.replace(self, seed=seed, segments=segments)

    def check_fits(self, memory: Memory, compact: bool) -> None:
        """Raises ValueError for what a memory of this kind cannot do, before anything is made."""
        for scene in self.segments if memory.latent_chunks else self.segments[1:]:
            memory.check_change(scene.change)
        if compact:
            memory.check_supports("compact")

    def check_continues(self, memory: Memory, settings: Mapping[str, object]) -> None:
        """Raises ValueError where a memory was made at another size, or with other `settings` of its config."""
        width, height = pixel_size(memory.latent_size)
        if self.size is not None and self.size != (width, height):
            raise ValueError(f"size: the story says {list(self.size)}, the memory was made at {[width, height]}")
        made = dataclasses.asdict(memory.config)
        for name, value in settings.items():
            if made[name] != value:
                raise ValueError(
                    f"{name}: {value} was asked for, the memory was made with {made[name]}; a memory keeps its settings"
                )

    def rounded(self, fps: float, chunk: int) -> Iterator[str]:
        """A line for every segment that is longer than it says, because chunks are whole."""
        a_chunk = latent_seconds(chunk, fps)
        for i, scene in enumerate(self.segments):
            seconds = chunks_for(scene.seconds, fps, chunk) * a_chunk
            if abs(seconds - scene.seconds) > 1e-6:
                yield f"segments[{i}]: {scene.seconds:g} s rounded up to {seconds:g} s, whole chunks of {a_chunk:g} s"

    def num_chunks(self, fps: float, chunk: int) -> int:
        """Chunks of all segments, each rounded up."""
        return sum(chunks_for(scene.seconds, fps, chunk) for scene in self.segments)


def load_story(path: str | Path) -> Story:
    """Read and check a story. Raises ValueError, one line, that names the field, the value and the remedy."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    try:
        return parse_story(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_story(raw: object) -> Story:
    """A story from plain values; raises ValueError."""
    _check_keys("story", raw, Story)
    segments = raw.get("segments")
    if not isinstance(segments, list) or not segments:
        raise ValueError("segments: give a list with at least one `prompt` and `seconds`")
    story = Story(
        segments=tuple(_segment(f"segments[{i}]", segment) for i, segment in enumerate(segments)),
        size=_size(raw["size"]) if "size" in raw else None,
        fps=_whole("fps", raw["fps"], 1, 240) if "fps" in raw else None,
        seed=_whole("seed", raw.get("seed", 0), 0, MAX_SEED),
    )
    return story


def _segment(where: str, raw: object) -> SegmentSpec:
    _check_keys(where, raw, SegmentSpec)
    for name in ("prompt", "seconds"):
        if name not in raw:
            raise ValueError(f"{where}.{name}: missing")
    prompt, seconds = raw["prompt"], raw["seconds"]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}.prompt: {prompt!r} is not text")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"{where}.seconds: {seconds!r} must be a number above 0")
    seed = _whole(f"{where}.seed", raw["seed"], 0, MAX_SEED) if "seed" in raw else None
    change = raw.get("change", "keep")
    if change not in CHANGES:
        raise ValueError(f"{where}.change: {change!r} is not one of {', '.join(CHANGES)}")
    blend = _whole(f"{where}.blend", raw.get("blend", 0), 0, MAX_BLEND)
    return SegmentSpec(prompt=prompt, seconds=float(seconds), seed=seed, change=change, blend=blend)


def _size(raw: object) -> tuple[int, int]:
    if not isinstance(raw, list) or len(raw) != 2:
        raise ValueError(f"size: {raw!r} must be [width, height]")
    width, height = (_whole("size", side, 1, 2**15) for side in raw)
    check_size(width, height)
    return width, height


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {value!r} must be a whole number from {least} to {most}")
    return value


def _check_keys(where: str, raw: object, cls: type) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{where}: {raw!r} must be a mapping with {', '.join(f.name for f in dataclasses.fields(cls))}"
        )
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := [key for key in raw if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
