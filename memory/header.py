"""What a memory file may hold: types and ranges, field by field, and the kinds of numbers of its tensors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .fields import brief
from .memory import CHANGES

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    """Exactly one of these types, so that True is no number; numbers are finite."""
    return lambda value: type(value) in kinds and (type(value) is not float or math.isfinite(value))


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _row(*checks: Check, optional: int = 0) -> Check:
    """A list with one part for each check; the last `optional` ones may be missing, as in files of earlier releases."""
    return lambda value: (
        isinstance(value, list)
        and len(checks) - optional <= len(value) <= len(checks)
        and all(is_ok(part) for is_ok, part in zip(checks, value))
    )


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _side(value: Any) -> bool:
    return _count(value) and 0 < value <= MAX_SIDE


def _cosine(value: Any) -> bool:
    """A similarity; sums of rounded numbers are a little above 1."""
    return _is(int, float)(value) and abs(value) < 1.1


MAX_SIDE = 2**20
"""Channels, rows or columns of a latent frame."""
TEXT, BOOL, INT, NUMBER, SCORE = _is(str), _is(bool), _is(int), _or_none(_count), _or_none(_cosine)
FIELDS: Mapping[str, Check] = {
    "student": TEXT,
    "scene_begins": BOOL,
    "latent_size": _row(_side, _side, _side),
    "chunks": _list(_count),
    "decisions": _list(_row(_count, BOOL, SCORE, NUMBER, optional=1)),
    "segments": _list(_row(_count, TEXT, INT, lambda change: change in CHANGES, optional=1)),
    "recalls": _list(_row(_count, _list(_count), _count)),
    "texts": _list(NUMBER),
    "references": _list(_row(TEXT, NUMBER)),
    "similarities": _list(_row(_count, _count, _cosine)),
    "layers": _list(_row(_list(_count), _count)),
}
SLOTS: Mapping[str, Check] = {
    "sink": _list(INT), "slow": _list(_count), "fast": _list(_count), "likeness": _list(SCORE)
}  # fmt: skip

FLOATS, ONE_BYTE = ("F32", "BF16", "F16"), ("I8", "F8_E4M3")
"""Names of dtypes in a file: of tensors, and of keys and values that have scales (packed.py)."""
ANY_FLOAT = ("film", "given", "references", "keys", "values")
"""Tensors that have any of FLOATS; others are float32."""


def check_kinds(kinds: Mapping[str, str]) -> None:
    """Raises ValueError for numbers that a memory is not written in. `kinds` are the dtypes of tensors by name."""
    for name, kind in kinds.items():
        floats = FLOATS if name.partition(".")[0] in ANY_FLOAT and not name.endswith(".scales") else FLOATS[:1]
        if kind not in (expected := ONE_BYTE if f"{name}.scales" in kinds else floats):
            raise ValueError(f"damaged: {brief(name)} holds {kind}, not {' or '.join(expected)}")


def check_header(header: Mapping[str, Any]) -> None:
    """Raises ValueError for a field of a wrong type, and for frames that the film does not have."""
    fields = {**header, **header["slots"]}
    for name, is_ok in {**FIELDS, **SLOTS}.items():
        if name in fields and not is_ok(fields[name]):
            raise ValueError(f"damaged: {name} has an impossible value")
    num_frames = sum(header["chunks"])
    frames = [decision[0] for decision in header["decisions"]]
    frames += [frame for decision in header["decisions"] for frame in decision[3:] if frame is not None]
    frames += [frame for recall in header.get("recalls", ()) for frame in recall[1]]
    frames += [frame for layer in header.get("layers", ()) for frame in layer[0]]
    if any(not 0 <= frame < num_frames for frame in frames):
        raise ValueError("damaged: decisions, recalls or layers have frames that the film does not have")
    begins = [segment[0] for segment in header["segments"]]
    if begins != sorted(begins) or any(frame > num_frames for frame in begins):
        raise ValueError("damaged: segments do not begin one after the other in the film")
