"""Settings as `key=value`, YAML files or JSON -> checked dataclasses."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..memory.config import memory_preset
from ..memory.fields import check_keys


def parse_overrides(overrides: Sequence[str]) -> dict:
    """`key=value` and `part.key=value` as nested settings; later ones replace earlier ones. Raises ValueError."""
    settings: dict = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: an override is key=value, for example steps=100")
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
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _expand(key: str, value: Any) -> Any:
    """The settings of a memory by its name; any other value is unchanged."""
    return dataclasses.asdict(memory_preset(value)) if key == "memory" and isinstance(value, str) else value


def read_settings(path: Path, names: Sequence[str]) -> tuple[str, dict]:
    """A YAML file of settings: the named configuration under `config`, and the settings that differ from it.

    Raises ValueError for a file that cannot be read or has no `config`.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} cannot be read ({str(error).splitlines()[0]})") from None
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
        raise ValueError(f"{name}: {json.dumps(value, default=str)} is not a {type(current).__name__}")
    return converted
