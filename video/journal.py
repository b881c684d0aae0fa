"""The finished chunks of an unfinished video, on disk, so that a killed process can be resumed.

Latents are kept, keys and values are not: they are a gigabyte per chunk at 1.3B. A resumed run commits the kept chunks
again, in one pass each, and its memory is the same bit for bit. A chunk is used only if its digest is that of what was
written.
"""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..memory.files import OURS, atomic_path, sync_folder
from ..memory.memory import Memory
from ..memory.references import Reference
from ..memory.snapshot import fingerprint_memory, fingerprint_references
from ..model.config import StudentCard
from .pipeline import Pipeline
from .provenance import Provenance
from .story import Story

log = logging.getLogger("context_forcing")

FORMAT = 2
WITHOUT_DIGEST = 1
"""The previous format. Its chunks have no digest."""
DIGEST_KEY = "sha256"
DTYPE = torch.float32
"""The dtype of every chunk (CausalSampler)."""
HEADER = "journal.json"
PART = rf"(?:{re.escape(OURS)})?\.(?:part|lock)"  # in earlier releases without OURS
JOURNAL_FILE = re.compile(rf"\.?(journal\.json|chunk-\d+\.safetensors)({PART})?|(journal|chunk-\d+)\.part")
CHUNK_FILE = re.compile(r"chunk-(\d{6}|[1-9]\d{6,})\.safetensors")


def journal_path(video: Path) -> Path:
    """The folder of a video's journal."""
    return video.with_name(video.name + ".journal")


def journal_inputs(
    pipeline: Pipeline,
    story: Story,
    memory: Memory,
    references: Sequence[Reference],
    made: Provenance,
    loras: Sequence[str],
) -> dict[str, object]:
    """All that a video depends on, for its journal."""
    inputs = {
        "student": pipeline.merged_fingerprint,
        "text encoder": made.text_encoder,
        "codec": made.codec,
        "device": made.device,
        "dtype": str(pipeline.network.dtype),
        "loras": loras,
        "story": _journal_fields(story),
        "card": _journal_fields(pipeline.card),
        "memory": fingerprint_memory(memory),
    }
    # Only if they are not the defaults: older journals do not have them.
    inputs |= {"attention": made.attention} if made.attention != "sdpa" else {}
    inputs |= {"commit attends": made.commit_attends} if made.commit_attends != "all" else {}
    inputs |= {"kv dtype": made.kv_dtype} if made.kv_dtype != "auto" else {}
    inputs |= {"references": fingerprint_references(references)} if references else {}
    inputs |= {"processes": pipeline.network.processes.count} if pipeline.network.processes else {}
    return inputs


def _journal_fields(value: Story | StudentCard) -> dict:
    """The fields of a story or card in a journal. What is in effect of the others is an input of its own.

    Older journals do not have match_sink; it is written if it has an effect.
    """
    fields = dataclasses.asdict(value)
    others = {"commit_attends", "references"} | ({"match_sink"} if not fields.get("match_sink") else set())
    return {name: field for name, field in fields.items() if name not in others}


def has_journal(video: Path) -> bool:
    """Whether a video has a journal with a chunk to resume from."""
    return (journal_path(video) / HEADER).exists() and _chunk_path(journal_path(video), 0).exists()


