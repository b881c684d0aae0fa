"""The landmarks as 16 x 16 pixel art: four shapes in six colours."""

from functools import cache

import numpy as np

from .geometry import LANDMARK
from .palette import FOG, LANDMARK_LIGHT, LANDMARK_RGB, WINDOW, lit, mix, rgb
from .prompts import Style

SHAPES = ("house", "pine", "tower", "balloon")
NUM_COLOURS = len(LANDMARK_RGB)
NUM_CLASSES = len(SHAPES) * NUM_COLOURS

# Own colour: o outline, d dark, m middle, l light, h pale. Others: w white, b wood, k dark, y window,
# s shadow on whatever is behind, . nothing.
_ART = {
    "house": """
        .......oo.......
        ......ollo......
        .....ollmmo.bb..
        ....ollmmmmobb..
        ...ollmmmmmmob..
        ..ollmmmmmmmdo..
        .ollmmmmmmmmddo.
        ollmmmmmmmmmdddo
        ollmmmmmmmmmdddo
        .oooooooooooooo.
        .ohhhhhhhhhhhmo.
        .ohhhhhkkhhhhmo.
        .oyyhhkbbkhhyyo.
        .oyyhhkbbkhhyyo.
        .ollllkbbklllmo.
        ..ssssssssssssss
    """,
    "pine": """
        .......oo.......
        ......ollo......
        .....ollmdo.....
        ....ollmmmdo....
        ...ollmmmmddo...
        .....olmmdo.....
        ...ollmmmmddo...
        ..ollmmmmmmddo..
        .ollmmmmmmmmddo.
        ....olmmmmdo....
        ..ollmmmmmmddo..
        .ollmmmmmmmmddo.
        ollmmmmmmmmmdddo
        .oooooobboooooo.
        ......bbbb.sss..
        .....sbbbbsss...
    """,
    "tower": """
        ..oooo.oo.oooo..
        ..ollo.mm.omdo..
        ..ollmmmmmmddo..
        ..ollmmmmmmddo..
        ..ollmmmmmmddo..
        ...oooooooooo...
        ....llmmmmdd....
        ....llmmmmdd....
        ....llmyymdd....
        ....llmyymdd....
        ....llmmmmdd....
        ....llmmmmdd....
        ....llkbbkdd....
        ....llkbbkdd....
        ...ollkbbkddo...
        ..ssssssssssssss
    """,
    "balloon": """
        .....oooooo.....
        ...oollmmwwoo...
        ..olllmmmwwmdo..
        .olllmmmmwwmddo.
        .ollmmmmmwwmddo.
        .ollmmmmmwwmddo.
        .ollmmmmmwwmddo.
        ..ollmmmmwwmdo..
        ...ollmmmwwdo...
        ....olmmmwwo....
        .....oommoo.....
        .....k....k.....
        ......k..k......
        ......bbbb......
        ......bbbb......
        ....ssssssss....
    """,
}


@cache
def sprite(class_id: int, style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Colour [16, 16, 3] and opacity [16, 16, 1] (float32) of a landmark under the style's light."""
    own = rgb(LANDMARK_RGB[class_id % NUM_COLOURS])
    white = rgb((255, 252, 240))
    inks = {
        # The outline on the lit (left) side and on the shaded side. The codec reconstructs darker outlines badly.
        "i": own * 0.74,
        "o": own * 0.56,
        "d": own * 0.74,
        "m": own,
        "l": mix(own, white, 0.22),
        "h": mix(own, white, 0.58),
        "w": white,
        "b": rgb((142, 92, 54)),
        "k": rgb((66, 44, 40)),
        "s": rgb((20, 24, 50)),
        ".": rgb((0, 0, 0)),
    }
    inks = {key: lit(ink, style, LANDMARK_LIGHT) for key, ink in inks.items()}
    # Windows are not lit by the sun.
    inks["y"] = rgb(WINDOW[style.time])
    alpha = {"s": 0.35, ".": 0.0}
    half = LANDMARK // 2
    rows = [row[:half].replace("o", "i") + row[half:] for row in _ART[SHAPES[class_id // NUM_COLOURS]].split()]
    colour = np.stack([np.stack([inks[key] for key in row]) for row in rows])
    opacity = np.array([[alpha.get(key, 1.0) for key in row] for row in rows], dtype=np.float32)[..., None]
    if style.weather == "foggy":
        colour = mix(colour, rgb(FOG[style.time]), 0.16)
    colour.setflags(write=False)
    opacity.setflags(write=False)
    return colour, opacity
