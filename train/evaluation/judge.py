"""One film judged against the true demo world: recall, sharpness, palette and motion (demo_world.md 4).

Every figure of consistency stands beside one of motion: a picture that never moves remembers everything.

Shapes: C latent channels, T latent frames, H W latent rows and columns. A film is [C, T, H, W], normalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...video.pipeline import Pipeline
from ..world.background import background
from ..world.camera import headings, view
from ..world.geometry import (
    CHUNK,
    LANDMARK_COLUMNS,
    LANDMARK_TOP,
    NUM_STATIONS,
    RING_COLUMNS,
    STATION_COLUMNS,
    TOKEN,
    VIEW_COLUMNS,
)
from ..world.prompts import Style
from ..world.scene import templates
from ..world.scripts import Script

QUARTERS = 4
TURNS = (0, 1, -1, 2, -2)
"""Columns a camera can have turned between two frames; where two agree as well, the smaller."""
_LEAD_FRAMES = 4 * CHUNK
"""The first frames of a long film; they say where on the ring it begins."""


@dataclass(frozen=True)
class Trial:
    """One rollout of a benchmark script, judged."""

    first: tuple[int, ...]
    """Class of every target at its first full view in the film."""
    remembered: tuple[int, ...]
    """Class of every target at its last full view before the camera left."""
    returned: tuple[int, ...]
    """Class at the same place on return."""
    psnr: float
    """Of the targets on return against before, in latent units."""
    heading_accuracy: float
    """Share of latent frames that look where the prompts say, counted in turns from the first frame on."""
    motion: float
    """Columns that the camera turns a frame, over those it was asked to turn."""
    change: float
    """Mean absolute difference of consecutive latent frames without their landmarks, over that of the true world:
    0 is a frozen picture, above 1 one that flickers."""
    residual: float
    """Distance of the returned landmarks to their nearest template: sharpness, smaller is better."""

    @property
    def recall(self) -> float:
        """Share of targets that are on return what they were before the camera left."""
        return _match_rate(self.remembered, self.returned)

    @property
    def recall_first(self) -> float:
        """Share of targets that are on return what they were when they were first seen."""
        return _match_rate(self.first, self.returned)


@dataclass(frozen=True)
class LongTrial:
    """One long rollout, judged by quarters; every field has one figure a quarter."""

    palette: tuple[float, ...]
    """Distance of a frame's mean latent without its landmarks to the true world's where the frame looks."""
    residual: tuple[float, ...]
    """Distance of landmarks in full view to their nearest template: sharpness, smaller is better."""
    heading_accuracy: tuple[float, ...]
    motion: tuple[float, ...]
    change: tuple[float, ...]
    reach: tuple[float, ...]
    """Age of the oldest remembered frame that is not sink, in latent frames, mean over the quarter's chunks."""


def _match_rate(before: Sequence[int], after: Sequence[int]) -> float:
    return float(np.mean([a == b for a, b in zip(before, after)]))


