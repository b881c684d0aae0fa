"""Settings as `key=value`, YAML files or JSON -> checked dataclasses."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..memory.config import memory_preset
from ..memory.fields import brief, check_keys, quoted
from ..memory.files import read_text

MAX_VALUES = 200_000
"""Values of a YAML text, those of its aliases included: about 20 for each of 10,000 segments."""
MAX_NESTING = 20
"""Lists and mappings of a YAML text inside each other."""
COLON = "mapping values are not allowed here"
"""What yaml says of a colon in a text without quotes."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "a number"}
"""What a setting of a type is called in messages."""
TAG_ERRORS = (LookupError, AttributeError, TypeError, OverflowError)
"""What yaml.safe_load raises for values that do not fit their tags, next to ValueError."""


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises ValueError, one line, for other texts and for aliases that expand far."""
    try:
        _check_expansion(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        remedy = "; put a text with a colon, such as a prompt, in quotes" if COLON in str(error) else ""
        raise ValueError(f"not YAML ({brief(error, 160)}){remedy}") from None
    except TAG_ERRORS:
        raise ValueError("not YAML (a value does not fit its tag; remove the tag, such as !!int)") from None


def _check_expansion(text: str) -> None:
    """Raises ValueError for more than MAX_VALUES values, an alias counted as what it stands for, or deeper nesting."""
    sizes: dict[str | None, int] = {}
    count, begun = 0, []
    for event in yaml.parse(text, yaml.SafeLoader):
        count += 1
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, first = begun.pop()
            sizes[anchor] = count - first
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, aliases expanded; make it shorter")
        if len(begun) > MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} lists or mappings inside each other; make it flat")


def parse_overrides(overrides: Sequence[str]) -> dict:
    """`key=value` and `part.key=value` as nested settings; later ones replace earlier ones. Raises ValueError."""
    settings: dict = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{quoted(override)}: an override is key=value, for example steps=100")
        *parts, last = key.split(".")
        inner = settings
        for part in parts:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} has no parts; give {part}=value")
        inner[last] = _expand(last, _scalar(text))
    return settings


def _scalar(text: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError:
        return text


def _expand(key: str, value: Any) -> Any:
    """The settings of a memory by its name; any other value is unchanged."""
    return dataclasses.asdict(memory_preset(value)) if key == "memory" and isinstance(value, str) else value


def read_settings(path: Path, names: Sequence[str]) -> tuple[str, dict]:
    """A YAML file of settings: the named configuration under `config`, and the settings that differ from it.

    Raises ValueError for a file that cannot be read or has no `config`.
    """
    try:
        raw = read_yaml(read_text(path))
    except ValueError as error:
        raise ValueError(f"config: {path} cannot be read ({brief(error, 200)})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), str):
        raise ValueError(f"config: {path} must be a mapping with `config`: one of {', '.join(names)}")
    return raw.pop("config"), raw


def with_settings(config: Any, settings: Mapping, prefix: str = "") -> Any:
    """A dataclass with nested settings replaced. All are replaced at once, so they are checked together.

    Raises ValueError for an unknown key or a value of another type.
    """
    values = {}
    for key, value in check_keys(type(config), settings, prefix.rstrip(".")).items():
        name, current, value = f"{prefix}{key}", getattr(config, key), _expand(key, value)
        if dataclasses.is_dataclass(current):
            values[key] = with_settings(current, value, f"{name}.")
        elif isinstance(value, dict):
            raise ValueError(f"{name}: it has no parts; give {name}=value")
        else:
            values[key] = _typed(name, value, current)
    return dataclasses.replace(config, **values)


def _typed(name: str, value: Any, current: Any) -> Any:
    """`value` in the type of `current`, element by element in a tuple."""
    if isinstance(current, tuple):
        each = current[0] if current else 0.0
        if isinstance(value, str):  # 1000,500: a list without brackets
            value = [_scalar(part) for part in value.split(",")]
        return tuple(_typed(name, part, each) for part in (value if isinstance(value, (list, tuple)) else [value]))
    if value is None and isinstance(current, str):
        value = ""  # key= with nothing after it
    converted = value
    if isinstance(current, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            converted = float(value)  # YAML reads 1e-3 as text
        except ValueError:
            converted = None
    if current is None and (value is None or type(value) in (int, float)):
        return value
    if type(converted) is not type(current) or (isinstance(converted, float) and not math.isfinite(converted)):
        raise ValueError(f"{name}: {quoted(value)} is not {KINDS[type(current)]}")
    return converted
