"""Checkpoints of a run: one folder each (torch.distributed.checkpoint), written completely or not at all."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from ..memory.fields import brief
from ..memory.files import sync_folder
from ..model.checkpoints.containers import LOAD_ERRORS, read_json
from ..video.provenance import GivenFile
from .config import field_defaults, plain
from .stage import Stage

MAY_CHANGE = (
    "steps",
    "sequence",
    "checkpoint_every",
    "sample_every",
    "max_skipped",
    "device",
    "recompute",
    "clips_per_pass",
    "out",
)
"""Settings that a resumed run may change."""
MAY_CHANGE_IN_PARTS = ("lr", "clip", "spike", "clips_per_pass")
"""The same of optimisers and of the anchor."""
NUM_KEPT = 2
"""Number of checkpoints on disk."""
STATE, DIGESTS = "run.json", "sha256"


METADATA = ".metadata"
"""The file in which torch lists the tensors of a checkpoint, a pickle."""
IN_METADATA = frozenset(
    [
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        *((module, f"{system}Path") for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    ]
)  # fmt: skip
"""What torch names in it, besides dtypes. Nothing else is unpickled."""


class _Listed(pickle.Unpickler):
    """Reads only what torch writes into a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in IN_METADATA:
            raise pickle.UnpicklingError(f"{METADATA} holds {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads checkpoints. Raises UnpicklingError for objects, which torch itself would unpickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            _Listed(file).load()
        return super().read_metadata(*args, **kwargs)


class _Planner(DefaultLoadPlanner):
    """Puts what is read into the state. Raises UnpicklingError for objects, which torch itself would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no number, text or tensor") from None
        value.seek(0)
        super().load_bytes(read_item, value)


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(run)), None)


class Checkpoints:
    """Writes and reads the checkpoints of one stage."""

    def __init__(self, run: Path, stage: Stage, name: str):
        self.run, self.stage, self.name, self.parallel = run, stage, name, stage.parallel
        self.config = plain(dataclasses.asdict(stage.config))
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def _tensors(self) -> dict[str, dict]:
        return {name: trained.state() for name, trained in self.stage.trained.items()}

    def save(self, step: int, seconds: float, revision: str) -> None:
        """Write the state before iteration `step`, and delete old ones. Raises OSError, which keeps the old ones."""
        try:
            self._save(step, seconds, revision)
        except (RuntimeError, CheckpointException) as error:
            # torch has errors of its own for a file that cannot be written, mostly after that of the system.
            cause = of_disk = _cause(error)
            while of_disk.__context__ and not isinstance(of_disk, OSError):
                of_disk = of_disk.__context__
            if isinstance(of_disk, OSError):
                raise of_disk from None
            if "PytorchStreamWriter" in str(cause):
                raise OSError(brief(cause)) from None
            raise cause from None

    def _save(self, step: int, seconds: float, revision: str) -> None:
        final = self.run / "checkpoints" / f"step-{step:08d}"
        part = final.with_name(final.name + ".part")
        if self.parallel.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.parallel.barrier()
        save_tensors(self._tensors(), checkpoint_id=part)
        torch.save(self.stage.extra_state(), part / f"rank{self.parallel.rank}.pt")
        self.parallel.barrier()
        if self.parallel.is_main:
            state = {
                "stage": self.name, "step": step, "seconds": seconds, "revision": revision, "config": self.config,
                "world_size": self.parallel.world_size,
                "progress": {name: trained.progress() for name, trained in self.stage.trained.items()},
            }  # fmt: skip
            files = {path.name: _sha256(path) for path in sorted(part.iterdir())}
            state[DIGESTS] = files | {STATE: _digest_of(state)}
            with open(part / STATE, "w", encoding="utf-8") as file:
                file.write(json.dumps(state, indent=1))
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            sync_folder(final.parent)
            for old in list_checkpoints(self.run)[:-NUM_KEPT]:
                shutil.rmtree(old)
        self.parallel.barrier()

    def load(self, extra_state: bool = True) -> dict[str, Any]:
        """Restore the stage from the newest checkpoint; returns its `run.json`. An export needs no extra state.

        Raises ValueError without a checkpoint, for a damaged one, or if its settings differ from those of this run.
        """
        path = newest_checkpoint(self.run)
        if path is None:
            raise ValueError(f"resume: {self.run} has no checkpoint; start without --resume")
        run = read_run(path)
        self._check_config(run["config"], path)
        self._check_files(run.get(DIGESTS, {}), path)
        if extra_state:
            self._load_extra_state((run["world_size"], run["config"].get("sequence", 1)), path)
        tensors = self._tensors()
        try:
            load_tensors(tensors, storage_reader=_Reader(path), planner=_Planner())
        except CheckpointException as error:
            if not isinstance(cause := _cause(error), Exception):  # an interrupt
                raise cause from None
            raise _damaged(path, brief(cause)) from None
        for name, trained in self.stage.trained.items():
            trained.load_state(tensors[name], run["progress"][name])
        return run

    def _check_files(self, digests: dict[str, str], path: Path) -> None:
        """Raises ValueError unless the files are those that were written. The ranks divide them."""
        for name in sorted(digests.keys() - {STATE})[self.parallel.rank :: self.parallel.world_size]:
            if not (path / name).is_file():
                raise _damaged(path, f"{name} is missing")
            if _sha256(path / name) != digests[name]:
                raise _damaged(path, f"{name} does not have its digest")

    def _check_config(self, before: dict[str, Any], path: Path) -> None:
        # Settings that are newer than the checkpoint had their default values.
        before = plain(field_defaults(self.stage.config)) | before
        for name, value in self.config.items():
            if name not in MAY_CHANGE and _fixed(before.get(name)) != _fixed(value):
                raise ValueError(
                    f"{name}: {value} now, {before.get(name)} when {path} was begun; resume with the same value"
                )

    def _load_extra_state(self, written_by: tuple[int, int], path: Path) -> None:
        """Each process has its own. `written_by` are the processes then, and those that shared a sample."""
        try:
            states = [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(written_by[0])]
        except LOAD_ERRORS as error:
            raise _damaged(path, brief(error)) from None
        now = self.parallel.world_size, self.parallel.sequence
        if written_by == now:
            self.stage.load_extra_state(states[self.parallel.rank])
        elif any(states):
            then, now = (f"{count} processes" + f" with sequence={n}" * (n > 1) for count, n in (written_by, now))
            raise ValueError(
                f"resume: {path} was written by {then}, with error buffers or weights of their own; start {then}, not"
                f" {now}"
            )


def read_run(path: Path) -> dict[str, Any]:
    """The `run.json` of a checkpoint. Raises ValueError for a damaged one; version 0.1 wrote no digest."""
    run = read_json(path / STATE)
    digests = run.get(DIGESTS, {})
    if not isinstance(digests, dict) or digests.get(STATE, _digest_of(run)) != _digest_of(run):
        raise _damaged(path, f"{STATE} does not have its digest")
    if missing := [name for name in ("stage", "step", "seconds", "revision", "config", "progress") if name not in run]:
        raise _damaged(path, f"{STATE} has no {missing[0]}")
    return run


def _digest_of(state: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's state, without its digests."""
    rest = json.loads(json.dumps({name: value for name, value in state.items() if name != DIGESTS}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return GivenFile.of(path).sha256


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"resume: {path}: not a whole checkpoint ({reason}); delete it, the one before it is then used")


def _cause(error: BaseException) -> BaseException:
    """The first error of a rank, an interrupt too; torch.distributed.checkpoint wraps them all."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((cause for cause, _ in failures.values()), error)


def _fixed(value: Any) -> Any:
    """A setting without the parts that a resumed run may change."""
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name not in MAY_CHANGE_IN_PARTS}
