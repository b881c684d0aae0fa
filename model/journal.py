"""An unfinished video on disk: every chunk of latents as soon as it is made, so that a killed run can go on.

Keys and values are not written (at 1.3B they are a gigabyte a chunk): chunks that are there are committed again, one
pass each instead of five, and give the same memory to the bit.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..memory.memory import Memory

FORMAT = 1
HEADER = "journal.json"
OURS = re.compile(r"journal\.(json|part)|chunk-\d+\.(safetensors|part)")


def beside(video: Path) -> Path:
    """Where the journal of a video stands."""
    return video.with_name(video.name + ".journal")


class Journal:
    """A folder of chunks under a header that says of which video."""

    def __init__(self, folder: Path, asked: dict, resume: bool):
        """Begin one, or with `resume` go on with the one that is there; `asked` is all that the video depends on.

        Raises ValueError, one line, where there is none to go on with, where one would be lost, or where it belongs to
        another video.
        """
        self.folder = folder
        self.made: list[Tensor] = []
        """Chunks of the earlier run, x0 [1, C, T, H, W]."""
        asked = json.loads(json.dumps({"format": FORMAT, **asked}))
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
            folder.mkdir()
            _write(header, json.dumps(asked, indent=1).encode())
            return
        if not header.exists():
            raise ValueError(f"--resume: there is no journal {folder}; start without --resume")
        try:
            begun = json.loads(header.read_text(encoding="utf-8"))
            differ = [name for name in asked if begun.get(name) != asked[name]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{header}: damaged ({error}); delete {folder} to begin anew") from None
        if differ:
            raise ValueError(
                f"--resume: {folder} was begun with another {', '.join(differ)}; give the same as then, or delete it"
            )
        while (path := self._path(len(self.made))).exists():
            try:
                # Not mapped: on Windows a mapped file cannot be deleted.
                self.made.append(load(path.read_bytes())["latents"])
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(f"{path}: damaged ({error}); delete it and those after it to go on") from None

    @property
    def begun(self) -> bool:
        """Whether there is a chunk to go on from."""
        return self._path(0).exists()

    def keep(self, number: int, latents_BCTHW: Tensor) -> None:
        """Write the chunk that is `number`-th of those made, unless it is there from an earlier run."""
        if number >= len(self.made):
            path = self._path(number)
            part = path.with_suffix(".part")
            try:
                save_file({"latents": latents_BCTHW.contiguous()}, part)
                os.replace(part, path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: cannot be written ({error})") from None

    def close(self) -> None:
        """The video is whole: no journal is needed."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.safetensors"


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def fingerprint_memory(memory: Memory) -> str:
    """Short name of a memory that a video begins from."""
    sha = hashlib.sha256(repr((memory.config, memory.latent_size, memory.slots, memory.segments)).encode())
    for tensor in memory.tensors():
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
