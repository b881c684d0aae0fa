"""The background of the ring. It depends on heading and style only and is the same in every scene."""

from functools import cache

import numpy as np

from . import palette
from .geometry import NUM_STATIONS, RING_WIDTH, VIEW_HEIGHT
from .palette import lit, mix, rgb
from .prompts import Style

HORIZON = 18
"""First art row of the ground."""

_X = np.arange(RING_WIDTH, dtype=np.float32)[None, :]
_Y = np.arange(VIEW_HEIGHT, dtype=np.float32)[:, None]
_ANGLE = 2 * np.pi * _X / RING_WIDTH

# One giant, a pair of twins, ranges and passes between.
_PEAK_COLUMNS = (14, 40, 92, 124, 146, 172, 208, 242, 276, 296, 322, 356, 376)
_PEAK_HEIGHTS = (9, 6, 5, 10, 8, 6, 16, 8, 13, 13, 7, 10, 6)
_PEAK_WIDTHS = (22, 16, 20, 20, 18, 18, 30, 18, 16, 16, 18, 24, 14)
_SUN_COLUMN = 68
# (art column, row of the flat bottom, half width)
_CLEAR_CLOUDS = ((20, 6, 10), (112, 5, 8), (160, 7, 11), (250, 5, 9), (330, 6, 12))
_OVERCAST_CLOUDS = tuple(
    zip(
        (8, 38, 66, 94, 126, 148, 176, 228, 254, 284, 312, 338, 362),
        (6, 8, 4, 7, 4, 8, 6, 5, 8, 4, 7, 4, 8),
        (14, 10, 12, 13, 11, 10, 14, 12, 11, 13, 11, 12, 10),
    )
)
_CASTLE = ("...kk...", "kk.kk.kk", "kkkyykkk", "kkkkkkkk")
"""k stone, y window; a row is two art pixels high."""


def _ring_delta(column: float | np.ndarray) -> np.ndarray:
    """Signed art pixels from a column, or columns [N, 1], the short way round, [N, W]."""
    return (_X - column + RING_WIDTH / 2) % RING_WIDTH - RING_WIDTH / 2


def _waves(*terms: tuple[int, float, float]) -> np.ndarray:
    """Sum of (turns around the ring, amplitude, phase) cosines [1, W]: continuous over the wrap."""
    return np.sum([amplitude * np.cos(turns * _ANGLE + phase) for turns, amplitude, phase in terms], axis=0)


