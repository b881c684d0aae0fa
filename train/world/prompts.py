"""Styles of the demo world and their captions (docs/demo_student.md, World)."""

import itertools
from dataclasses import dataclass

from ...memory.fields import quoted

CONCEPTS = {
    "ground": ("meadow", "desert", "snow"),
    "weather": ("clear", "cloudy", "foggy"),
    "time": ("day", "dusk", "night"),
}
_GROUND_PHRASES = {"meadow": "meadow", "desert": "desert", "snow": "snowy field"}
_TIME_PHRASES = {"day": "by day", "dusk": "at dusk", "night": "at night"}
_MOVE_PHRASES = {-1: "pans left", 0: "stays", 1: "pans right"}


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: {quoted(value)} must be one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, kw_only=True)
class Style:
    """Ground, weather and time of day of a chunk. All styles share one ring; only its look changes."""

    ground: str = "meadow"
    weather: str = "clear"
    time: str = "day"

    def __post_init__(self) -> None:
        for name, choices in CONCEPTS.items():
            check_choice(name, getattr(self, name), choices)


ALL_STYLES = tuple(Style(**dict(zip(CONCEPTS, values))) for values in itertools.product(*CONCEPTS.values()))


def caption(style: Style, move: int) -> str:
    """The prompt of a chunk; `move` is -1 (left), 0 (stay) or +1 (right) columns per latent frame."""
    check_choice("move", move, (-1, 0, 1))
    return (
        f"A {_GROUND_PHRASES[style.ground]} under a {style.weather} sky {_TIME_PHRASES[style.time]}. "
        f"The camera {_MOVE_PHRASES[move]}."
    )
