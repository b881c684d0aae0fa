"""Figures of one video against the true demo world: recall, sharpness, palette, motion (docs/demo_student.md, Metrics).

A still picture has perfect recall. Figures of consistency are therefore always reported with figures of motion.

Shapes: C latent channels, T latent frames, H W latent rows and columns. A video is [C, T, H, W], normalised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ...model.codecs.demo_vae import DemoCodec
from ...video.pipeline import Pipeline
from ..world.background import background
from ..world.camera import headings, view
from ..world.geometry import CHUNK, LANDMARK_COLUMNS, LANDMARK_TOP, RING_COLUMNS, TOKEN, stations_in_view
from ..world.prompts import ALL_STYLES, Style
from ..world.scene import templates
from ..world.scripts import Script

QUARTERS = 4
TURNS = (0, 1, -1, 2, -2)
"""Columns by which the camera can turn between two frames. Of equally good turns the first is taken."""
PER_TOKEN = 2
"""Latent rows and columns per token."""
WHOLE = 0.1
"""Distance to the nearest template below which a landmark is drawn whole: the mean squared difference of latents.

True landmarks that went through the codec have 0.002 at most, those with noise of standard deviation 0.3 have 0.09.
Of even mixtures of two classes 5 % are below, of landmarks with one quarter of another class 5 %.
"""
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
    whole: tuple[bool, ...]
    """Whether the target was drawn whole before the camera left: nearer than WHOLE to its nearest template."""
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
        return float(np.equal(self.remembered, self.returned).mean())

    @property
    def recall_whole(self) -> float | None:
        """Recall of the targets that were drawn whole before the camera left; None if there is none."""
        return float(np.equal(self.remembered, self.returned)[list(self.whole)].mean()) if any(self.whole) else None

    @property
    def share_whole(self) -> float:
        """Share of targets that were drawn whole before the camera left."""
        return float(np.mean(self.whole))

    @property
    def recall_first(self) -> float:
        """Share of targets with the same class at first sight and after the return."""
        return float(np.equal(self.first, self.returned).mean())


@dataclass(frozen=True)
class LongTrial:
    """Figures of one long rollout, one value per quarter."""

    palette: tuple[float, ...]
    """Distance of a frame's mean latent, without its landmarks, to that of the true world at the same heading."""
    palette_any: tuple[float, ...]
    """The same to the nearest heading: a wrong heading does not count."""
    palette_own: tuple[float | None, ...]
    """Distance of a frame's mean latent to the film's own in the first quarter at the same heading. None: there is no
    frame at a heading of the first quarter."""
    style: tuple[float, ...]
    """Share of frames whose mean latent is nearer to a true view of the prompted style than to one of another."""
    residual: tuple[float, ...]
    """Distance of landmarks in full view to their nearest template. It measures sharpness; smaller is better."""
    heading_accuracy: tuple[float, ...]
    motion: tuple[float, ...]
    change: tuple[float, ...]
    reach: tuple[float, ...]
    """Age of the oldest remembered frame outside the sink, in latent frames, mean over the chunks of the quarter."""


class World:
    """The true world in latents: the reference for generated latents."""

    def __init__(self, pipeline: Pipeline):
        assert isinstance(pipeline.vae, DemoCodec)
        self.codec, self.device = pipeline.vae, pipeline.device
        self._templates = cache(lambda style, station: self.encode(templates(style, station)))
        self.bare_views = cache(self._bare_views)

    def encode(self, art_uint8: np.ndarray) -> Tensor:
        """Art pixels [..., H, W, 3] -> latents [N, C, h, w]."""
        art = torch.from_numpy(np.array(art_uint8)).to(self.device).float() / 127.5 - 1
        return self.codec.encode_art(art.flatten(0, -4)[None])[0].movedim(1, 0)

    def classify(self, frame_CHW: Tensor, view_column: int, style: Style, station: int) -> tuple[int, float]:
        """Class of the nearest template, and the distance to it."""
        distance = (self._templates(style, station) - landmark(frame_CHW, view_column)).square().mean((1, 2, 3))
        return int(distance.argmin()), float(distance.min())

    def _bare_views(self, style: Style) -> Tensor:
        """Rows without landmarks of the true view at every heading, [RING_COLUMNS, C, rows, W]."""
        ring = np.round(background(style)).astype(np.uint8)
        return bare_rows(self.encode(np.stack([view(ring, heading * TOKEN) for heading in range(RING_COLUMNS)])))

    def palette(self, style: Style) -> Tensor:
        """Mean latent of the true view at every heading, without landmarks, [RING_COLUMNS, C]."""
        return self.bare_views(style).mean((2, 3))

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


