"""Styles of the demo world and the words that name them."""

from dataclasses import dataclass

GROUNDS = ("meadow", "desert", "snow")
WEATHERS = ("clear", "cloudy", "foggy")
TIMES = ("day", "dusk", "night")

_GROUND_PHRASES = {"meadow": "meadow", "desert": "desert", "snow": "snowy field"}
_TIME_PHRASES = {"day": "by day", "dusk": "at dusk", "night": "at night"}
_MOVE_PHRASES = {-1: "pans left", 0: "stays", 1: "pans right"}


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, kw_only=True)
class Style:
    """What the prompt says about a chunk besides the camera: the same ring under another light."""

    ground: str = "meadow"
    weather: str = "clear"
    time: str = "day"

    def __post_init__(self) -> None:
        check_choice("ground", self.ground, GROUNDS)
        check_choice("weather", self.weather, WEATHERS)
        check_choice("time", self.time, TIMES)


ALL_STYLES = tuple(
    Style(ground=ground, weather=weather, time=time) for ground in GROUNDS for weather in WEATHERS for time in TIMES
)


def caption(style: Style, move: int) -> str:
    """The prompt of a chunk; `move` is -1 (left), 0 (stays) or +1 (right) columns per frame."""
    check_choice("move", move, (-1, 0, 1))
    return (
        f"A {_GROUND_PHRASES[style.ground]} under a {style.weather} sky {_TIME_PHRASES[style.time]}. "
        f"The camera {_MOVE_PHRASES[move]}."
    )
