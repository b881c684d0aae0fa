"""What a set lists in `manifest.jsonl`: a header, then a line per clip, per finished source and per skipped source."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...memory.fields import brief, checked_fields

MANIFEST = "manifest.jsonl"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """Source and settings of a set. A set can only be continued with the same header."""

    source: str
    """The absolute path of the folder, table or prompt list."""
    model: str
    vae: str | None
    """Fingerprint of the VAE; None in a set of prompts, as the fields below."""
    text_encoder: str
    """Fingerprint of the text encoder."""
    dtype: str
    fps: int | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels."""
    frames: int | None = None
    """Latent frames of a clip."""
    version: int = VERSION

    def __post_init__(self):
        if self.version != VERSION:
            raise ValueError(f"version {self.version} is not supported, only {VERSION}")

    def check_same(self, other: "Header", folder: Path) -> None:
        """Raises ValueError if `other` differs from this header of a set."""
        for name, value in vars(self).items():
            if value != getattr(other, name):
                raise ValueError(
                    f"{name}: {getattr(other, name)} now, {value} when {folder} was begun; continue it with the same"
                    " value, or choose another folder"
                )


@dataclass(frozen=True)
class Entry:
    """One clip or prompt of a set."""

    source: str
    start: float | None
    """Seconds from the beginning of the video; None for a prompt."""
    caption: str
    shard: str
    key: str


@dataclass(kw_only=True)
class Manifest:
    """The complete part of a manifest."""

    header: Header
    entries: list[Entry] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)
    """Number of clips of every finished source."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason of every skipped source."""
    num_bytes: int = 0
    """Length of the complete part of the file."""


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a set, also while it is written. Raises ValueError for a missing or damaged one.

    A killed process leaves half a line, which is not part of the result, or not all lines of the last shard. Writers go
    on with those; readers leave the shard out.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: holds no {MANIFEST}; make a set with `context-forcing encode SOURCE -o {folder}`")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    manifest, offset = None, 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if manifest is None:
                manifest = Manifest(header=Header(**checked_fields(Header, record, "header")))
            elif "key" in record:
                manifest.entries.append(Entry(**record))
            elif "skipped" in record:
                manifest.skipped[record["source"]] = record["skipped"]
            else:
                manifest.finished[record["source"]] = record["clips"]
                manifest.skipped.pop(record["source"], None)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({brief(error)}); encode into a new folder") from None
        offset += len(line)
    if manifest is None:
        raise ValueError(f"{path}: has no header; delete it or encode into a new folder")
    manifest.num_bytes = offset
    return manifest