class World:
    """The true world in latents, to judge generated latents by."""

    def __init__(self, pipeline: Pipeline):
        self.codec = pipeline.vae
        self.device = pipeline.device
        self._templates: dict[tuple[Style, int], Tensor] = {}
        self._views: dict[Style, Tensor] = {}

    def encode(self, art_uint8: np.ndarray) -> Tensor:
        """Art pixels [..., H, W, 3] -> latents [N, C, h, w]."""
        art = torch.from_numpy(np.array(art_uint8)).to(self.device).float() / 127.5 - 1
        return self.codec.encode_art(art.flatten(0, -4)[None])[0].movedim(1, 0)

    def landmark(self, frame_CHW: Tensor, view_column: int) -> Tensor:
        """The 2 x 2 tokens of a landmark."""
        per_token = frame_CHW.shape[-1] // VIEW_COLUMNS
        top = LANDMARK_TOP // TOKEN * per_token
        size = LANDMARK_COLUMNS * per_token
        return frame_CHW[:, top : top + size, view_column * per_token : view_column * per_token + size]

    def classify(self, frame_CHW: Tensor, view_column: int, style: Style, station: int) -> tuple[int, float]:
        """Nearest template and the distance to it."""
        if (style, station) not in self._templates:
            self._templates[style, station] = self.encode(templates(style, station))
        crop = self.landmark(frame_CHW, view_column)
        distance = (self._templates[style, station] - crop).square().mean((1, 2, 3))
        return int(distance.argmin()), float(distance.min())

    def bare_views(self, style: Style) -> Tensor:
        """The rows without landmarks of the true view at every heading, [RING_COLUMNS, C, rows, W]."""
        if style not in self._views:
            ring = np.clip(np.round(background(style)), 0, 255).astype(np.uint8)
            views = np.stack([view(ring, heading * TOKEN) for heading in range(RING_COLUMNS)])
            self._views[style] = bare_rows(self.encode(views))
        return self._views[style]

    def start(self, film_CTHW: Tensor, path: np.ndarray, style: Style) -> int:
        """Where on the ring a film begins that turned along `path` [T]: it may be anywhere.

        The heading at which sky and ground, and the landmarks standing there, are nearest to the true world's.
        """
        frames = film_CTHW.movedim(1, 0)
        bare, views = bare_rows(frames), self.bare_views(style)
        distances = []
        for start in range(RING_COLUMNS):
            looks = (path + start) % RING_COLUMNS
            ground = (bare - views[looks]).square().mean()
            landmarks = [self.sharpness(frame, heading, style) for frame, heading in zip(frames, looks)]
            distances.append(float(ground) + float(np.mean(landmarks)))
        return int(np.argmin(distances))

    def sharpness(self, frame_CHW: Tensor, heading: int, style: Style) -> float:
        """Mean distance of the landmarks in full view at a heading to their nearest templates."""
        visible = stations_in_view(heading)
        return float(np.mean([self.classify(frame_CHW, column, style, station)[1] for station, column in visible]))


def turns(film_CTHW: Tensor) -> np.ndarray:
    """Columns the camera turned from each frame to the next, [T - 1]: the shift under which two frames agree best."""
    per_token = film_CTHW.shape[-1] // VIEW_COLUMNS
    before, after = film_CTHW[:, :-1], film_CTHW[:, 1:]
    width = film_CTHW.shape[-1]
    errors = []
    for turn in TURNS:
        shift = turn * per_token
        seen_before = before[..., max(0, shift) : width + min(0, shift)]
        seen_after = after[..., max(0, -shift) : width + min(0, -shift)]
        errors.append((seen_before - seen_after).square().mean((0, 2, 3)))
    return np.array(TURNS)[torch.stack(errors).argmin(0).cpu().numpy()]


def path_of(film_CTHW: Tensor) -> np.ndarray:
    """Where each frame looks, in columns from where the first one does, [T]."""
    return np.concatenate([[0], turns(film_CTHW).cumsum()])


def bare_rows(frames_TCHW: Tensor) -> Tensor:
    """The token rows that no landmark covers: the topmost and the lowest."""
    per_token = frames_TCHW.shape[-1] // VIEW_COLUMNS
    height = frames_TCHW.shape[-2]
    return frames_TCHW[:, :, [*range(per_token), *range(height - per_token, height)]]


def stations_in_view(heading: int) -> list[tuple[int, int]]:
    """(station, view column) of every landmark in full view at a heading."""
    columns = [(s, (s * STATION_COLUMNS - int(heading)) % RING_COLUMNS) for s in range(NUM_STATIONS)]
    return [(station, column) for station, column in columns if column <= VIEW_COLUMNS - LANDMARK_COLUMNS]


