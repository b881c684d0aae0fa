"""Settings from outside - `key=value`, YAML files, checkpoints - into checked configurations."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..memory.config import memory_preset
from ..memory.fields import check_keys


def parse_overrides(overrides: Sequence[str]) -> dict:
    """`key=value` and `part.key=value`, later ones over earlier ones, as nested settings.

    Raises ValueError for what is not `key=value`.
    """
    tree: dict = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: an override is key=value, for example steps=100")
        _put(tree, key.split("."), _scalar(text))
    return tree


def _scalar(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict, path: list[str], value) -> None:
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = _expand(part, tree[part]) if part in tree else {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(path)}: {part} has no parts; give {part}=value")
    tree[path[-1]] = value


def _expand(key: str, value):
    """A memory by name as its settings."""
    if key != "memory" or not isinstance(value, str):
        return value
    return dataclasses.asdict(memory_preset(value))


def read_settings(path: Path, names: Sequence[str]) -> tuple[str, dict]:
    """A YAML file of settings: the named configuration it builds on, and what it says otherwise.

    Raises ValueError for a file that cannot be read, or does not name one with `config`.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), str):
        raise ValueError(f"config: {path} must be a mapping with `config`: one of {', '.join(names)}")
    return raw.pop("config"), raw


def with_settings(config, tree: dict, before: str = ""):
    """A configuration with settings replaced, all at once: they are checked together, not one by one.

    Raises ValueError for an unknown key or a value of another type.
    """
    values = {}
    for key, value in check_keys(type(config), tree, before.rstrip(".")).items():
        name = f"{before}{key}"
        current, value = getattr(config, key), _expand(key, value)
        if dataclasses.is_dataclass(current):
            values[key] = with_settings(current, value, f"{name}.")
        elif isinstance(value, dict):
            raise ValueError(f"{name}: it has no parts; give {name}=value")
        else:
            values[key] = _typed(name, value, current)
    return dataclasses.replace(config, **values)


def _typed(name: str, value, current):
    """A value in the type of the one it replaces, element by element in a tuple."""
    said = value
    if isinstance(current, float) and type(value) in (int, str):
        try:
            value = float(value)  # YAML reads 1e-3 as text
        except ValueError:
            value = None
    if isinstance(current, tuple):
        each = current[0] if current else 0.0
        if isinstance(value, str):  # 1000,500: a list without its brackets
            value = [_scalar(part) for part in value.split(",")]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_typed(name, part, each) for part in value)
    if current is None and (value is None or type(value) in (int, float)):
        return value
    if type(value) is not type(current) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}: {json.dumps(said, default=str)} is not a {type(current).__name__}")
    return value
