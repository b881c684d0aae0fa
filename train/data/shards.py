"""Encoded sets on disk: the format, the writer, and a reader by sample number.

A set is a folder. `manifest.jsonl`: the header, then one line per clip, per finished source and per skipped source.
`shard-00000.safetensors`: `KEY.latents` [C, T, H, W], normalised, and `KEY.text` [L, D] of its clips; sets of prompts
have no latents. Its metadata have the SHA-256 of every tensor (not in sets of version 0.1).
`empty_text.safetensors`: the text of the empty prompt, for text dropout and guidance.
`negative_text.safetensors`: that of a negative prompt, for guidance; the prompt is in its metadata.

Shapes: C latent channels, T latent frames, H W latent rows and columns, L text tokens, D text width.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from ...memory.fields import brief, json_object, quoted
from ...memory.files import atomic_path
from .manifest import MANIFEST, Entry, Header, read_manifest

DIGESTS_KEY = "sha256"
EMPTY_TEXT = "empty_text.safetensors"
NEGATIVE_TEXT, PROMPT_KEY = "negative_text.safetensors", "prompt"
WINDOW = 4
"""Shards whose clips are shuffled together, so that few files are read at a time."""


def open_shard(path: Path):
    """A memory-mapped safetensors file. Raises ValueError for a missing or incomplete one."""
    if not path.is_file():
        raise ValueError(f"{path}: this shard of the set is missing; put it back or encode into a new folder")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({brief(error)}); encode into a new folder") from None


class ShardWriter:
    """Appends clips to a set, new or begun. A clip counts when its shard is on the disk and the manifest lists it.

    Other clips are lost with the process; `flush` writes them, and the next clip is added to their shard if that has
    room. So a set is the same wherever it was interrupted. A set without clips begins again if its header is another.
    Raises ValueError for a set with another header, or a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, header: Header, shard_bytes: int):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._pending: list[tuple[str, float | None, str, dict[str, Tensor]]] = []
        self._pending_bytes = 0
        self._may_have_room = True
        """Whether the last shard is to be looked at before a clip is added."""
        self._records: list[dict] = []
        """Records of sources that are not in the manifest file yet."""
        path = self.folder / MANIFEST
        with _one_line_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if next(self.folder.glob("shard-*.safetensors"), None):
                    raise ValueError(f"output: {folder} holds shards without a {MANIFEST}; choose another folder")
                _begin(path, header)
            self.manifest = read_manifest(self.folder)
            has_folders = any(each.is_dir() for each in self.folder.iterdir())  # what workers made is not lost
            if self.manifest.header != header and not self.manifest.entries and not has_folders:
                for name in (EMPTY_TEXT, NEGATIVE_TEXT):
                    (self.folder / name).unlink(missing_ok=True)
                _begin(path, header)
                self.manifest = read_manifest(self.folder)
            self.manifest.header.check_same(header, self.folder)
            os.truncate(path, self.manifest.num_bytes)
        self._num_shards = len({entry.shard for entry in self.manifest.entries})
        self._clips_before = Counter(entry.source for entry in self.manifest.entries)

    @property
    def num_clips(self) -> int:
        """Clips of the set, with those that are not in a shard yet."""
        return len(self.manifest.entries) + len(self._pending)

    def clips_of(self, source: str) -> int:
        """Clips of a source that the set had when it was opened."""
        return self._clips_before[source]

    def write_empty_text(self, encode: Callable[[], Tensor]) -> None:
        """Write the text [L, D] of the empty prompt if the set has none."""
        if not (self.folder / EMPTY_TEXT).exists():
            self._save(EMPTY_TEXT, {"text": encode()})

    def write_negative_text(self, prompt: str, encode: Callable[[], Tensor]) -> None:
        """Write the text [L, D] of a negative prompt if it is not that of the set."""
        if _negative_prompt(self.folder) != prompt:
            self._save(NEGATIVE_TEXT, {"text": encode()}, {PROMPT_KEY: prompt})

    def add(self, source: str, start: float | None, caption: str, tensors: dict[str, Tensor]) -> None:
        """Add a clip: `text` [L, D] and, of a video, `latents` [C, T, H, W]. Writes the shard when it is full."""
        if self._may_have_room:
            self._reopen()
        self._pending.append((source, start, caption, tensors))
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def finish(self, source: str, num_clips: int) -> None:
        """Mark a source as finished."""
        self.manifest.finished[source] = num_clips
        self.manifest.skipped.pop(source, None)
        self._record({"source": source, "clips": num_clips})

    def skip(self, source: str, reason: str) -> None:
        """Mark a source as skipped."""
        if self.manifest.skipped.get(source) != reason:
            self.manifest.skipped[source] = reason
            self._record({"source": source, "skipped": reason})

    def _record(self, record: dict) -> None:
        self._records.append(record)
        if not self._pending:  # else the record must follow the clips
            self.flush()

    def _reopen(self) -> None:
        """If the last shard has room, its clips and the records after them are to be written again.

        Raises ValueError if it is damaged.
        """
        listed, shard = self.manifest.entries, self.manifest.entries[-1].shard if self.manifest.entries else None
        entries = [entry for entry in listed if entry.shard == shard]
        clips = [(entry.source, entry.start, entry.caption, clip_tensors(self.folder, entry)) for entry in entries]
        num_bytes = sum(tensor.nbytes for clip in clips for tensor in clip[-1].values())
        if not shard or num_bytes >= self.shard_bytes:
            self._may_have_room = False
            return
        digests = _digests(self.folder / shard)
        for entry, clip in zip(entries, clips):
            for part, tensor in clip[-1].items():
                _check_digest(self.folder / shard, f"{entry.key}.{part}", tensor, digests)
        lines = (self.folder / MANIFEST).read_bytes()[: self.manifest.num_bytes].splitlines(keepends=True)
        written = [json.loads(line) for line in lines]
        first = next(number for number, record in enumerate(written) if record.get("shard") == shard)
        records, end = [record for record in written[first:] if "key" not in record], sum(map(len, lines[:first]))
        before, num_shards = listed[: len(listed) - len(entries)], self._num_shards - 1
        # No call between these lines: an interrupt finds all of them, or none.
        self.manifest.entries, self.manifest.num_bytes, self._num_shards = before, end, num_shards
        self._pending, self._pending_bytes, self._records, self._may_have_room = clips, num_bytes, records, False

    def flush(self) -> None:
        """Write the clips that are not in a shard yet, then all records."""
        name, entries, tensors = f"shard-{self._num_shards:05d}.safetensors", [], {}
        for number, (source, start, caption, parts) in enumerate(self._pending, len(self.manifest.entries)):
            entries.append(Entry(source, start, caption, name, f"{number:08d}"))
            tensors |= {f"{number:08d}.{part}": tensor for part, tensor in parts.items()}
        if entries:
            digests = {key: _digest(tensor) for key, tensor in tensors.items()}
            self._save(name, tensors, {DIGESTS_KEY: json.dumps(digests)})
        path, records = self.folder / MANIFEST, [dataclasses.asdict(entry) for entry in entries] + self._records
        lines, end = "".join(map(_line, records)).encode(), self.manifest.num_bytes
        with _one_line_errors(path):
            if path.stat().st_size == end:
                with open(path, "ab") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            else:  # a shard is written again, or lines were written in part
                with atomic_path(path) as part:
                    part.write_bytes(path.read_bytes()[:end] + lines)
        listed, end, num_shards = self.manifest.entries + entries, end + len(lines), self._num_shards + bool(entries)
        may_have_room = self._may_have_room or 0 < self._pending_bytes < self.shard_bytes
        # No call between these lines: an interrupt finds all of them, or none.
        self.manifest.entries, self.manifest.num_bytes, self._num_shards = listed, end, num_shards
        self._pending, self._pending_bytes, self._records, self._may_have_room = [], 0, [], may_have_room

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        # The clips of one video share their text, and safetensors does not write shared tensors.
        separate = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
        with _one_line_errors(self.folder / name), atomic_path(self.folder / name) as part:
            save_file(separate, part, metadata)


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _begin(path: Path, header: Header) -> None:
    with atomic_path(path) as part:
        part.write_text(_line(dataclasses.asdict(header)), encoding="utf-8")


