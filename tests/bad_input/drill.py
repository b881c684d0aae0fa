"""The drill: hostile values, and what must be true of each: it is used, or refused in one short line at a bounded cost.

Cases are the same in every run. BAD_INPUTS multiplies their number (`make bad-inputs`).
"""

import copy
import json
import math
import os
import re
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from context_forcing.memory.fields import MAX_MESSAGE

TIMES = int(os.environ.get("BAD_INPUTS", "1"))
MAX_SECONDS = 8.0
"""CPU time of one input."""
MAX_GROWTH = 2**29
"""Bytes by which one input may raise the largest memory of the process."""
NAMED = re.compile(r"[^\s:].*?(: |'| \()")
"""A message begins with the name of a field, an option or a file; that of the parser has an argument in brackets."""

tried: Counter[str] = Counter()
refused: Counter[str] = Counter()


def drill(cases: int, **strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """A test of so many cases, times BAD_INPUTS, always the same."""
    how = settings(
        max_examples=cases * TIMES, derandomize=True, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    return lambda test: how(given(**strategies)(test))


class Hang(BaseException):
    """An input took more than MAX_SECONDS."""


def largest_memory() -> int:
    """Bytes that this process had at most; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def bounded(kind: str):
    """The block is one input. It fails for one that takes too long or too much memory."""
    tried[kind] += 1

    def stop(*_):
        raise Hang(f"{kind}: more than {MAX_SECONDS} s")

    before, began = largest_memory(), time.process_time()
    timed = hasattr(signal, "setitimer")
    if timed:
        handler = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, 2 * MAX_SECONDS)
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
    assert time.process_time() - began < MAX_SECONDS, f"{kind}: {time.process_time() - began:.1f} s"
    assert largest_memory() - before < MAX_GROWTH, f"{kind}: {(largest_memory() - before) / 1e6:.0f} MB"


def is_line(message: str) -> bool:
    """Whether a message is one printable line of at most 300 characters that begins with a name."""
    return len(message) <= MAX_MESSAGE and message.isprintable() and NAMED.match(message) is not None


def used_or_refused(kind: str, action: Callable[[], Any], door: Callable[[object], str] = str) -> Any:
    """The result of an action; None where it is refused. Any other error than ValueError fails.

    `door` is what the message goes through before a user reads it.
    """
    with bounded(kind):
        try:
            return action()
        except ValueError as error:
            message = door(error)
    refused[kind] += 1
    assert is_line(message), message
    return None


DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]

SCALARS = (
    0, -1, 1, 2, 3, 7, 16, 65536, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, -(10**400), 31_536_000,
    0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, True, False, None,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "x" * 5000, "a\nb", "\n" * 300, "\x00", "\x1b[2J", "\u202e\u2028", "'", '"', "%s%n", "{0}", "[bold]",
    "../../x", "/etc/passwd", "/dev/zero", "/proc/self/mem", "-i", "--help", "-", ".", "..", "~",
    "http://127.0.0.1:1/a",
    "concat:a|b", "file:a", "C:\\a", "a" * 300 + "/b", "a/" * 3000, "1e400", "nan", "inf", "0x10", "1_000", "\u0663",
    "on", "null", "~", "!!int", "&a", "*a", "2024-99-99", "demo", "auto", "keep", "65536x65536", "NaN",
)  # fmt: skip
CONTAINERS = (
    [],
    {},
    [[]],
    [{}],
    {"x": 1},
    {"prompt": {}},
    [None] * 3,
    [0] * 10_000,
    {str(n): n for n in range(999)},
    DEEP,
)

scalars = st.sampled_from(SCALARS) | st.integers() | st.floats()
texts = st.sampled_from(TEXTS) | st.text(max_size=40)
values = scalars | texts | st.sampled_from(CONTAINERS)


def _places(tree: Any, way: tuple = ()) -> list[tuple]:
    """The ways to every value of a tree of dicts and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [way, *(place for key, value in inside for place in _places(value, (*way, key)))]


@st.composite
def mutated(draw: st.DrawFn, tree: Any, most: int = 3, values: st.SearchStrategy = values) -> Any:
    """A tree of dicts and lists in which some values are replaced, removed, repeated or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        way = draw(st.sampled_from(_places(tree)[:200]))
        if not way:
            if draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(values))
            continue
        inner = tree
        for key in way[:-1]:
            inner = inner[key]
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "repeat", "add"))):
            case "replace":
                inner[way[-1]] = copy.deepcopy(draw(values))
            case "remove":
                del inner[way[-1]]
            case "repeat" if isinstance(inner, list):
                inner[:] = inner * draw(st.sampled_from((2, 7, 1000))) if len(inner) < 100 else inner
            case _ if isinstance(inner, dict):
                inner[draw(texts)] = copy.deepcopy(draw(values))
    return tree


@st.composite
def damaged(draw: st.DrawFn, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Bytes with some of [first, last) written over, removed or added, or the end cut off."""
    result, last = bytearray(data), len(data) if last is None else last
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(first, max(first, min(last, len(result)) - 1)))
        match draw(st.sampled_from(("flip", "write", "insert", "remove", "cut"))):
            case "flip" if result[at : at + 1]:
                result[at] ^= 1 << draw(st.integers(0, 7))
            case "write":
                new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from((b"\xff" * 8, b"\0" * 8)))
                result[at : at + len(new)] = new
            case "insert":
                result[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del result[at : at + draw(st.integers(1, 40))]
            case "cut":
                del result[at:]
    return bytes(result)


def as_json(tree: Any) -> str:
    """JSON of any tree, also of numbers that Python does not print and of surrogates."""
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    assert limit == 0 or limit > 401
    return json.dumps(tree)


def safetensors_parts(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file as a tree, and the bytes after it."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def safetensors_of(header: Any, body: bytes) -> bytes:
    """A safetensors file of any header."""
    text = as_json(header).encode()
    return struct.pack("<Q", len(text)) + text + body


BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of a number, by the names of dtypes in safetensors."""
DIMS = st.sampled_from((0, 1, 2, 3, 5, 16, 64))
PATTERNS = st.sampled_from((b"\0", b"\1", b"\x7f", b"\xff", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\0\0\x80\x3f"))
"""Bytes that a tensor is filled with; of float32, NaN, the largest number and 1."""


def _filled(data: bytes, dtype: str, shape: list[int]) -> bytes:
    """As many bytes as a tensor has, those of `data` again and again."""
    size = math.prod(shape) * BITS[dtype] // 8
    return ((data or b"\0") * (size // max(1, len(data)) + 1))[:size]


@st.composite
def other_numbers(draw: st.DrawFn, header: dict, body: bytes, most: int = 2) -> tuple[dict, bytes]:
    """The parts of a safetensors file in which some tensors have another dtype, shape, value or name, or are missing.

    What safetensors asks of a file is right, so that the tensors reach whoever reads them.
    """
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in tensors.items()
    }
    for _ in range(draw(st.integers(1, most))):
        name = draw(st.sampled_from(sorted(found) or ["x"]))
        dtype, shape, data = found.get(name, ("F32", [1], b""))
        match draw(st.sampled_from(("dtype", "dtype", "dtype", "shape", "shape", "values", "name", "copy", "remove"))):
            case "dtype":
                dtype = draw(st.sampled_from(sorted(BITS)))
            case "shape":
                at = draw(st.integers(0, len(shape)))
                new = (
                    draw(st.sampled_from(([], [1]))) if at == len(shape) else draw(st.sampled_from(([], [draw(DIMS)])))
                )
                shape = [*shape[:at], *new, *shape[at + 1 :]]
            case "values":
                data = draw(PATTERNS)
            case "name" | "copy" as how:
                if how == "name":
                    found.pop(name, None)
                name = draw(st.sampled_from(sorted(tensors)) | texts) + draw(st.sampled_from(("", "", ".scales", ".0")))
            case "remove":
                found.pop(name, None)
                continue
        if math.prod(shape) * BITS[dtype] % 8 == 0 and math.prod(shape) < 2**20:
            found[name] = dtype, shape, data
    result, parts, end = {}, [], 0
    for name, (dtype, shape, data) in found.items():
        parts.append(_filled(data, dtype, shape))
        result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    return {"__metadata__": header.get("__metadata__", {}), **result}, b"".join(parts)
