"""An unfinished video on disk: every chunk of latents as soon as it is made, so that a killed run can go on.

Keys and values are not written (at 1.3B they are a gigabyte a chunk): chunks that are there are committed again, one
pass each instead of five, and give the same memory to the bit. A chunk is trusted only if it is what was written.
"""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..memory.files import atomic_path, sync_folder

log = logging.getLogger("context_forcing")

FORMAT = 2
WITHOUT_DIGEST = 1
"""The format before, whose chunks have no digest."""
DIGEST_KEY = "sha256"
DTYPE = torch.float32
"""Of every film (CausalSampler)."""
HEADER = "journal.json"
OURS = re.compile(r"journal\.(json|part|json\.part)|chunk-\d+\.(safetensors|part|safetensors\.part)")
CHUNK = re.compile(r"chunk-(\d+)\.safetensors")


def journal_path(video: Path) -> Path:
    """Where the journal of a video stands."""
    return video.with_name(video.name + ".journal")


class Journal:
    """A folder of chunks under a header that says of which video."""

    def __init__(self, folder: Path, asked: dict, resume: bool, *, num_chunks: int, shape: tuple[int, ...]):
        """Begin one, or with `resume` go on with the one that is there; `asked` is all that the video depends on.

        The video has `num_chunks` chunks of one `shape`. With `resume`, the first chunk that is not what was written is
        deleted with all that follow, and a warning says so: they are made again. Raises ValueError, one line, where
        there is none to go on with, where one would be lost, or where it belongs to another video.
        """
        self.folder = folder
        self.made: list[Tensor] = []
        """Chunks of the earlier run, x0 [1, C, T, H, W]."""
        asked = json.loads(json.dumps(asked))
        self._video = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._shape = shape
        header = folder / HEADER
        if not resume:
            if header.exists() and self.begun:
                raise ValueError(
                    f"{folder}: holds an unfinished video; --resume goes on with it, delete the folder to begin anew"
                )
            if folder.exists():
                if not folder.is_dir() or any(not OURS.fullmatch(path.name) for path in folder.iterdir()):
                    raise ValueError(f"{folder}: is in the way of this video's journal; move or delete it")
                shutil.rmtree(folder)
            try:
                folder.mkdir()
                with atomic_path(header) as part:
                    part.write_bytes(json.dumps({"format": FORMAT, **asked}, indent=1).encode())
            except OSError as error:
                raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
            sync_folder(folder.parent)
            return
        if not header.exists():
            raise ValueError(f"--resume: there is no journal {folder}; start without --resume")
        try:
            begun = json.loads(header.read_text(encoding="utf-8"))
            differ = [name for name in asked if begun.get(name) != asked[name]]
            if (written_as := begun.get("format")) not in (WITHOUT_DIGEST, FORMAT):
                differ.insert(0, "format")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{header}: damaged ({error}); delete {folder} to begin anew") from None
        if differ:
            raise ValueError(
                f"--resume: {folder} was begun with another {', '.join(differ)}; give the same as then, or delete it"
            )
        self._take_over(num_chunks, has_digests=written_as == FORMAT)

    @property
    def begun(self) -> bool:
        """Whether there is a chunk to go on from."""
        return self._path(0).exists()

    def keep(self, number: int, latents_BCTHW: Tensor) -> None:
        """Write the chunk that is `number`-th of those made, unless it is there from an earlier run."""
        if number >= len(self.made):
            path, latents = self._path(number), latents_BCTHW.contiguous()
            try:
                with atomic_path(path) as part:
                    part.write_bytes(save({"latents": latents}, {DIGEST_KEY: self._digest(number, latents)}))
            except OSError as error:
                raise ValueError(f"{path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """The video is whole: no journal is needed."""
        shutil.rmtree(self.folder)

    def _take_over(self, num_chunks: int, has_digests: bool) -> None:
        """Read the chunks up to the first that cannot be trusted; delete the rest, last first, and say why."""
        names = (CHUNK.fullmatch(path.name) for path in self.folder.iterdir())
        there = sorted({int(name[1]) for name in names if name and self._path(int(name[1])).name == name[0]})
        reason = f"the video has {num_chunks} chunks"
        for number in there:
            if number == num_chunks:
                break
            if number > len(self.made):
                reason = f"{self._path(len(self.made)).name} is missing"
                break
            try:
                self.made.append(self._read(number, has_digests))
            except _Untrusted as error:
                reason = str(error)
                break
        if rest := there[len(self.made) :]:
            again = "deleted" if len(self.made) == num_chunks else "made again"
            log.warning("%s: %s; it and what follows it is %s", self._path(rest[0]), reason, again)
        try:
            for number in reversed(rest):
                self._path(number).unlink()
        except OSError as error:
            raise ValueError(f"{self._path(number)}: cannot be deleted ({error.strerror})") from None

    def _read(self, number: int, has_digests: bool) -> Tensor:
        """Raises _Untrusted unless the chunk is what was written under this number for this video."""
        path = self._path(number)
        try:
            # Not mapped: on Windows a mapped file cannot be deleted.
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            latents = load(data)["latents"]
            digest = _metadata(data).get(DIGEST_KEY)
        except (SafetensorError, LookupError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            raise _Untrusted(f"not a whole chunk ({error})") from None
        if latents.shape != self._shape or latents.dtype != DTYPE:
            raise _Untrusted(
                f"holds {latents.dtype} of shape {tuple(latents.shape)}, the video's chunks are {DTYPE}, {self._shape}"
            )
        if not latents.isfinite().all():
            raise _Untrusted("holds values that are not finite")
        if digest is None and has_digests:
            raise _Untrusted("has no digest")
        if digest is not None and digest != self._digest(number, latents):
            raise _Untrusted("does not have the digest of this chunk: damaged, or another chunk")
        return latents

    def _digest(self, number: int, latents_BCTHW: Tensor) -> str:
        """Of a chunk in its place: video, number, shape, type and every byte."""
        sha = hashlib.sha256(f"{self._video} {number} {latents_BCTHW.dtype} {tuple(latents_BCTHW.shape)}".encode())
        sha.update(latents_BCTHW.flatten().view(torch.uint8).numpy())
        return sha.hexdigest()

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.safetensors"


class _Untrusted(Exception):
    """A chunk that is not what was written; says why."""


def _metadata(data: bytes) -> dict[str, str]:
    """Of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