def num_kept(video: Path) -> int:
    """Chunks in the journal of a video; 0 without one. Another process may write or delete it."""
    try:
        return sum(1 for path in journal_path(video).iterdir() if CHUNK_FILE.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def remove_journal(folder: Path) -> None:
    """Delete a journal, if it is there. Raises ValueError for a folder that is none, and OSError."""
    if folder.exists():
        if not folder.is_dir() or any(not JOURNAL_FILE.fullmatch(path.name) for path in folder.iterdir()):
            raise ValueError(f"{folder}: is not a journal, but has the name of this video's; move or delete it")
        shutil.rmtree(folder)


def _chunk_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.safetensors"


class Journal:
    """A folder of chunks, and a header with all that the video depends on."""

    def __init__(self, folder: Path, inputs: Mapping, resume: bool, *, num_chunks: int, shape: tuple[int, ...]):
        """Begin a journal, or with `resume` continue the one in `folder`. `inputs` is all that the video depends on.

        The video has `num_chunks` chunks of one `shape`. With `resume`, the first chunk that is not what was written is
        deleted with all later ones, and a warning names it. Raises ValueError, one line, if there is no journal to
        resume, if one would be lost, or if it belongs to another video.
        """
        self.folder = folder
        self.finished: list[Tensor] = []
        """Chunks of the earlier run, x0 [1, C, T, H, W]."""
        inputs = json.loads(json.dumps(inputs))
        self._video = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        self._shape = shape
        if resume:
            self._read_chunks(num_chunks, has_digests=self._check_header(inputs) == FORMAT)
        else:
            self._begin(inputs)

    @property
    def has_chunks(self) -> bool:
        """Whether there is a chunk to resume from."""
        return self._path(0).exists()

    def keep(self, number: int, latents_BCTHW: Tensor) -> None:
        """Write the chunk with this number, counted from 0, unless it is there from an earlier run."""
        if number >= len(self.finished):
            path, latents = self._path(number), latents_BCTHW.contiguous()
            try:
                with atomic_path(path) as part:
                    part.write_bytes(save({"latents": latents}, {DIGEST_KEY: self._digest(number, latents)}))
            except OSError as error:
                raise ValueError(f"{path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Delete the journal, because the video is whole."""
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            log.warning("%s: cannot be deleted (%s); the video is whole, delete it", self.folder, error.strerror)

    def _begin(self, inputs: Mapping) -> None:
        folder, header = self.folder, self.folder / HEADER
        if header.exists() and self.has_chunks:
            raise ValueError(
                f"{folder}: holds an unfinished video; continue it with --resume, or delete the folder to begin again"
            )
        try:
            remove_journal(folder)
            folder.mkdir()
            with atomic_path(header) as part:
                part.write_bytes(json.dumps({"format": FORMAT, **inputs}, indent=1).encode())
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
        sync_folder(folder.parent)

    def _check_header(self, inputs: Mapping) -> int:
        """The format of the journal. Raises ValueError unless it can be resumed with these inputs."""
        folder, path = self.folder, self.folder / HEADER
        if not path.exists():
            raise ValueError(f"--resume: there is no journal {folder}; start without --resume")
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            given = {"format": header.get("format"), **inputs}
            differ = [name for name in {**given, **header} if header.get(name) != given.get(name)]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete {folder} to begin again") from None
        if header.get("format") not in (WITHOUT_DIGEST, FORMAT):
            differ.insert(0, "format")
        if differ:
            raise ValueError(
                f"--resume: {folder} was begun with another {', '.join(differ)}; give the same as then, or delete it"
            )
        return header["format"]

    def _read_chunks(self, num_chunks: int, has_digests: bool) -> None:
        """Read the chunks up to the first that is not what was written; delete the rest, last first."""
        names = (CHUNK_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = sorted(int(name[1]) for name in names if name)
        reason = f"the video has {num_chunks} chunks"
        for number in numbers[:num_chunks]:
            if number > len(self.finished):
                reason = f"{self._path(len(self.finished)).name} is missing"
                break
            try:
                self.finished.append(self._read(number, has_digests))
            except _DamagedChunk as error:
                reason = str(error)
                break
        if rest := numbers[len(self.finished) :]:
            result = "are deleted" if len(self.finished) == num_chunks else "are generated again"
            log.warning("%s: %s; it and the later chunks %s", self._path(rest[0]), reason, result)
        for number in reversed(rest):
            try:
                self._path(number).unlink()
            except OSError as error:
                raise ValueError(f"{self._path(number)}: cannot be deleted ({error.strerror})") from None

    def _read(self, number: int, has_digests: bool) -> Tensor:
        """Raises _DamagedChunk unless the file holds what was written as this chunk of this video."""
        path = self._path(number)
        try:
            # Not mapped: Windows does not delete a mapped file.
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            latents = load(data)["latents"]
            digest = _metadata(data).get(DIGEST_KEY)
        except (SafetensorError, LookupError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            raise _DamagedChunk(f"not a whole chunk ({error})") from None
        if latents.shape != self._shape or latents.dtype != DTYPE:
            raise _DamagedChunk(
                f"holds {latents.dtype} of shape {tuple(latents.shape)}, the video's chunks are {DTYPE}, {self._shape}"
            )
        if not latents.isfinite().all():
            raise _DamagedChunk("holds values that are not finite")
        if digest is None and has_digests:
            raise _DamagedChunk("has no digest")
        if digest is not None and digest != self._digest(number, latents):
            raise _DamagedChunk("does not have the digest of this chunk: damaged, or another chunk")
        return latents

    def _digest(self, number: int, latents_BCTHW: Tensor) -> str:
        """SHA-256 of the video, the number of the chunk, its shape, dtype and every byte."""
        sha = hashlib.sha256(f"{self._video} {number} {latents_BCTHW.dtype} {tuple(latents_BCTHW.shape)}".encode())
        sha.update(latents_BCTHW.flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _path(self, number: int) -> Path:
        return _chunk_path(self.folder, number)


class _DamagedChunk(Exception):
    """A file does not hold the chunk that was written. The message is the reason."""


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