def landmark(frame_CHW: Tensor, view_column: int) -> Tensor:
    """The 2 x 2 tokens of a landmark, [C, h, w]."""
    top, left, size = (PER_TOKEN * tokens for tokens in (LANDMARK_TOP // TOKEN, view_column, LANDMARK_COLUMNS))
    return frame_CHW[:, top : top + size, left : left + size]


def path_of(film_CTHW: Tensor) -> np.ndarray:
    """Heading of every frame relative to the first one, in columns, [T].

    The camera turns between two frames by the shift with the least squared error.
    """
    before, after, width = film_CTHW[:, :-1], film_CTHW[:, 1:], film_CTHW.shape[-1]
    errors = []
    for turn in TURNS:
        ahead, behind = PER_TOKEN * max(0, turn), PER_TOKEN * max(0, -turn)
        both = before[..., ahead : width - behind], after[..., behind : width - ahead]
        errors.append((both[0] - both[1]).square().mean((0, 2, 3)))
    turns = np.array(TURNS)[torch.stack(errors).argmin(0).cpu().numpy()]
    return np.concatenate([[0], turns.cumsum()])


def bare_rows(frames_TCHW: Tensor) -> Tensor:
    """The token rows that no landmark covers: the topmost and the lowest."""
    return frames_TCHW[:, :, [*range(PER_TOKEN), *range(-PER_TOKEN, 0)]]


def judge(world: World, film: Tensor, script: Script, style: Style) -> Trial:
    """Measure a video against the benchmark script that it was generated from."""
    path, expected = path_of(film), np.array(script.headings)
    lead = slice(0, script.target_frame + 1, CHUNK)
    start = world.start(film[:, lead], expected[lead], style)
    before, after = film[:, script.target_frame], film[:, script.return_frame + 1]
    targets = stations_in_view(script.target_heading + start)
    first = []
    for target, _ in targets:
        views = ((film[:, t], *each) for t, h in enumerate(expected + start) for each in stations_in_view(h))
        frame, column = next((frame, column) for frame, station, column in views if station == target)
        first.append(world.classify(frame, column, style, target)[0])
    remembered, distances = zip(*[world.classify(before, column, style, station) for station, column in targets])
    returned, residuals = zip(*[world.classify(after, column, style, station) for station, column in targets])
    errors = [(landmark(before, column) - landmark(after, column)).square().mean() for _, column in targets]
    return Trial(
        first=tuple(first),
        remembered=remembered,
        returned=returned,
        whole=tuple(distance < WHOLE for distance in distances),
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
    means, true = bare_rows(film.movedim(1, 0)).mean((2, 3)), world.palette(style)
    palette = (means - true[looks]).norm(dim=1).cpu().numpy()
    nearest = {each: torch.cdist(means, world.palette(each)).amin(1) for each in ALL_STYLES}
    is_style = (nearest[style] <= torch.stack([*nearest.values()]).amin(0)).cpu().numpy()
    residual = np.array([world.sharpness(film[:, t], heading, style) for t, heading in enumerate(looks)])
    quarters = np.array_split(np.arange(film.shape[1]), QUARTERS)
    each = lambda figure: tuple(float(figure(quarter)) for quarter in quarters)
    own = _palette_own(means, path, quarters[0])
    turned = lambda headings: np.abs(np.diff(headings)).sum()
    return LongTrial(
        palette=each(lambda q: palette[q].mean()),
        palette_any=each(lambda q: nearest[style][q].mean()),
        palette_own=tuple(float(np.nanmean(own[q])) if np.isfinite(own[q]).any() else None for q in quarters),
        style=each(lambda q: is_style[q].mean()),
        residual=each(lambda q: residual[q].mean()),
        heading_accuracy=each(lambda q: (path[q] - path[q[0]] == expected[q] - expected[q[0]]).mean()),
        motion=each(lambda q: turned(path[q]) / turned(expected[q])),
        change=each(lambda q: _change(world, film[:, q], expected[q] + start, style)),
        reach=tuple(np.reshape(reach, (QUARTERS, -1)).mean(1).tolist()),
    )


def _palette_own(means_TC: Tensor, path: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Distance of every frame's mean latent to that of the frames `first` at the same heading, [T]; NaN without one."""
    distance = np.full(len(path), np.nan)
    for heading in np.unique(path[first] % RING_COLUMNS):
        here = np.flatnonzero(path % RING_COLUMNS == heading)
        reference = means_TC[np.intersect1d(here, first)].mean(0)
        distance[here] = (means_TC[here] - reference).norm(dim=1).cpu().numpy()
    return distance


def _change(world: World, film: Tensor, path: np.ndarray, style: Style) -> float:
    """Mean absolute difference of consecutive frames without landmarks, relative to the true world along `path`."""
    true = world.bare_views(style)[path % RING_COLUMNS]
    difference = lambda frames: (frames[1:] - frames[:-1]).abs().mean()
    return float(difference(bare_rows(film.movedim(1, 0))) / difference(true))
