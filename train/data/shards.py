"""Encoded clips on disk: written so that a kill at any time loses nothing whole, read as a shuffled stream.

A set is a folder. `manifest.jsonl`: the header, then a line per clip, per finished source and per skipped source.
`shard-00000.safetensors`: `KEY.latents` [C, T, H, W], normalised, and `KEY.text` [L, D] of its clips; sets made from
prompts have no latents. `empty_text.safetensors`: the text of the empty prompt, for text dropout and guidance.

Shapes: B batch, C latent channels, T latent frames, H W latent rows and columns, L text tokens, D text width.
"""

import dataclasses
import json
import os
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "manifest.jsonl"
EMPTY_TEXT = "empty_text.safetensors"
VERSION = 1
READ_BYTES = 16 * 2**20
"""What the prefetch thread reads at a time."""


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


@dataclass(frozen=True)
class ClipBatch:
    """Clips as a training step takes them."""

    latents: Tensor | None
    """[B, C, T, H, W] float32, normalised; None from a set of prompts."""
    text: Tensor
    """[B, L, D] float32, rows zero-padded to the longest of the batch."""
    clips: tuple[Entry, ...]


@dataclass(frozen=True)
class EpochOrder:
    """One pass over a set: every clip once."""

    clips: np.ndarray
    """[N] indices of clips."""
    windows: tuple[tuple[str, ...], ...]
    """Shards by window."""
    ends: np.ndarray
    """Where each window ends in `clips`."""


class ShardedClips:
    """Batches of a set, without end, in an order that is a function of (seed, epoch).

    Shards are shuffled, and clips within a `window` of shards: reading stays within a few files at a time. The ranks
    share one order: of each `world_size * batch_size` clips, rank r takes the r-th run of `batch_size`. So two ranks
    see together what one with twice the batch sees. An epoch is every clip once; a batch may span two epochs.

    Raises ValueError for an empty set, a batch larger than it, missing or cut shards, and clips of different shapes.
    """

    def __init__(
        self, folder: str | Path, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1, window: int = 4
    ):
        self.folder, self.batch_size, self.seed, self.window = Path(folder), batch_size, seed, window
        self.rank, self.world_size = rank, world_size
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("window", window, 1)):
            if value < least:
                raise ValueError(f"{name}: {value} must be {least} or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not in 0 to {world_size - 1} (world_size {world_size})")
        manifest = read_manifest(self.folder)
        self.header, self.entries = manifest.header, manifest.entries
        if not self.entries:
            raise ValueError(f"{self.folder}: no clips in this set; its manifest says what was skipped, and why")
        if batch_size * world_size > len(self.entries):
            raise ValueError(
                f"batch_size: {batch_size} on {world_size} ranks is more than the {len(self.entries)} clips of"
                f" {self.folder}; take a smaller batch or encode more"
            )
        self._by_shard: dict[str, list[int]] = {}
        for i, entry in enumerate(self.entries):
            self._by_shard.setdefault(entry.shard, []).append(i)
        self.latent_shape = self._check_shards()
        self.position = 0
        """Clips of the global order that all ranks have taken."""
        self._open: OrderedDict[str, safe_open] = OrderedDict()
        self._prefetched: tuple[str, ...] = ()
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        """Clips in an epoch."""
        return len(self.entries)

    def _check_shards(self) -> tuple[int, ...] | None:
        """The one shape [C, T, H, W] of all clips, or None in a set of prompts."""
        first = None
        for shard, clips in self._by_shard.items():
            file = open_shard(self.folder / shard)
            held = set(file.keys())
            for entry in (self.entries[i] for i in clips):
                parts = [f"{entry.key}.text"] + ([f"{entry.key}.latents"] if self.header.frames else [])
                if missing := [part for part in parts if part not in held]:
                    raise ValueError(f"{self.folder / shard}: {missing[0]} is missing; encode into a new folder")
                if not self.header.frames:
                    continue
                shape = tuple(file.get_slice(parts[1]).get_shape())
                first = first or (entry, shape)
                if shape != first[1]:
                    raise ValueError(
                        f"{self.folder}: clip {entry.key} of {entry.source} has latents {shape}, clip {first[0].key} of"
                        f" {first[0].source} has {first[1]}; a set has one shape, encode into separate folders"
                    )
        return first and first[1]

    def _order(self, epoch: int) -> EpochOrder:
        rng = np.random.default_rng((self.seed, epoch))
        shards = [list(self._by_shard)[i] for i in rng.permutation(len(self._by_shard))]
        windows = [tuple(shards[i : i + self.window]) for i in range(0, len(shards), self.window)]
        runs = [rng.permutation([i for shard in window for i in self._by_shard[shard]]) for window in windows]
        return EpochOrder(np.concatenate(runs), tuple(windows), np.cumsum([len(run) for run in runs]))

    def __iter__(self) -> "ShardedClips":
        return self

    def __next__(self) -> ClipBatch:
        first = self.position + self.rank * self.batch_size
        self._prefetch(first)
        places = [divmod(place, len(self)) for place in range(first, first + self.batch_size)]
        entries = tuple(self.entries[self.order(epoch).clips[place]] for epoch, place in places)
        texts = [self._tensor(entry, "text") for entry in entries]
        text = torch.zeros(len(texts), max(1, *(len(rows) for rows in texts)), texts[0].shape[1])
        for padded, rows in zip(text, texts):
            padded[: len(rows)] = rows
        latents = [self._tensor(entry, "latents").float() for entry in entries] if self.header.frames else None
        self.position += self.batch_size * self.world_size
        return ClipBatch(latents and torch.stack(latents), text, entries)

    def empty_text(self) -> Tensor:
        """Text [1, L, D] float32 of the empty prompt, one row at least."""
        rows = open_shard(self.folder / EMPTY_TEXT).get_tensor("text").float()
        return (rows if len(rows) else rows.new_zeros(1, rows.shape[1]))[None]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next batch is the one that would have come; also with another batch size or number of ranks."""
        position = state["position"]
        if type(position) is not int or position < 0:
            raise ValueError(f"position: {position!r} must be 0 or more, as state_dict gave it")
        self.position = position

    def _tensor(self, entry: Entry, part: str) -> Tensor:
        if entry.shard in self._open:
            self._open.move_to_end(entry.shard)
        else:
            self._open[entry.shard] = open_shard(self.folder / entry.shard)
            while len(self._open) > 2 * self.window:
                self._open.popitem(last=False)
        return self._open[entry.shard].get_tensor(f"{entry.key}.{part}")

    def _prefetch(self, place: int) -> None:
        """When a window begins, read the files of the next one in the background."""
        epoch, place = divmod(place, len(self))
        order = self.order(epoch)
        coming = int(np.searchsorted(order.ends, place, side="right")) + 1
        shards = order.windows[coming] if coming < len(order.windows) else self.order(epoch + 1).windows[0]
        if shards != self._prefetched:
            self._prefetched = shards
            paths = [self.folder / shard for shard in shards]
            threading.Thread(target=read_through, args=(paths,), name="shard prefetch", daemon=True).start()


def read_through(paths: list[Path]) -> None:
    """Read files once from begin to end, so that the system holds them when they are mapped; ranks share that."""
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                while file.read(READ_BYTES):
                    pass
        except OSError:  # whoever takes a clip from it says what is wrong
            return
