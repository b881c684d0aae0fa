"""Camera paths and styles: random ones for training, fixed scripts for evaluation."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from .camera import headings
from .geometry import CHUNK, RING_COLUMNS, VIEW_COLUMNS
from .prompts import CONCEPTS, Style, check_choice

_WANDERED = 2 * CHUNK
"""Columns by which a wandering camera goes beyond the end of its trip."""
TRIP_COLUMNS = range(-(-VIEW_COLUMNS // CHUNK) * CHUNK, RING_COLUMNS - VIEW_COLUMNS - _WANDERED + 1, CHUNK)
"""Lengths of trips in columns: so far that the targets are out of view, and not around the ring to them again."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """A camera path that shows targets, leaves them, and returns to exactly the same heading."""

    moves: tuple[int, ...]
    """One move per chunk."""
    headings: tuple[int, ...]
    """Columns, per latent frame, not wrapped."""
    target_heading: int
    target_frame: int
    """Last latent frame before the camera leaves."""
    return_frame: int
    """First latent frame back at `target_heading`, where the camera stays to the end."""
    hidden_frames: tuple[int, ...]
    """Latent frames in which no column of the target view is visible."""


def benchmark_script(kind: str, gap_chunks: int, mirror: bool, columns: int = TRIP_COLUMNS[0]) -> Script:
    """S R R S, R for `columns`, `gap_chunks` chunks elsewhere, L for `columns`, S S; `mirror` swaps left and right.

    Elsewhere the camera stays ("dwell") or goes back and forth, R R L L ("wander").
    """
    check_choice("kind", kind, ("dwell", "wander"))
    if columns not in TRIP_COLUMNS:
        raise ValueError(f"columns: {columns} is not one of {', '.join(map(str, TRIP_COLUMNS))}")
    if gap_chunks < 0 or (kind == "wander" and gap_chunks % 4):
        raise ValueError(f"gap_chunks: {gap_chunks} must be 0 or more, for 'wander' a multiple of 4")
    gap = [0] * gap_chunks if kind == "dwell" else [1, 1, -1, -1] * (gap_chunks // 4)
    out = [1] * (columns // CHUNK)
    back = [-move for move in out]
    moves = [-move if mirror else move for move in (0, 1, 1, 0, *out, *gap, *back, 0, 0)]
    path, target_frame = headings(moves), 4 * CHUNK - 1
    distance = (path - path[target_frame]) % RING_COLUMNS
    is_hidden = np.minimum(distance, RING_COLUMNS - distance) >= VIEW_COLUMNS
    return Script(
        moves=tuple(moves),
        headings=tuple(path.tolist()),
        target_heading=int(path[target_frame]),
        target_frame=target_frame,
        return_frame=target_frame + 2 + distance[target_frame + 2 :].tolist().index(0),
        hidden_frames=tuple(np.flatnonzero(is_hidden).tolist()),
    )


def _elsewhere(rng: np.random.Generator, length: int, out: int) -> list[int]:
    """Moves of `length` chunks that end at the heading where they begin, far from the start of the trip."""
    if rng.random() < 0.45:
        return [0] * length
    middle: list[int] = []
    while len(middle) + 2 <= length:
        reach = int(rng.integers(1, min(2, (length - len(middle)) // 2) + 1))
        # Only further out: in the other direction the views of the start would come back.
        middle += [out] * reach + [-out] * reach
    return middle + [0] * (length - len(middle))


def _trip(rng: np.random.Generator, budget: int) -> list[int]:
    """Stay, leave, spend time elsewhere, return, stay: about `budget` chunks, at least 8."""
    out = int(rng.choice((-1, 1)))
    before = int(rng.integers(0, 3))
    reach = int(rng.integers(3, 6)) if budget >= before + 11 else 3
    spare = max(budget - before - 2 * reach - 1, 0)
    # In one of three trips the camera stops one chunk before or beyond the start.
    back = max(reach + int(rng.choice((-1, 0, 0, 0, 0, 1))), 1)
    middle = _elsewhere(rng, int(rng.integers(0, spare + 1)), out)
    return [0] * before + [out] * reach + middle + [-out] * back + [0] * int(rng.integers(1, 3))


def random_script(rng: np.random.Generator, num_chunks: int) -> list[int]:
    """One move per chunk for training: after a random approach, trips away from a place and back to it."""
    approach = int(rng.integers(0, min(3, max(num_chunks - 8, 1))))
    script = [int(rng.choice((-1, 1)))] * approach
    while len(script) < num_chunks:
        script += _trip(rng, num_chunks - len(script))
    return script[:num_chunks]


LONG_TRIP_CHUNKS = 8
"""Chunks of the shortest long trip, with the stay after it."""


def long_trip_script(rng: np.random.Generator, num_chunks: int) -> list[int]:
    """One move per chunk for training: straight out by 3 to 10 chunks and straight back, with short stays between."""
    script: list[int] = []
    while num_chunks - len(script) >= LONG_TRIP_CHUNKS:
        room = num_chunks - len(script)
        before, out = int(rng.integers(0, 3)), int(rng.choice((-1, 1)))
        reach = int(rng.integers(3, min(10, (room - before) // 2) + 1))
        stay = int(rng.integers(0, 3)) if room - before - 2 * reach > 2 else 0
        script += [0] * before + [out] * reach + [0] * stay + [-out] * reach + [0]
    return (script + [0] * num_chunks)[:num_chunks]


def pacing_script(rng: np.random.Generator, num_chunks: int) -> list[int]:
    """One move per chunk for training: back and forth over the same few views, so that most views are repeated."""
    out, reach = int(rng.choice((-1, 1))), int(rng.integers(2, 5))
    lap = [out] * reach + [-out] * reach
    script = lap * (num_chunks // len(lap) + 1)
    for _ in range(int(rng.integers(0, 3))):
        script.insert(int(rng.integers(1, max(num_chunks, 2))), 0)
    return script[:num_chunks]


def random_style(rng: np.random.Generator) -> Style:
    """Any style; all are equally likely."""
    return Style(**{name: str(rng.choice(choices)) for name, choices in CONCEPTS.items()})


def random_styles(rng: np.random.Generator, num_chunks: int) -> list[Style]:
    """One style per chunk: one style throughout (70 %), or one concept changes at a random chunk."""
    first = random_style(rng)
    if num_chunks == 1 or rng.random() < 0.7:
        return [first] * num_chunks
    name, choices = list(CONCEPTS.items())[int(rng.integers(len(CONCEPTS)))]
    others = [choice for choice in choices if choice != getattr(first, name)]
    second = dataclasses.replace(first, **{name: str(rng.choice(others))})
    change = int(rng.integers(1, num_chunks))
    return [first] * change + [second] * (num_chunks - change)
