"""Figures of one video against the true demo world: recall, sharpness, palette, motion (docs/demo_student.md, Metrics).

A still picture has perfect recall. Figures of consistency are therefore always reported with figures of motion.

Shapes: C latent channels, T latent frames, H W latent rows and columns. A video is [C, T, H, W], normalised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...model.codecs.demo_vae import DemoCodec
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
"""Columns by which the camera can turn between two frames. Of equally good turns the first is taken."""
_LEAD_FRAMES = 4 * CHUNK
"""Frames at the beginning of a long video that locate its start on the ring."""


@dataclass(frozen=True)
class Trial:
    """Figures of one rollout of a benchmark script."""

    first: tuple[int, ...]
    """Class of every target at its first full view in the video."""
    remembered: tuple[int, ...]
    """Class of every target at its last full view before the camera left."""
    returned: tuple[int, ...]
    """Class at the same place after the return."""
    psnr: float
    """Of the targets after the return against before the camera left, in latent units."""
    heading_accuracy: float
    """Share of latent frames at the heading of the script. The heading is the sum of turns since the first frame."""
    motion: float
    """Columns per frame by which the camera turns, relative to the script."""
    change: float
    """Mean absolute difference of consecutive latent frames without their landmarks, relative to the true world.
    0 is a still picture; values above 1 are flicker."""
    residual: float
    """Distance of the returned landmarks to their nearest template. It measures sharpness; smaller is better."""

    @property
    def recall(self) -> float:
        """Share of targets with the same class before the camera left and after the return."""
        return _match_rate(self.remembered, self.returned)

    @property
    def recall_first(self) -> float:
        """Share of targets with the same class at first sight and after the return."""
        return _match_rate(self.first, self.returned)


@dataclass(frozen=True)
class LongTrial:
    """Figures of one long rollout, one value per quarter."""

    palette: tuple[float, ...]
    """Distance of a frame's mean latent, without its landmarks, to that of the true world at the same heading."""
    residual: tuple[float, ...]
    """Distance of landmarks in full view to their nearest template. It measures sharpness; smaller is better."""
    heading_accuracy: tuple[float, ...]
    motion: tuple[float, ...]
    change: tuple[float, ...]
    reach: tuple[float, ...]
    """Age of the oldest remembered frame outside the sink, in latent frames, mean over the chunks of the quarter."""


def _match_rate(before: Sequence[int], after: Sequence[int]) -> float:
    return float(np.mean([a == b for a, b in zip(before, after)]))


