"""Scenes: which landmark stands where on the ring, and what the ring then looks like."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .background import background
from .geometry import (
    LANDMARK,
    LANDMARK_COLUMNS,
    LANDMARK_TOP,
    NUM_STATIONS,
    RING_COLUMNS,
    STATION_COLUMNS,
    TOKEN,
    VIEW_COLUMNS,
)
from .palette import mix
from .prompts import Style
from .sprites import NUM_CLASSES, NUM_COLOURS, NUM_SHAPES, sprite


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One landmark per station, as (shape, colour)."""

    landmarks: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if len(self.landmarks) != NUM_STATIONS:
            raise ValueError(f"landmarks has {len(self.landmarks)} entries, must have {NUM_STATIONS}")
        for shape, colour in self.landmarks:
            if not (0 <= shape < NUM_SHAPES and 0 <= colour < NUM_COLOURS):
                raise ValueError(
                    f"landmarks has ({shape}, {colour}), must be in (0..{NUM_SHAPES - 1}, 0..{NUM_COLOURS - 1})"
                )

    @property
    def class_ids(self) -> tuple[int, ...]:
        """shape * NUM_COLOURS + colour of every station."""
        return tuple(shape * NUM_COLOURS + colour for shape, colour in self.landmarks)

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Scene":
        """A random scene; no two neighbours on the ring are of one class."""
        while True:
            class_ids = rng.integers(NUM_CLASSES, size=NUM_STATIONS)
            if (class_ids != np.roll(class_ids, 1)).all():
                return cls(landmarks=tuple(divmod(int(class_id), NUM_COLOURS) for class_id in class_ids))


class VisibleLandmark(NamedTuple):
    """A landmark in a view; `first_view_column` is -1 where its left half is cut off."""

    station: int
    class_id: int
    first_view_column: int
    fully_visible: bool


def landmarks_in_view(scene: Scene, heading: int) -> list[VisibleLandmark]:
    """Landmarks with at least one token column in the view at `heading` (columns), from left to right."""
    visible = []
    for station, class_id in enumerate(scene.class_ids):
        column = (station * STATION_COLUMNS - heading) % RING_COLUMNS
        if column > RING_COLUMNS - LANDMARK_COLUMNS:
            column -= RING_COLUMNS
        if column < VIEW_COLUMNS:
            full = 0 <= column <= VIEW_COLUMNS - LANDMARK_COLUMNS
            visible.append(VisibleLandmark(station, class_id, int(column), bool(full)))
    return sorted(visible, key=lambda landmark: landmark.first_view_column)


def _draw(class_id: int, style: Style, station: int) -> np.ndarray:
    """Landmark over its background, float32 [16, 16, 3]."""
    if not 0 <= station < NUM_STATIONS:
        raise ValueError(f"station is {station}, must be in 0..{NUM_STATIONS - 1}")
    left = station * STATION_COLUMNS * TOKEN
    behind = background(style)[LANDMARK_TOP : LANDMARK_TOP + LANDMARK, left : left + LANDMARK]
    return mix(behind, *sprite(class_id, style))


@lru_cache(maxsize=256)
def panorama(scene: Scene, style: Style) -> np.ndarray:
    """The whole ring in art pixels, uint8 [32, 384, 3], read-only."""
    ring = background(style).copy()
    for station, class_id in enumerate(scene.class_ids):
        left = station * STATION_COLUMNS * TOKEN
        ring[LANDMARK_TOP : LANDMARK_TOP + LANDMARK, left : left + LANDMARK] = _draw(class_id, style, station)
    pixels = np.round(ring).astype(np.uint8)
    pixels.setflags(write=False)
    return pixels


@lru_cache(maxsize=None)
def templates(style: Style, station: int) -> np.ndarray:
    """Every class as it looks at `station`, uint8 [NUM_CLASSES, 16, 16, 3], read-only."""
    crops = np.stack([_draw(class_id, style, station) for class_id in range(NUM_CLASSES)])
    crops = np.round(crops).astype(np.uint8)
    crops.setflags(write=False)
    return crops


def template(class_id: int, style: Style, station: int) -> np.ndarray:
    """One class as it looks at `station`, uint8 [16, 16, 3], read-only."""
    if not 0 <= class_id < NUM_CLASSES:
        raise ValueError(f"class_id is {class_id}, must be in 0..{NUM_CLASSES - 1}")
    return templates(style, station)[class_id]
