"""What the header of a memory file may hold: types and ranges, field by field."""

import math
from collections.abc import Callable, Mapping
from typing import Any

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


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


TEXT, BOOL, INT, INT_OR_NONE, SCORE = _is(str), _is(bool), _is(int), _is(int, type(None)), _is(int, float, type(None))
FIELDS: Mapping[str, Check] = {
    "student": TEXT,
    "scene_begins": BOOL,
    "latent_size": _row(_count, _count, _count),
    "chunks": _list(_count),
    "decisions": _list(_row(_count, BOOL, SCORE, INT_OR_NONE, optional=1)),
    "segments": _list(_row(_count, TEXT, INT, lambda change: change in CHANGES, optional=1)),
    "recalls": _list(_row(_count, _list(_count), _count)),
    "references": _list(_row(TEXT, INT_OR_NONE)),
}
SLOTS: Mapping[str, Check] = {
    "sink": _list(INT), "slow": _list(_count), "fast": _list(_count), "likeness": _list(SCORE)
}  # fmt: skip


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
    if any(not 0 <= frame < num_frames for frame in frames):
        raise ValueError("damaged: decisions or recalls have frames that the film does not have")
    begins = [segment[0] for segment in header["segments"]]
    if begins != sorted(begins) or any(frame > num_frames for frame in begins):
        raise ValueError("damaged: segments do not begin one after the other in the film")
