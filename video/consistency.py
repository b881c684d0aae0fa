"""Similarity of a video's frames to its first frame, by features of any kind, beside the motion of the same frames.

A still picture is perfectly consistent: similarity is never shown without motion.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .sheet import FAINT, LEFT, RIGHT, Axes, Sheet, at_time

FeatureExtractor = Callable[[Sequence[np.ndarray]], Tensor]
"""uint8 pictures [H, W, 3] -> features of unit length [N, features], float32, on the CPU."""

BATCH = 16
"""Frames that an extractor is called with."""
COLOUR_LEVELS = 16
LINES = ((11, 111, 184), (217, 87, 26), (44, 138, 75))


@dataclass(frozen=True, kw_only=True)
class ConsistencyCurve:
    """Sampled frames over time; `times`, `motion` and every entry of `similarity` have the same length."""

    fps: float
    num_frames: int
    """Pixel frames of the video."""
    times: tuple[float, ...]
    """Seconds of the sampled frames."""
    similarity: dict[str, tuple[float, ...]]
    """Name of an extractor -> cosine of each frame's feature with the first frame's."""
    motion: tuple[float, ...]
    """Mean absolute difference of consecutive pixel frames since the sample before, in % of the full range (all pixels
    and colours; no optical flow). 0 for the first."""


def measure_consistency(
    frames: Iterable[np.ndarray],
    fps: float,
    extractors: Mapping[str, FeatureExtractor],
    every: float,
    name: str = "the video",
) -> ConsistencyCurve:
    """Sample frames, uint8 [H, W, 3], every `every` seconds as they stream. Memory use does not grow with length.

    Raises ValueError, with the `name` of the video, if there are fewer than two samples.
    """
    step = every * fps
    if step < 1:
        raise ValueError(
            f"every: {every:g} s is less than a frame of {name} ({fps:g} per second); give {1 / fps:g} or more"
        )
    times, motion, batch, changes, before = [], [], [], [], None
    features: dict[str, list[Tensor]] = {kind: [] for kind in extractors}
    count = 0
    for count, frame in enumerate(frames, 1):
        if before is not None:
            changes.append(np.abs(frame.astype(np.int16) - before).mean() / 2.55)
        before = frame.astype(np.int16)
        if count - 1 == math.floor(len(times) * step + 0.5):
            times.append((count - 1) / fps)
            motion.append(float(np.mean(changes)) if changes else 0.0)
            batch.append(frame)
            changes.clear()
            if len(batch) == BATCH:
                _extract(extractors, batch, features)
    if batch:
        _extract(extractors, batch, features)
    if len(times) < 2:
        raise ValueError(f"every: {every:g} s; {name} has {count / fps:g} s, too short for two samples")
    similarity = {}
    for kind, parts in features.items():
        values = torch.cat(parts)
        similarity[kind] = tuple((values @ values[0]).tolist())
    return ConsistencyCurve(fps=fps, num_frames=count, times=tuple(times), similarity=similarity, motion=tuple(motion))


def _extract(
    extractors: Mapping[str, FeatureExtractor], batch: list[np.ndarray], features: Mapping[str, list[Tensor]]
) -> None:
    """Append the features of a batch, and empty it."""
    for kind, extractor in extractors.items():
        features[kind].append(extractor(batch))
    batch.clear()


def palette(pictures: Sequence[np.ndarray]) -> Tensor:
    """An extractor of colours, not of places: cosines of its features are Bhattacharyya coefficients.

    Features are square roots of histograms with 16 levels per channel, blurred over neighbouring levels.
    """
    histograms = []
    for picture in pictures:
        red, green, blue = (picture.reshape(-1, 3) // (256 // COLOUR_LEVELS)).astype(np.int64).T
        counts = np.bincount((red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue, minlength=COLOUR_LEVELS**3)
        histograms.append(torch.from_numpy(counts).float().view(1, *(3 * [COLOUR_LEVELS])))
    blurred = torch.stack(histograms)
    for _ in range(2):
        blurred = F.avg_pool3d(blurred, 3, stride=1, padding=1)
    return F.normalize(blurred.sqrt().flatten(1), dim=-1)


def describe(curve: ConsistencyCurve) -> str:
    """A line per extractor and one for motion: mean, minimum, its time, and the end."""
    seconds = curve.num_frames / curve.fps
    lines = [f"{curve.num_frames} frames ({seconds:.1f} s), {len(curve.times)} looked at"]
    for name, values in curve.similarity.items():
        least = int(np.argmin(values))
        lines.append(
            f"{name}: similarity to the first frame {np.mean(values[1:]):.3f} on average, least {values[least]:.3f} at"
            f" {at_time(curve.times[least], seconds)}, {values[-1]:.3f} at the end"
        )
    motion = curve.motion[1:]
    lines.append(
        f"motion: {np.mean(motion):.2f} % mean change frame to frame, {min(motion):.2f} to {max(motion):.2f} %"
    )
    return "\n".join(lines)


def draw_consistency(curves: Mapping[str, ConsistencyCurve]) -> Image.Image:
    """Similarity to the first frame over time, one panel per extractor, above the motion of the same frames.

    `curves` are those of one or more videos by name, all with the same extractors.
    """
    sheet, several = Sheet(), len(curves) > 1
    for name, curve in curves.items():
        sheet.text(f"{name}: {describe(curve)}" if several else describe(curve), size=16)
    sheet.text("A still picture is perfectly consistent: read the curves together.", 13, FAINT)
    if several:
        sheet.legend({name: LINES[i % len(LINES)] for i, name in enumerate(curves)})
    for name in next(iter(curves.values())).similarity:
        low = min(0.9, *(min(curve.similarity[name]) for curve in curves.values()))
        lines = [(curve.times, curve.similarity[name]) for curve in curves.values()]
        _panel(sheet, f"{name}: cosine to the first frame", lines, (low - 0.1 * (1 - low), 1.0))
    high = 1.1 * max(1.0, *(max(curve.motion) for curve in curves.values()))
    # The first frame has no frame before it.
    lines = [(curve.times[1:], curve.motion[1:]) for curve in curves.values()]
    _panel(sheet, "motion: mean change frame to frame, % of the full range", lines, (0.0, high))
    return sheet.finished()


def _panel(
    sheet: Sheet, title: str, lines: Sequence[tuple[Sequence[float], Sequence[float]]], limits: tuple[float, float]
) -> None:
    """One line per pair of times and values."""
    sheet.room(10)
    sheet.text(title, 14)
    top = sheet.room(200) + 8
    seconds = max(times[-1] for times, _ in lines)
    axes = Axes(top=top, bottom=top + 160, seconds=seconds, low=limits[0], high=limits[1])
    axes.levels(sheet.draw)
    sheet.draw.line((LEFT, axes.bottom, RIGHT, axes.bottom), FAINT)
    axes.clock(sheet.draw)
    for i, (times, values) in enumerate(lines):
        colour = LINES[i % len(LINES)]
        points = [(axes.x(at), axes.y(value)) for at, value in zip(times, values)]
        sheet.draw.line(points, colour, 2, joint="curve")
        for x, y in points if len(points) <= 150 else ():
            sheet.draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
