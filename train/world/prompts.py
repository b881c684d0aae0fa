"""Styles of the demo world and the words that name them."""

from dataclasses import dataclass

from ...model.codecs.demo_text import canonical_words

GROUNDS = ("meadow", "desert", "snow")
WEATHERS = ("clear", "cloudy", "foggy")
TIMES = ("day", "dusk", "night")

_GROUND_PHRASES = {"meadow": "meadow", "desert": "desert", "snow": "snowy field"}
_TIME_PHRASES = {"day": "by day", "dusk": "at dusk", "night": "at night"}
_MOVE_PHRASES = {-1: "pans left", 0: "stays", 1: "pans right"}
_MOVE_OF = {"left": -1, "stay": 0, "right": 1}


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


def parse_prompt(text: str, default: Style) -> tuple[Style, int]:
    """Style and move that `text` asks for; the last mention of a concept wins, unnamed ones take `default`.

    A direction counts only beside a word for panning: "the tower on the left" moves nothing. Without a move the
    camera stays.
    """
    chosen = {"ground": default.ground, "weather": default.weather, "time": default.time}
    words = canonical_words(text)
    move = 0
    for word in words:
        for field, choices in (("ground", GROUNDS), ("weather", WEATHERS), ("time", TIMES)):
            if word in choices:
                chosen[field] = word
        if word == "stay" or (word in _MOVE_OF and "pan" in words):
            move = _MOVE_OF[word]
    return Style(**chosen), move