def clip_tensors(folder: Path, entry: Entry) -> dict[str, Tensor]:
    """Latents and text of a clip, in the order in which a set has them."""
    with open_shard(folder / entry.shard) as file:
        names = [name for name in ("latents", "text") if f"{entry.key}.{name}" in file.keys()]
        return {name: file.get_tensor(f"{entry.key}.{name}").clone() for name in names}


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else brief(error)
        kept = "complete shards are kept: make room, then run it again"
        raise ValueError(f"output: {path} cannot be written ({reason}); {kept}") from None


def _digest(tensor: Tensor) -> str:
    """SHA-256 of every byte."""
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(uint8).numpy().data).hexdigest()


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a shard; sets of version 0.1 have none."""
    with open_shard(path) as file:
        return json_object((file.metadata() or {}).get(DIGESTS_KEY, "{}"), path)


def _in_whole_shards(folder: Path, entries: list[Entry]) -> list[Entry]:
    """The clips without those of a last shard that is listed in part: it is being written, or the manifest was cut."""
    listed = [entry for entry in entries if entry.shard == entries[-1].shard]
    if listed:
        with open_shard(folder / listed[0].shard) as file:
            if len(listed) < sum(key.endswith(".text") for key in file.keys()):
                return entries[: -len(listed)]
    return entries


def _check_digest(path: Path, name: str, tensor: Tensor, digests: dict[str, str]) -> None:
    """Raises ValueError if a tensor of a shard is not what was written."""
    if name in digests and _digest(tensor) != digests[name]:
        raise ValueError(f"{path}: {name} is damaged, it does not have its digest; encode into a new folder")


class EncodedSet:
    """Clips or prompts of a set by sample number, one text each.

    Every epoch contains every clip once, in an order that is a function of (seed, epoch): shards are shuffled, then the
    clips of `WINDOW` successive shards.

    Raises ValueError for an empty set, missing or damaged shards, and clips of different shapes.
    """

    def __init__(self, folder: str | Path, seed: int, num_frames: int | None = None):
        self.folder, self.seed, self.num_frames = Path(folder), seed, num_frames
        manifest = read_manifest(self.folder)
        self.header, self.entries = manifest.header, _in_whole_shards(self.folder, manifest.entries)
        if not self.entries:
            raise ValueError(f"{self.folder}: the set has no clips; {MANIFEST} lists skipped sources and the reasons")
        self.by_shard: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            self.by_shard.setdefault(entry.shard, []).append(index)
        self.open = lru_cache(maxsize=2 * WINDOW)(lambda shard: open_shard(self.folder / shard))
        self.digests = lru_cache(maxsize=2 * WINDOW)(lambda shard: _digests(self.folder / shard))
        self.order = lru_cache(maxsize=2)(self._order)
        self._check_shards()

    def _check_shards(self) -> None:
        first: tuple[Entry, tuple[int, ...]] | None = None
        for entry in self.entries:
            file = self.open(entry.shard)
            for part in ("text", "latents") if self.header.frames else ("text",):
                try:
                    shape = tuple(file.get_slice(f"{entry.key}.{part}").get_shape())
                except SafetensorError:
                    path = self.folder / entry.shard
                    raise ValueError(f"{path}: {entry.key}.{part} is missing; encode into a new folder") from None
            first = first or (entry, shape)
            if self.header.frames and shape != first[1]:
                raise ValueError(
                    f"{self.folder}: clip {entry.key} of {entry.source} has latents {shape}, clip {first[0].key} of"
                    f" {first[0].source} has {first[1]}; encode clips of different shapes into separate folders"
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
        return self._read(entry, "latents")[:, : self.num_frames].float()[None], self.text(number)

    def text(self, number: int, num_chunks: int = 1) -> Tensor:
        """The text of all chunks, [1, L, D] float32; at least one row."""
        return _at_least_one_row(self._read(self.entry(number), "text"))

    def _read(self, entry: Entry, part: str) -> Tensor:
        """Latents or text of a clip. Raises ValueError if they are not what was written."""
        name = f"{entry.key}.{part}"
        tensor, digests = self.open(entry.shard).get_tensor(name), self.digests(entry.shard)
        _check_digest(self.folder / entry.shard, name, tensor, digests)
        return tensor

    @property
    def empty(self) -> Tensor:
        """The text of the empty prompt, [1, L, D] float32; at least one row."""
        return _at_least_one_row(open_shard(self.folder / EMPTY_TEXT).get_tensor("text"))

    def negative(self, prompt: str) -> Tensor:
        """The text of a negative prompt, [1, L, D] float32. Raises ValueError if the set does not have it."""
        if not prompt:
            return self.empty
        if _negative_prompt(self.folder) != prompt:
            raise ValueError(
                f"negative_prompt: {quoted(prompt)} is not in {self.folder}; run its `context-forcing encode` again"
                " with --negative-prompt, which adds it, or give negative_prompt="
            )
        return _at_least_one_row(open_shard(self.folder / NEGATIVE_TEXT).get_tensor("text"))

    def describe(self) -> str:
        """The `data` field of a student card."""
        return f"{len(self.entries)} clips or prompts of {self.header.source}"


def _negative_prompt(folder: Path) -> str:
    """The negative prompt whose text a set has; empty for none."""
    path = folder / NEGATIVE_TEXT
    return (open_shard(path).metadata() or {}).get(PROMPT_KEY, "") if path.exists() else ""


def _at_least_one_row(text_LD: Tensor) -> Tensor:
    return (text_LD if len(text_LD) else text_LD.new_zeros(1, text_LD.shape[1])).float()[None]