def judge(world: World, film: Tensor, script: Script, style: Style) -> Trial:
    """A film held against what its benchmark script asked for."""
    path, asked = path_of(film), np.array(script.headings)
    lead = slice(0, script.target_frame + 1, CHUNK)
    start = world.start(film[:, lead], asked[lead], style)
    before, after = film[:, script.target_frame], film[:, script.return_frame + 1]
    first, remembered, returned, errors, residuals = [], [], [], [], []
    for station, column in stations_in_view(script.target_heading + start):
        frame, first_column = _first_view(station, asked + start)
        first.append(world.classify(film[:, frame], first_column, style, station)[0])
        remembered.append(world.classify(before, column, style, station)[0])
        class_id, residual = world.classify(after, column, style, station)
        returned.append(class_id)
        residuals.append(residual)
        errors.append((world.landmark(before, column) - world.landmark(after, column)).square().mean())
    return Trial(
        first=tuple(first),
        remembered=tuple(remembered),
        returned=tuple(returned),
        psnr=float(-10 * torch.log10(torch.stack(errors).mean() + 1e-12)),
        heading_accuracy=float((path == asked - asked[0]).mean()),
        motion=float(np.abs(np.diff(path)).mean() / np.abs(np.diff(asked)).mean()),
        change=_change(world, film, asked + start, style),
        residual=float(np.mean(residuals)),
    )


def judge_long(world: World, film: Tensor, moves: Sequence[int], style: Style, reach: Sequence[int]) -> LongTrial:
    """A long film by quarters; `moves` and `reach` (latent frames) per chunk, every quarter with a move in it.

    Landmarks and palette are judged where a frame looks by the turns before it, so that a camera that lost its way is
    counted once, under heading accuracy; there every quarter starts anew.
    """
    if len(moves) % QUARTERS or not all(any(quarter) for quarter in np.split(np.array(moves), QUARTERS)):
        raise ValueError(f"moves: {len(moves)} chunks are not {QUARTERS} equal quarters that all move")
    path, asked = path_of(film), headings(moves)
    lead = slice(0, _LEAD_FRAMES, CHUNK)
    start = world.start(film[:, lead], path[lead], style)
    seen = (path + start) % RING_COLUMNS
    bare, views = bare_rows(film.movedim(1, 0)), world.bare_views(style)
    palette = (bare.mean((2, 3)) - views.mean((2, 3))[seen]).norm(dim=1).cpu().numpy()
    residual = np.array([world.sharpness(film[:, t], heading, style) for t, heading in enumerate(seen)])
    quarters = np.array_split(np.arange(film.shape[1]), QUARTERS)
    mean = lambda values: tuple(float(values[quarter].mean()) for quarter in quarters)
    return LongTrial(
        palette=mean(palette),
        residual=mean(residual),
        heading_accuracy=tuple(float((path[q] - path[q[0]] == asked[q] - asked[q[0]]).mean()) for q in quarters),
        motion=tuple(float(np.abs(np.diff(path[q])).sum() / np.abs(np.diff(asked[q])).sum()) for q in quarters),
        change=tuple(_change(world, film[:, q], asked[q] + start, style) for q in quarters),
        reach=tuple(float(np.mean(part)) for part in np.split(np.array(reach), QUARTERS)),
    )


def _first_view(station: int, path: np.ndarray) -> tuple[int, int]:
    """First frame of a path that has the landmark in full view, and its column there."""
    for frame, heading in enumerate(path):
        for other, column in stations_in_view(heading):
            if other == station:
                return frame, column
    raise AssertionError(f"station {station} is never in full view")


def _change(world: World, film: Tensor, path: np.ndarray, style: Style) -> float:
    """Mean absolute difference of consecutive frames without landmarks, over the true world's along the path."""
    true = world.bare_views(style)[path % RING_COLUMNS]
    difference = lambda frames: (frames[1:] - frames[:-1]).abs().mean()
    return float(difference(bare_rows(film.movedim(1, 0))) / difference(true))