def _paint(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    canvas[...] = np.where(mask[..., None], colour, canvas)


def _sky(style: Style) -> np.ndarray:
    zenith, middle, horizon = (rgb(colour) for colour in palette.SKY[style.time])
    height = np.clip(_Y / (HORIZON - 2), 0, 1)[..., None]
    sky = np.where(height < 0.5, mix(zenith, middle, height * 2), mix(middle, horizon, height * 2 - 1))
    with_cos, with_sin = (rgb(tint) for tint in palette.SKY_TINT[style.time])
    sky = sky + with_cos * np.cos(_ANGLE)[..., None] + with_sin * np.sin(_ANGLE)[..., None]
    if style.weather == "cloudy":
        sky = mix(sky, rgb(palette.OVERCAST[style.time]), 0.62)
    return np.broadcast_to(sky, (VIEW_HEIGHT, RING_WIDTH, 3)).copy()


def _stars(canvas: np.ndarray) -> None:
    rng = np.random.default_rng(11)
    for index in range(72):
        column, row = 2 * int(rng.integers(RING_WIDTH // 2)), 2 * int(rng.integers(4))
        size = 2 if index % 4 == 0 else 1
        canvas[row : row + size, column : column + size] += 90 if size == 2 else 60


def _sun_and_moon(canvas: np.ndarray, style: Style) -> None:
    row = {"day": 4.0, "dusk": 9.5, "night": 4.5}[style.time]
    distance = np.hypot(_ring_delta(_SUN_COLUMN), _Y - row)
    strength = {"clear": 1.0, "cloudy": 0.45, "foggy": 0.7}[style.weather]
    reach = {"day": 20, "dusk": 44, "night": 16}[style.time]
    glow = np.clip(1 - distance / reach, 0, 1)[..., None] ** 2 * strength
    tone = {"day": (255, 250, 214), "dusk": (255, 190, 96), "night": (196, 208, 255)}[style.time]
    canvas[...] = mix(canvas, rgb(tone), glow * 0.75)
    disc = (distance < 4.2).astype(np.float32)
    if style.time == "night":
        disc *= np.hypot(_ring_delta(_SUN_COLUMN + 3), _Y - row + 1.5) > 3.4
    face = {"day": (255, 236, 130), "dusk": (255, 226, 140), "night": (250, 246, 216)}[style.time]
    canvas[...] = mix(canvas, rgb(face), disc[..., None] * strength)


def _clouds(canvas: np.ndarray, style: Style) -> None:
    if style.weather == "foggy":
        return
    overcast = style.weather == "cloudy"
    table = palette.OVERCAST_CLOUD if overcast else palette.CLOUD
    top, bottom = (rgb(colour) for colour in table[style.time])
    for column, row, size in _OVERCAST_CLOUDS if overcast else _CLEAR_CLOUDS:
        puffs = [
            np.hypot(_ring_delta(column + shift * size) / scale, (_Y - row + lift) / (scale * 0.66)) < 1
            for shift, lift, scale in ((-0.55, 0.4, 0.42 * size), (-0.05, 1.4, 0.5 * size), (0.5, 0.6, 0.46 * size))
        ]
        shade = np.clip((_Y - row + 4) / 3, 0, 1)[..., None]
        _paint(canvas, np.any(puffs, axis=0) & (_Y < row), mix(top, bottom, np.round(shade * 2) / 2))


def _mountains(canvas: np.ndarray, style: Style) -> None:
    jag = np.round(_waves((29, 0.7, 1.0), (47, 0.6, 2.0), (71, 0.4, 0.0)))
    columns, peaks, widths = np.array([_PEAK_COLUMNS, _PEAK_HEIGHTS, _PEAK_WIDTHS], dtype=np.float32)[..., None]
    deltas = _ring_delta(columns)
    heights = peaks * (1 - np.abs(deltas) / widths)
    owner = heights.argmax(axis=0)
    skyline = np.maximum(heights.max(axis=0), 2.0) + 0.5 * jag
    depth = _Y - (HORIZON - skyline)
    anchors = [rgb(colour) for colour in palette.MOUNTAIN]
    near = [np.clip(np.cos(_ANGLE - index * np.pi / 2), 0, 1)[..., None] ** 2 for index in range(4)]
    tone = np.sum([anchor * weight for anchor, weight in zip(anchors, near)], axis=0)
    if style.ground == "desert":
        tone = mix(tone, rgb((206, 132, 96)), 0.45)
    shaded = deltas[owner, np.arange(RING_WIDTH)] + jag > depth * 0.25
    body = np.where(shaded[..., None], tone * 0.80, tone * 1.06)
    tall = peaks[owner, 0]
    cap = (depth < tall * 0.34 - 1 + jag) & (tall >= 10)
    body = np.where(cap[..., None], rgb(palette.SNOWCAP) * np.where(shaded, 0.84, 1.0)[..., None], body)
    # Haze: a share of the sky behind, larger towards the foot.
    haze = np.clip(0.12 + 0.03 * depth, 0, 0.5)[..., None]
    _paint(canvas, depth >= 0, mix(lit(body, style), canvas, haze))


def _hills(canvas: np.ndarray, style: Style) -> None:
    hills = rgb(palette.GROUND[style.ground][5])
    far = HORIZON - 2.2 - _waves((5, 1.0, 0.4), (9, 0.8, 2.1), (14, 0.4, 4.0))
    _paint(canvas, _Y >= far, lit(mix(hills, rgb(palette.MOUNTAIN[0]), 0.30), style))
    if style.ground == "desert":
        _mesas(canvas, style)
    else:
        _forest(canvas, style, far)
    _castle(canvas, style)
    close = HORIZON - 0.6 - _waves((4, 0.8, 3.0), (7, 0.7, 1.1))
    _paint(canvas, _Y >= close, lit(hills, style))


def _forest(canvas: np.ndarray, style: Style, far: np.ndarray) -> None:
    colour = rgb(palette.FOREST[style.ground])
    # Woods on a quarter of the ring and single copses elsewhere: every heading looks different.
    woods = np.clip(_waves((1, 1.0, -5.2), (6, 0.35, 1.0)) - 0.35, 0, 1) * 3.2
    copses = 3.0 * (np.abs(_ring_delta(140)) < 9) + 2.0 * (np.abs(_ring_delta(22)) < 5)
    teeth = 1.4 * np.abs((_X + 2) % 6 - 3) / 3
    height = np.where(woods + copses > 0.3, woods + copses + 1.6 - teeth * 1.6, 0)
    mask = (_Y >= far - height + 1.5) & (height > 0)
    _paint(canvas, mask, lit(np.where((((_X + 2) % 6) < 3)[..., None], colour * 1.15, colour), style))


def _mesas(canvas: np.ndarray, style: Style) -> None:
    for column, half_width, height in ((140, 9, 6), (318, 13, 5), (336, 6, 8), (22, 6, 4)):
        delta = _ring_delta(column)
        mask = (np.abs(delta) < half_width + (_Y - HORIZON + height) * 0.3) & (_Y >= HORIZON - height)
        strata = np.where((_Y % 3) < 1, 0.86, 1.0) * np.where(delta > half_width * 0.3, 0.80, 1.0)
        _paint(canvas, mask, lit(rgb((204, 116, 78)) * strata[..., None], style))


def _castle(canvas: np.ndarray, style: Style) -> None:
    stone = lit(rgb((124, 116, 150)), style)
    window = rgb(palette.WINDOW[style.time])
    for i, line in enumerate(_CASTLE):
        for j, key in enumerate(line):
            if key != ".":
                top, shade = HORIZON - 10 + 2 * i, 1.12 if j < 4 else 0.88
                canvas[top : top + 2, 88 + j] = window if key == "y" else stone * shade


def _ground(canvas: np.ndarray, style: Style) -> None:
    far, near, dark, light, path, _ = (rgb(colour) for colour in palette.GROUND[style.ground])
    depth = np.clip((_Y - HORIZON) / (VIEW_HEIGHT - 1 - HORIZON), 0, 1)[..., None]
    ground = np.broadcast_to(mix(far, near, depth), canvas.shape).copy()
    patches = _waves((3, 0.5, 0.0), (8, 0.5, 1.0)) + np.cos(11 * _ANGLE + _Y * 0.5) * 0.6
    ground += (np.round(np.clip(patches, -1, 1)) * 5.0)[..., None]
    _texture(ground, dark, light, style)
    centre = 27 + _waves((4, 1.4, 0.5), (7, 1.0, 2.0), (2, 0.8, 4.0))
    width = 1.7 + 0.4 * np.cos(10 * _ANGLE)
    edge = np.abs(_Y - centre)
    _paint(ground, edge < width + 0.8, mix(ground, dark, 0.35))
    _paint(ground, edge < width, path)
    # 24 divides the ring: worn patches have no seam.
    worn = (edge < width) & ((_X + 3 * _Y) % 24 < 5) & (centre > _Y)
    _paint(ground, worn, mix(path, light, 0.4))
    _paint(canvas, _Y >= HORIZON, lit(ground, style))


def _texture(ground: np.ndarray, dark: np.ndarray, light: np.ndarray, style: Style) -> None:
    """Tufts, ripples, drifts and flowers fixed to the ring, which make the motion of the camera visible."""
    rng = np.random.default_rng({"meadow": 1, "desert": 2, "snow": 3}[style.ground])
    for _ in range(230):
        row = HORIZON + 1 + int(rng.random() ** 0.8 * (VIEW_HEIGHT - HORIZON - 2))
        column = int(rng.integers(RING_WIDTH))
        size = 1 + (row - HORIZON) // 4
        width = size + 1 if style.ground == "meadow" else 2 * size + 2
        columns = (column + np.arange(width)) % RING_WIDTH
        ink = light if rng.random() < 0.45 else dark
        ground[row, columns] = mix(ground[row, columns], ink, 0.45)
        if style.ground == "meadow" and row > HORIZON + 3:
            ground[row - 1, columns[::2]] = mix(ground[row - 1, columns[::2]], ink, 0.35)
    for index in range(3 * NUM_STATIONS if style.ground == "meadow" else 0):
        row = int(rng.integers(HORIZON + 3, VIEW_HEIGHT - 2))
        columns = (int(rng.integers(RING_WIDTH)) + np.arange(2)) % RING_WIDTH
        ground[row, columns] = mix(ground[row, columns], rgb(palette.FLOWERS[index % 3]), 0.85)


def _fog(canvas: np.ndarray, style: Style) -> None:
    """Fog is densest at the horizon and thin at the bottom; the heading stays recognisable."""
    above = np.clip((_Y + 14) / (HORIZON + 14), 0, 1)
    below = np.clip(1 - (_Y - HORIZON) / 13, 0, 1)
    density = np.where(_Y < HORIZON, 0.26 + 0.32 * above, 0.16 + 0.42 * below)
    density = density + 0.07 * np.cos(6 * _ANGLE + _Y * 0.35) * np.cos(2 * _ANGLE)
    canvas[...] = mix(canvas, rgb(palette.FOG[style.time]), np.clip(density, 0, 0.8)[..., None])


@cache
def background(style: Style) -> np.ndarray:
    """The whole ring without landmarks, float32 [32, 384, 3] in 0..255, read-only."""
    canvas = _sky(style)
    if style.time == "night" and style.weather == "clear":
        _stars(canvas)
    _sun_and_moon(canvas, style)
    _clouds(canvas, style)
    _mountains(canvas, style)
    _hills(canvas, style)
    _ground(canvas, style)
    if style.weather == "foggy":
        _fog(canvas, style)
    canvas = np.clip(canvas, 0, 255).astype(np.float32)
    canvas.setflags(write=False)
    return canvas
