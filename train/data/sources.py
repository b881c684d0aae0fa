"""What there is to encode: prompts, and videos with captions.

A source is a folder of videos with a `.txt` of the same stem beside each; a CSV or TSV table with the columns `path`
(relative to the table), `caption` and, if wanted, `start` and `end` in seconds; or a `.txt` list, one prompt a line.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A prompt, or a video or a part of one with its caption."""

    name: str
    """Names it in the manifest, once in a set."""
    caption: str = ""
    video: Path | None = None
    start: float = 0.0
    end: float | None = None
    """Seconds; None is the end of the video."""
    problem: str = ""
    """Why it cannot be used, known from the listing."""


def list_sources(path: Path) -> list[Source]:
    """Everything a source names, in a fixed order. Raises ValueError where it names nothing, or is of no known kind."""
    if path.is_dir():
        sources = _from_folder(path)
    elif not path.exists():
        raise ValueError(f"source: {path} does not exist")
    elif path.suffix.lower() in (".csv", ".tsv"):
        sources = _from_table(path)
    elif path.suffix.lower() == ".txt":
        lines = (" ".join(line.split()) for line in _read_text(path).split("\n"))
        sources = [Source(name=prompt, caption=prompt) for prompt in dict.fromkeys(filter(None, lines))]
    else:
        raise ValueError(f"source: {path} is not a folder of videos, a .csv or .tsv table, or a .txt list of prompts")
    if not sources:
        raise ValueError(f"source: {path} holds nothing to encode; videos are {', '.join(sorted(VIDEOS))}")
    return sources


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _from_folder(folder: Path) -> list[Source]:
    sources = []
    for video in sorted(folder.rglob("*")):
        name = video.relative_to(folder)
        if video.suffix.lower() not in VIDEOS or any(part.startswith(".") for part in name.parts):
            continue
        beside, caption, problem = video.with_suffix(".txt"), "", ""
        if not beside.is_file():
            problem = f"no caption: there is no {beside.name} beside it"
        else:
            try:
                caption = " ".join(_read_text(beside).split())
            except ValueError as error:
                problem = str(error)
        problem = problem or ("" if caption else f"no caption: {beside.name} is empty")
        sources.append(Source(name=name.as_posix(), caption=caption, video=video, problem=problem))
    return sources


def _from_table(path: Path) -> list[Source]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter)
    for column in ("path", "caption"):
        if column not in (rows.fieldnames or ()):
            raise ValueError(f"{path}: has no column {column!r}; it takes path, caption and, if wanted, start, end")
    sources: dict[str, Source] = {}
    for row in rows:
        where = f"{path}: line {rows.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{where} has not as many fields as the header; put quotes around what holds a delimiter")
        start = _seconds(where, "start", row.get("start", "")) or 0.0
        end = _seconds(where, "end", row.get("end", ""))
        if end is not None and end <= start:
            raise ValueError(f"{where}: end: {end:g} must be after start, {start:g}")
        caption, name = " ".join(row["caption"].split()), row["path"].strip()
        part = f"@{start:g}-{'' if end is None else f'{end:g}'}" if start or end is not None else ""
        if name + part in sources:
            raise ValueError(f"{where}: path: {name + part} is in the table already; a clip has one caption")
        problem = "" if caption else "no caption: the field is empty"
        sources[name + part] = Source(
            name=name + part, caption=caption, video=path.parent / name, start=start, end=end, problem=problem
        )
    return list(sources.values())


def _seconds(where: str, column: str, text: str) -> float | None:
    try:
        value = float(text) if text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"{where}: {column}: {text!r} is not a number of seconds")
    return value
