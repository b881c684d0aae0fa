"""Colours of the demo world: RGB triples in 0..255."""

import numpy as np

from .prompts import Style

SKY = {
    # (zenith, middle, horizon)
    "day": ((72, 148, 232), (128, 194, 244), (206, 234, 246)),
    "dusk": ((82, 66, 142), (214, 112, 134), (255, 196, 120)),
    "night": ((18, 24, 66), (36, 48, 104), (76, 88, 150)),
}
SKY_TINT = {
    # Added with the cosine and with the sine of the heading, so that every heading has its own sky.
    "day": ((30, -2, -4), (-22, 14, -14)),
    "dusk": ((14, -16, 22), (-20, 10, 16)),
    "night": ((18, -4, 10), (-10, 18, 2)),
}
OVERCAST = {"day": (176, 190, 204), "dusk": (176, 130, 146), "night": (58, 64, 96)}
CLOUD = {
    # (lit top, shaded bottom)
    "day": ((255, 255, 255), (208, 222, 238)),
    "dusk": ((255, 206, 172), (190, 112, 140)),
    "night": ((96, 106, 158), (56, 64, 112)),
}
OVERCAST_CLOUD = {
    "day": ((228, 234, 240), (168, 180, 198)),
    "dusk": ((226, 166, 156), (146, 102, 132)),
    "night": ((88, 94, 130), (44, 50, 82)),
}
FOG = {"day": (222, 230, 234), "dusk": (232, 186, 170), "night": (84, 94, 134)}
LIGHT = {"day": (1.0, 1.0, 1.0), "dusk": (0.92, 0.70, 0.72), "night": (0.46, 0.54, 0.80)}
"""Multiplies everything that is not sky."""
LANDMARK_LIGHT = {"day": (1.0, 1.0, 1.0), "dusk": (0.98, 0.82, 0.82), "night": (0.74, 0.74, 0.94)}
"""Weaker than LIGHT, so that the colours of landmarks can be distinguished at night."""
WINDOW = {"day": (82, 110, 150), "dusk": (255, 212, 120), "night": (255, 218, 116)}

MOUNTAIN = ((132, 146, 190), (116, 164, 176), (146, 132, 178), (176, 138, 158))
"""Four anchors around the ring, blended by heading."""
SNOWCAP = (246, 248, 252)
GROUND = {
    # (far, near, dark texture, light texture, path, hills)
    "meadow": ((150, 200, 92), (82, 156, 66), (58, 126, 56), (172, 214, 96), (206, 178, 120), (104, 166, 96)),
    "desert": ((240, 208, 138), (222, 168, 92), (188, 130, 70), (250, 222, 156), (176, 124, 76), (226, 176, 112)),
    "snow": ((238, 244, 250), (206, 222, 240), (166, 190, 222), (252, 254, 255), (146, 190, 226), (206, 220, 238)),
}
FOREST = {"meadow": (54, 112, 78), "desert": (142, 120, 70), "snow": (88, 124, 136)}
FLOWERS = ((244, 232, 120), (250, 160, 170), (250, 250, 250))

LANDMARK_RGB = ((220, 44, 40), (250, 186, 20), (30, 150, 52), (20, 176, 226), (104, 52, 206), (250, 104, 190))
"""Red, gold, green, cyan, violet, pink."""


def rgb(colour: tuple[float, ...]) -> np.ndarray:
    return np.asarray(colour, dtype=np.float32)


def mix(a: np.ndarray, b: np.ndarray, weight: float | np.ndarray) -> np.ndarray:
    """`a` where `weight` is 0, `b` where it is 1."""
    return a + (b - a) * weight


def lit(colour: np.ndarray, style: Style, light: dict[str, tuple[float, ...]] = LIGHT) -> np.ndarray:
    """`colour` [..., 3] under the light of the style, without the fog."""
    out = colour * rgb(light[style.time])
    if style.weather == "cloudy":
        grey = out.mean(axis=-1, keepdims=True)
        out = mix(out, grey, 0.18) * 0.94
    return out
