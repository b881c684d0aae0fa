"""Scenes: the landmarks on the ring, and pictures of the ring."""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from .background import background
from .geometry import LANDMARK, LANDMARK_TOP, NUM_STATIONS, RING_WIDTH, STATION_COLUMNS, TOKEN
from .palette import mix
from .prompts import Style
from .sprites import NUM_CLASSES, sprite


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One landmark per station, as its class: shape * NUM_COLOURS + colour."""

    class_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.class_ids) != NUM_STATIONS or not all(0 <= class_id < NUM_CLASSES for class_id in self.class_ids):
            raise ValueError(
                f"class_ids: {self.class_ids} must be {NUM_STATIONS} whole numbers from 0 to {NUM_CLASSES - 1}"
            )

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Scene":
        """A random scene; no two neighbours on the ring are of one class."""
        while True:
            class_ids = rng.integers(NUM_CLASSES, size=NUM_STATIONS)
            if (class_ids != np.roll(class_ids, 1)).all():
                return cls(class_ids=tuple(class_ids.tolist()))


_PLACES = tuple(
    np.s_[LANDMARK_TOP : LANDMARK_TOP + LANDMARK, left : left + LANDMARK]
    for left in range(0, RING_WIDTH, STATION_COLUMNS * TOKEN)
)
"""Rows and columns of the landmark of every station on the ring."""


def _draw(class_id: int, style: Style, station: int) -> np.ndarray:
    """A landmark over its background, float32 [16, 16, 3]."""
    return mix(background(style)[_PLACES[station]], *sprite(class_id, style))


def _rounded(art: np.ndarray) -> np.ndarray:
    pixels = np.round(art).astype(np.uint8)
    pixels.setflags(write=False)
    return pixels


@lru_cache(maxsize=256)
def panorama(scene: Scene, style: Style) -> np.ndarray:
    """The whole ring in art pixels, uint8 [32, 384, 3], read-only."""
    ring = background(style).copy()
    for station, class_id in enumerate(scene.class_ids):
        ring[_PLACES[station]] = _draw(class_id, style, station)
    return _rounded(ring)


@cache
def templates(style: Style, station: int) -> np.ndarray:
    """Pictures of all classes at `station`, uint8 [NUM_CLASSES, 16, 16, 3], read-only."""
    return _rounded(np.stack([_draw(class_id, style, station) for class_id in range(NUM_CLASSES)]))
