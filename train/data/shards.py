"""Encoded sets on disk: the format, the writer, and a reader by sample number.

A set is a folder. `manifest.jsonl`: the header, then one line per clip, per finished source and per skipped source.
`shard-00000.safetensors`: `KEY.latents` [C, T, H, W], normalised, and `KEY.text` [L, D] of its clips; sets of prompts
have no latents. `empty_text.safetensors`: the text of the empty prompt, for text dropout and guidance.

Shapes: C latent channels, T latent frames, H W latent rows and columns, L text tokens, D text width.
"""

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "manifest.jsonl"
EMPTY_TEXT = "empty_text.safetensors"
VERSION = 1
WINDOW = 4
"""Shards whose clips are shuffled together, so that few files are read at a time."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a set was made of and with; a set goes on only under the same header."""

    source: str
    """The folder, table or prompt list, absolute."""
    model: str
    vae: str | None
    """Fingerprint of the VAE; None in a set of prompts."""
    text_encoder: str
    """Fingerprint of the text encoder."""
    dtype: str
    fps: int | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels."""
    frames: int | None = None
    """Latent frames of a clip."""
    version: int = VERSION


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
    """The whole part of a manifest: what a kill cut short is left out."""

    header: Header
    entries: list[Entry] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)
    """Sources that are through, with their number of clips."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Sources that were left out, with the reason."""
    num_bytes: int = 0
    """Length of the whole part of the file."""


def open_shard(path: Path):
    """A safetensors file, memory-mapped. Raises ValueError for a missing or cut one."""
    if not path.is_file():
        raise ValueError(f"{path}: this shard of the set is missing; put it back or encode into a new folder")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); encode into a new folder") from None


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a set, also of one that is being written. Raises ValueError where there is none or it is damaged.

    A kill can cut the last line, or the lines of the last shard: these are left out, their clips are made again.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: holds no {MANIFEST}; make a set with `context-forcing encode SOURCE -o {folder}`")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    manifest, offsets, offset = None, [], 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if manifest is None:
                manifest = Manifest(header=_header(record))
            elif "key" in record:
                manifest.entries.append(Entry(**record))
                offsets.append(offset)
            elif "skipped" in record:
                manifest.skipped[record["source"]] = record["skipped"]
            else:
                manifest.finished[record["source"]] = record["clips"]
                manifest.skipped.pop(record["source"], None)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error}); encode into a new folder") from None
        offset += len(line)
    if manifest is None:
        raise ValueError(f"{path}: has no header; delete it or encode into a new folder")
    manifest.num_bytes = offset
    _drop_half_listed_shard(Path(folder), manifest, offsets)
    return manifest


def _header(record: dict) -> Header:
    if record.get("version") != VERSION:
        raise ValueError(f"version {record.get('version')} is another software's, {VERSION} is known")
    return Header(**{**record, "size": record["size"] and tuple(record["size"])})


def _drop_half_listed_shard(folder: Path, manifest: Manifest, offsets: list[int]) -> None:
    """Clip lines come first of what is appended with a shard: if one is missing, nothing stands behind them."""
    if not manifest.entries:
        return
    last = manifest.entries[-1].shard
    listed = [i for i, entry in enumerate(manifest.entries) if entry.shard == last]
    if len(listed) < sum(key.endswith(".text") for key in open_shard(folder / last).keys()):
        manifest.num_bytes = offsets[listed[0]]
        del manifest.entries[listed[0] :]