class World:
    """The true world in latents: the reference for generated latents."""

    def __init__(self, pipeline: Pipeline):
        assert isinstance(pipeline.vae, DemoCodec)
        self.codec = pipeline.vae
        self.device = pipeline.device
        self._templates: dict[tuple[Style, int], Tensor] = {}
        self._views: dict[Style, Tensor] = {}

    def encode(self, art_uint8: np.ndarray) -> Tensor:
        """Art pixels [..., H, W, 3] -> latents [N, C, h, w]."""
        art = torch.from_numpy(np.array(art_uint8)).to(self.device).float() / 127.5 - 1
        return self.codec.encode_art(art.flatten(0, -4)[None])[0].movedim(1, 0)

    def landmark(self, frame_CHW: Tensor, view_column: int) -> Tensor:
        """The 2 x 2 tokens of a landmark, [C, h, w]."""
        per_token = frame_CHW.shape[-1] // VIEW_COLUMNS
        top = LANDMARK_TOP // TOKEN * per_token
        size = LANDMARK_COLUMNS * per_token
        return frame_CHW[:, top : top + size, view_column * per_token : view_column * per_token + size]

    def classify(self, frame_CHW: Tensor, view_column: int, style: Style, station: int) -> tuple[int, float]:
        """Class of the nearest template, and the distance to it."""
        if (style, station) not in self._templates:
            self._templates[style, station] = self.encode(templates(style, station))
        crop = self.landmark(frame_CHW, view_column)
        distance = (self._templates[style, station] - crop).square().mean((1, 2, 3))
        return int(distance.argmin()), float(distance.min())

    def bare_views(self, style: Style) -> Tensor:
        """Rows without landmarks of the true view at every heading, [RING_COLUMNS, C, rows, W]."""
        if style not in self._views:
            ring = np.clip(np.round(background(style)), 0, 255).astype(np.uint8)
            views = np.stack([view(ring, heading * TOKEN) for heading in range(RING_COLUMNS)])
            self._views[style] = bare_rows(self.encode(views))
        return self._views[style]

    def start(self, film_CTHW: Tensor, path: np.ndarray, style: Style) -> int:
        """Heading of the first frame of a video whose camera turns along `path` [T].

        It is the heading at which background and landmarks are nearest to those of the true world.
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
        """Mean distance of the landmarks in full view at `heading` to their nearest templates."""
        visible = stations_in_view(heading)
        return float(np.mean([self.classify(frame_CHW, column, style, station)[1] for station, column in visible]))


def turns(film_CTHW: Tensor) -> np.ndarray:
    """Columns by which the camera turns between consecutive frames, [T - 1]: the shift with the least squared error."""
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
    """Heading of every frame relative to the first one, in columns, [T]."""
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
    """Measure a video against the benchmark script that it was generated from."""
    path, expected = path_of(film), np.array(script.headings)
    lead = slice(0, script.target_frame + 1, CHUNK)
    start = world.start(film[:, lead], expected[lead], style)
    before, after = film[:, script.target_frame], film[:, script.return_frame + 1]
    first, remembered, returned, errors, residuals = [], [], [], [], []
    for station, column in stations_in_view(script.target_heading + start):
        frame, first_column = _first_view(station, expected + start)
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
        heading_accuracy=float((path == expected - expected[0]).mean()),
        motion=float(np.abs(np.diff(path)).mean() / np.abs(np.diff(expected)).mean()),
        change=_change(world, film, expected + start, style),
        residual=float(np.mean(residuals)),
    )


def judge_long(world: World, film: Tensor, moves: Sequence[int], style: Style, reach: Sequence[float]) -> LongTrial:
    """Measure a long video by quarters; `moves` and `reach` (latent frames) have one entry per chunk.

    Landmarks and palette are measured at the heading that the turns of the camera add up to. A camera that lost its
    heading therefore lowers the heading accuracy only, which starts anew in every quarter.

    Raises ValueError unless `moves` are four equal quarters with a move in each.
    """
    if len(moves) % QUARTERS or not all(any(quarter) for quarter in np.split(np.array(moves), QUARTERS)):
        raise ValueError(f"moves: {len(moves)} chunks are not {QUARTERS} equal quarters that all move")
    path, expected = path_of(film), headings(moves)
    lead = slice(0, _LEAD_FRAMES, CHUNK)
    start = world.start(film[:, lead], path[lead], style)
    looks = (path + start) % RING_COLUMNS
    bare, views = bare_rows(film.movedim(1, 0)), world.bare_views(style)
    palette = (bare.mean((2, 3)) - views.mean((2, 3))[looks]).norm(dim=1).cpu().numpy()
    residual = np.array([world.sharpness(film[:, t], heading, style) for t, heading in enumerate(looks)])
    quarters = np.array_split(np.arange(film.shape[1]), QUARTERS)
    turned = lambda headings: float(np.abs(np.diff(headings)).sum())
    return LongTrial(
        palette=tuple(float(palette[q].mean()) for q in quarters),
        residual=tuple(float(residual[q].mean()) for q in quarters),
        heading_accuracy=tuple(float((path[q] - path[q[0]] == expected[q] - expected[q[0]]).mean()) for q in quarters),
        motion=tuple(turned(path[q]) / turned(expected[q]) for q in quarters),
        change=tuple(_change(world, film[:, q], expected[q] + start, style) for q in quarters),
        reach=tuple(float(np.mean(part)) for part in np.split(np.array(reach), QUARTERS)),
    )


def _first_view(station: int, path: np.ndarray) -> tuple[int, int]:
    """First frame of a path with a landmark in full view, and the landmark's column in it."""
    views = ((frame, dict(stations_in_view(heading))) for frame, heading in enumerate(path))
    return next((frame, columns[station]) for frame, columns in views if station in columns)


def _change(world: World, film: Tensor, path: np.ndarray, style: Style) -> float:
    """Mean absolute difference of consecutive frames without landmarks, relative to the true world along `path`."""
    true = world.bare_views(style)[path % RING_COLUMNS]
    difference = lambda frames: (frames[1:] - frames[:-1]).abs().mean()
    return float(difference(bare_rows(film.movedim(1, 0))) / difference(true))
