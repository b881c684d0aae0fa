"""Sources of an encoded set: videos with captions, or prompts.

A source is a folder of videos with a `.txt` of the same stem beside each; a CSV or TSV table with the columns `path`
(relative to the table), `caption` and optionally `start` and `end` in seconds; or a `.txt` list, one prompt per line.
"""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...memory.fields import brief, quoted
from ...memory.files import read_text

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"))
MAX_LIST = 2**28
"""Bytes of a table or a list of prompts: some millions of prompts."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A prompt, or a video or a part of one with its caption."""

    name: str
    """Its name in the manifest, unique in a set."""
    caption: str = ""
    video: Path | None = None
    start: float = 0.0
    end: float | None = None
    """Seconds; None is the end of the video."""
    problem: str = ""
    """The reason if it cannot be used, known before the video is read."""


def list_sources(path: Path) -> list[Source]:
    """All sources in a fixed order. Raises ValueError for an unknown kind of source, or an empty one."""
    if path.is_dir():
        sources = list(_from_folder(path))
    elif not path.exists():
        raise ValueError(f"source: {path} does not exist")
    elif path.suffix.lower() in (".csv", ".tsv"):
        sources = list(_from_table(path))
    elif path.suffix.lower() == ".txt":
        prompts = dict.fromkeys(" ".join(line.split()) for line in read_text(path, "utf-8-sig", MAX_LIST).split("\n"))
        sources = [Source(name=prompt, caption=prompt) for prompt in prompts if prompt]
    else:
        raise ValueError(f"source: {path} is not a folder of videos, a .csv or .tsv table, or a .txt list of prompts")
    if not sources:
        raise ValueError(f"source: {path} holds nothing to encode; videos are {', '.join(sorted(VIDEOS))}")
    return sources


def _from_folder(folder: Path) -> Iterator[Source]:
    for video in sorted(folder.rglob("*")):
        name, text = video.relative_to(folder), video.with_suffix(".txt")
        if video.suffix.lower() not in VIDEOS or any(part.startswith(".") for part in name.parts):
            continue
        caption, problem = "", f"no caption: there is no {text.name} beside it"
        if text.is_file():
            try:
                caption = " ".join(read_text(text, "utf-8-sig").split())
                problem = "" if caption else f"no caption: {text.name} is empty"
            except ValueError as error:
                problem = str(error)
        yield Source(name=name.as_posix(), caption=caption, video=video, problem=problem)


def _from_table(path: Path) -> Iterator[Source]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(read_text(path, "utf-8-sig", MAX_LIST), newline=""), delimiter=delimiter)
    try:
        table = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num + 1} is not a row ({brief(error)}); shorten the field") from None
    for column in ("path", "caption"):
        if column not in (rows.fieldnames or ()):
            raise ValueError(
                f"{path}: has no column {quoted(column)}; it takes path, caption and optionally start, end"
            )
    names = set()
    for number, row in table:
        where = f"{path}: line {number}"
        if None in row or None in row.values():
            raise ValueError(
                f"{where} has another number of fields than the header; quote fields that contain a delimiter"
            )
        start = _seconds(where, "start", row.get("start", "")) or 0.0
        end = _seconds(where, "end", row.get("end", ""))
        if end is not None and end <= start:
            raise ValueError(f"{where}: end: {end:g} must be after start, {start:g}")
        caption, video = " ".join(row["caption"].split()), row["path"].strip()
        part = f"@{start:g}-{'' if end is None else f'{end:g}'}" if start or end is not None else ""
        if video + part in names:
            raise ValueError(f"{where}: path: {video + part} is in the table already; a clip has one caption")
        names.add(video + part)
        problem = "" if caption else "no caption: the field is empty"
        yield Source(
            name=video + part, caption=caption, video=path.parent / video, start=start, end=end, problem=problem
        )


def _seconds(where: str, column: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: {column}: {quoted(text)} is not a number of seconds")
    return value
