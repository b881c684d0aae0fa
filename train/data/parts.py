"""Parts of a set: what workers make of single sources.

Each is a set of its own, in a folder of the set, until the clips are in shards of the set.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...model.units import pixel_frames
from .manifest import MANIFEST, Entry, Manifest, read_manifest
from .shards import ShardWriter, clip_tensors, open_shard
from .sources import Source

log = logging.getLogger("context_forcing")

PROMPTS = 32
"""Prompts of a part. Of videos it is one."""
PREFIX = "workers-"
"""Names of the folders; the rest is a digest of the set's header and of names and captions of the sources."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A video, or some prompts."""

    folder: Path
    sources: tuple[Source, ...]
    """Those that the set misses."""
    left: Manifest | None
    """What an interrupted command left. A skipped source is not in it: it is tried again."""


class Parts:
    """The parts of a set that are missing. Folders that belong to none of them are deleted."""

    def __init__(self, writer: ShardWriter, sources: Sequence[Source], is_missing: Callable[[Source], bool]):
        """`sources` are all of the set, so that a part has the same sources whatever of it is missing."""
        self._writer = writer
        self._done: deque[tuple[int, Path]] = deque()
        """Number of clips with which the set has all of a part, and its folder."""
        self.all: list[Part] = []
        size = PROMPTS if sources[0].video is None else 1
        others = set(writer.folder.glob(f"{PREFIX}*"))
        for number in range(0, len(sources), size):
            part = sources[number : number + size]
            if missing := tuple(filter(is_missing, part)):
                folder = writer.folder / f"{PREFIX}{_digest(writer, part)}"
                left = self._left(folder, missing) if folder in others else None
                if left:
                    others.remove(folder)
                self.all.append(Part(folder=folder, sources=missing, left=left))
        for folder in others:
            _delete(folder)
        self.of = {source.name: part for part in self.all for source in part.sources}
        """The part of a missing source, by its name."""

    def first(self, source: Source) -> int:
        """Which clip of a source is the first one that its part has or is to have."""
        left = self.of[source.name].left
        return self._first(source, left) if left else self._writer.clips_of(source.name)

    def num_taken(self, part: Part) -> int:
        """Clips that are left of a part and are in the set already."""
        if part.left is None:
            return 0
        return len(part.left.entries) - sum(len(self.missing(source, part.left)) for source in part.sources)

    def missing(self, source: Source, made: Manifest) -> list[Entry]:
        """The clips of a source in `made` that the set did not have when it was opened."""
        has = self._writer.clips_of(source.name)
        return [entry for entry in _of(source, made) if self._number(source, entry) >= has]

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """Latents and text of a clip, in the order in which a set has them."""
        return clip_tensors(self.of[entry.source].folder, entry)

    def end(self, source: Source) -> None:
        """A source is added. Deletes folders of parts whose clips are all in shards of the set."""
        part = self.of[source.name]
        if source is part.sources[-1]:
            self._done.append((self._writer.num_clips, part.folder))
        while self._done and len(self._writer.manifest.entries) >= self._done[0][0]:
            _delete(self._done.popleft()[1])

    def delete(self) -> None:
        """Delete all folders; nothing may be written there any more."""
        for folder in self._writer.folder.glob(f"{PREFIX}*"):
            _delete(folder)

    def _left(self, folder: Path, sources: tuple[Source, ...]) -> Manifest | None:
        """What an interrupted command made of sources, if it can be continued."""
        if not (folder / MANIFEST).is_file():
            return None
        try:
            made = read_manifest(folder)
            for shard in {entry.shard for entry in made.entries}:
                open_shard(folder / shard)
        except ValueError as error:
            log.warning("%s; what workers left of %s is made again", str(error).split(";")[0], sources[0].name)
            return None
        for source in sources:
            first, has = self._first(source, made), self._writer.clips_of(source.name)
            if not first <= has <= first + len(_of(source, made)):
                return None
        return dataclasses.replace(made, skipped={})

    def _first(self, source: Source, made: Manifest) -> int:
        own = _of(source, made)
        return self._number(source, own[0]) if own else self._writer.clips_of(source.name)

    def _number(self, source: Source, entry: Entry) -> int:
        """Which clip of its source an entry is; a prompt has one."""
        header = self._writer.manifest.header
        if entry.start is None or header.fps is None or header.frames is None:
            return 0
        return round((entry.start - source.start) * header.fps / pixel_frames(header.frames))


def _of(source: Source, made: Manifest) -> list[Entry]:
    return [entry for entry in made.entries if entry.source == source.name]


def _digest(writer: ShardWriter, sources: Sequence[Source]) -> str:
    header = dataclasses.asdict(writer.manifest.header)
    text = json.dumps([header, [(source.name, source.caption) for source in sources]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _delete(folder: Path) -> None:
    # A worker of a cluster may still write; what stays is deleted by the next command.
    shutil.rmtree(folder, ignore_errors=True)