class ShardWriter:
    """Appends clips to a set, new or begun. A clip counts once its shard is whole and the manifest lists it.

    What was added after the last whole shard is lost with the process; `flush` at the end makes it whole.
    Raises ValueError for a set with another header, or a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, header: Header, shard_bytes: int):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._pending: list[tuple[str, float | None, str, dict[str, Tensor]]] = []
        self._pending_bytes = 0
        self._notes: list[dict] = []
        path = self.folder / MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._begin(path, header)
            self.manifest = read_manifest(self.folder)
            _check_same(self.manifest.header, header, self.folder)
            os.truncate(path, self.manifest.num_bytes)
        except OSError as error:
            raise ValueError(f"output: {self.folder} cannot be written ({error.strerror})") from None
        self._num_shards = len({entry.shard for entry in self.manifest.entries})
        self._begun = Counter(entry.source for entry in self.manifest.entries)

    def _begin(self, path: Path, header: Header) -> None:
        if next(self.folder.glob("shard-*.safetensors"), None):
            raise ValueError(f"output: {self.folder} holds shards without a {MANIFEST}; choose another folder")
        part = path.with_name(path.name + ".part")
        part.write_text(_line(dataclasses.asdict(header)), encoding="utf-8")
        os.replace(part, path)

    @property
    def num_clips(self) -> int:
        return len(self.manifest.entries) + len(self._pending)

    def clips_of(self, source: str) -> int:
        """Clips of a source that the set held when it was opened: where to go on with it."""
        return self._begun[source]

    def write_empty_text(self, text_LD: Tensor) -> None:
        self._save(EMPTY_TEXT, {"text": text_LD})

    def has_empty_text(self) -> bool:
        return (self.folder / EMPTY_TEXT).exists()

    def add(self, source: str, start: float | None, caption: str, tensors: dict[str, Tensor]) -> None:
        """Take `text` [L, D] and, of a video, `latents` [C, T, H, W]; closes the shard when it is full."""
        self._pending.append((source, start, caption, tensors))
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def finish(self, source: str, num_clips: int) -> None:
        """Nothing more comes from this source."""
        self.manifest.finished[source] = num_clips
        self.manifest.skipped.pop(source, None)
        self._note({"source": source, "clips": num_clips})

    def skip(self, source: str, reason: str) -> None:
        """This source is left out; said once."""
        if self.manifest.skipped.get(source) != reason:
            self.manifest.skipped[source] = reason
            self._note({"source": source, "skipped": reason})

    def flush(self) -> None:
        """Close the shard that is being filled, if there is anything in it."""
        if self._pending:
            name = f"shard-{self._num_shards:05d}.safetensors"
            entries, tensors = [], {}
            for number, (source, start, caption, parts) in enumerate(self._pending, len(self.manifest.entries)):
                entries.append(Entry(source, start, caption, name, f"{number:08d}"))
                tensors.update({f"{number:08d}.{part}": tensor for part, tensor in parts.items()})
            self._save(name, tensors)
            self._append([dataclasses.asdict(entry) for entry in entries])
            self.manifest.entries += entries
            self._num_shards += 1
            self._pending, self._pending_bytes = [], 0
        else:
            self._append([])

    def _note(self, record: dict) -> None:
        self._notes.append(record)
        if not self._pending:
            self.flush()

    def _append(self, records: list[dict]) -> None:
        """Clips first, then what became of their sources (`_drop_half_listed_shard`)."""
        path = self.folder / MANIFEST
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(_line(record) for record in records + self._notes))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"output: {path} cannot be written ({error.strerror})") from None
        self._notes = []

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        # Copied: the clips of one video share their text, and safetensors refuses what is shared.
        data = save({key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()})
        part = self.folder / (name + ".part")
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"output: {self.folder / name} cannot be written ({error.strerror})") from None


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _check_same(begun: Header, asked: Header, folder: Path) -> None:
    for name in (f.name for f in dataclasses.fields(Header)):
        before, now = getattr(begun, name), getattr(asked, name)
        if before != now:
            raise ValueError(
                f"{name}: {now} now, {before} when {folder} was begun; give the same to go on, or another folder"
            )


class EncodedSet:
    """Clips or prompts of a set by sample number, one text each.

    Every epoch contains every clip once, in an order that is a function of (seed, epoch): shards are shuffled, then the
    clips of `WINDOW` successive shards.

    Raises ValueError for an empty set, missing or damaged shards, and clips of different shapes.
    """

    def __init__(self, folder: str | Path, seed: int, num_frames: int | None = None):
        self.folder, self.seed, self.num_frames = Path(folder), seed, num_frames
        manifest = read_manifest(self.folder)
        self.header, self.entries = manifest.header, manifest.entries
        if not self.entries:
            raise ValueError(f"{self.folder}: the set has no clips; {MANIFEST} lists skipped sources and the reasons")
        self.by_shard: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            self.by_shard.setdefault(entry.shard, []).append(index)
        self.open = lru_cache(maxsize=2 * WINDOW)(lambda shard: open_shard(self.folder / shard))
        self.order = lru_cache(maxsize=2)(self._order)
        self._check_shards()

    def _check_shards(self) -> None:
        parts, first, first_shape = ("text", "latents") if self.header.frames else ("text",), None, None
        for shard, indices in self.by_shard.items():
            file = self.open(shard)
            names = set(file.keys())
            for entry in (self.entries[index] for index in indices):
                if missing := [f"{entry.key}.{part}" for part in parts if f"{entry.key}.{part}" not in names]:
                    raise ValueError(f"{self.folder / shard}: {missing[0]} is missing; encode into a new folder")
                shape = self.header.frames and tuple(file.get_slice(f"{entry.key}.latents").get_shape())
                if first is None:
                    first, first_shape = entry, shape
                if shape != first_shape:
                    raise ValueError(
                        f"{self.folder}: clip {entry.key} of {entry.source} has latents {shape}, clip {first.key} of"
                        f" {first.source} has {first_shape}; encode clips of different shapes into separate folders"
                    )

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of the clips of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        shards = [list(self.by_shard)[i] for i in rng.permutation(len(self.by_shard))]
        windows = (shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW))
        return np.concatenate([rng.permutation([i for s in window for i in self.by_shard[s]]) for window in windows])

    def entry(self, number: int) -> Entry:
        """The clip or prompt of a sample number, 0 or more."""
        epoch, place = divmod(number, len(self.entries))
        return self.entries[self.order(epoch)[place]]

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents [1, C, T, H, W] of the first `num_frames` frames, and the text [1, L, D]; float32."""
        entry = self.entry(number)
        latents = self.open(entry.shard).get_tensor(f"{entry.key}.latents").float()
        return latents[None, :, : self.num_frames], self.text(number)

    def text(self, number: int, num_chunks: int = 1) -> Tensor:
        """The text of all chunks, [1, L, D] float32; at least one row."""
        entry = self.entry(number)
        return _at_least_one_row(self.open(entry.shard).get_tensor(f"{entry.key}.text"))

    @property
    def empty(self) -> Tensor:
        """The text of the empty prompt, [1, L, D] float32; at least one row."""
        return _at_least_one_row(open_shard(self.folder / EMPTY_TEXT).get_tensor("text"))

    def describe(self) -> str:
        """The `data` field of a student card."""
        return f"{len(self.entries)} clips or prompts of {self.header.source}"


def _at_least_one_row(text_LD: Tensor) -> Tensor:
    return (text_LD if len(text_LD) else text_LD.new_zeros(1, text_LD.shape[1])).float()[None]
