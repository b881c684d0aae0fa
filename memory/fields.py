"""JSON objects and other mappings from files -> keyword arguments of dataclasses; values in messages."""

import dataclasses
import json
import re
import reprlib
import typing
from collections.abc import Mapping

MAX_BRIEF = 80
"""Characters that a message quotes of a value or of another program's message."""
MAX_MESSAGE = 300
"""Characters of a message."""
LONG_WORD = re.compile(r"\S{81,}")


class _Brief(reprlib.Repr):
    """repr of the first values, whatever the size of the whole."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MAX_BRIEF

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print the longest numbers."""
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


def printable(text: str) -> str:
    """A text without line ends and characters that command a terminal."""
    return "".join(each if each.isprintable() else " " for each in text)


def brief(text: object, most: int = MAX_BRIEF) -> str:
    """Text on one printable line of at most `most` characters; what is longer loses its end."""
    words = " ".join(printable(str(text)).split())
    return words if len(words) <= most else f"{words[: most - 3]}..."


def one_line(message: object) -> str:
    """A message as one printable line of at most MAX_MESSAGE characters.

    It begins with a name; a name that is blank is written ''. If the line is longer, paths and other long words lose
    their middle, and then the line its end.
    """
    line = " ".join(printable(str(message)).split())
    line = f"''{line}" if line.startswith(":") else line
    if len(line) > MAX_MESSAGE:
        line = LONG_WORD.sub(lambda word: f"{word[0][:30]}...{word[0][-47:]}", line)
    return brief(line, MAX_MESSAGE)


def quoted(value: object) -> str:
    """repr of a value that a user gave, for messages: one short line, whatever the value."""
    return brief(_Brief().repr(value))


def counted(number: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def json_object(text: str, where: object) -> dict[str, typing.Any]:
    """The JSON object in a text. Raises ValueError, beginning with `where`, for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def check_keys(cls: type, raw: object, where: str) -> Mapping:
    """The mapping `raw` itself. Raises ValueError unless it is one and all its keys are fields of the dataclass `cls`.

    `where` is the name of `raw` in messages; empty for a mapping without a name.
    """
    known = ", ".join(field.name for field in dataclasses.fields(cls))
    if raw is None:
        raise ValueError(f"{where}: is empty; known keys are {known}")
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: {quoted(raw)} is not a mapping; known keys are {known}")
    if unknown := [key for key in raw if key not in known.split(", ")]:
        name = brief(unknown[0])
        name = quoted(unknown[0]) if name[:1] in ("", ":") else name
        raise ValueError(f"{where}{'.' * bool(where)}{name}: unknown key; known keys are {known}")
    return raw


def checked_fields(cls: type, raw: object, where: str) -> dict[str, typing.Any]:
    """Keyword arguments for the dataclass `cls` from a mapping as JSON or YAML gives it; `cls` checks the values.

    A list becomes a tuple where the field is one. Raises ValueError, beginning with `where`, for an unknown key and for
    a missing one that has no default.
    """
    values = dict(check_keys(cls, raw, where))
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"{where}.{field.name}: missing")
        is_tuple = tuple in map(typing.get_origin, (field.type, *typing.get_args(field.type)))
        if is_tuple and isinstance(values.get(field.name), list):
            values[field.name] = tuple(values[field.name])
    return values
