"""The loop every stage runs in: resume, step, log, sample, checkpoint, stop; and what stages share."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor, nn

from ..model.checkpoints.published import BASE
from ..model.checkpoints.student import StudentSource, check_tensors, write_student
from ..model.config import CARD_KEY, PRESETS, StudentCard
from ..model.wan import WanModel
from .log import RunLog
from .lora import LoraConfig, add_lora, merge_lora, save_lora
from .parallel import PRECISIONS, Parallel, shard
from .trained_network import TrainedNetwork

log = logging.getLogger("context_forcing")

MAY_CHANGE = ("steps", "checkpoint_every", "sample_every", "max_skipped", "device", "recompute", "out")
"""Settings that a resumed run may have otherwise than the one before."""
KEPT = 2
"""Checkpoints that stay on disk."""


def git_revision() -> str:
    """The revision of the code, with `+` where the working tree differs from it; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rng_of(*numbers: int) -> torch.Generator:
    """A generator that is a function of its numbers: no draw depends on what was drawn before, or where."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def load_network(
    path: str, config: Any, parallel: Parallel, lora: LoraConfig | None
) -> tuple[nn.Module, StudentCard | None]:
    """A network from a file of any published layout, or fresh where `path` is empty; sharded, with its card if it has one.

    With `lora` None it does not learn and rests in the precision it computes in; with rank 0 all of it learns.
    Raises ValueError for a file of another size.
    """
    preset, dtype = config.preset, PRECISIONS[config.precision]
    net = WanModel(PRESETS[preset])
    card = None
    if path:
        # The card that a file without one would get does not matter here: any network may be trained on.
        student = StudentSource(path, card=BASE).open()
        check_tensors(net, student.named.tensors, path)
        net.load_state_dict({name: student.tensor(name) for name in student.named.tensors})
        card = student.own_card
    else:
        net.reset_parameters(torch.Generator().manual_seed(config.seed))
    net = net.requires_grad_(False).to(dtype) if lora is None else add_lora(net, lora, config.seed)
    return shard(net, parallel, dtype), card


class Stage(ABC):
    """What a stage brings to the loop. Subclasses set `trainees` and fill in `step` and `export`."""

    def __init__(self, config: Any, parallel: Parallel):
        parallel.samples(config.batch)  # refuses a batch that does not divide
        self.config, self.parallel = config, parallel
        self.trained: dict[str, TrainedNetwork] = {}
        self.begun_from: StudentCard | None = None

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """One iteration; its figures, with `loss`."""

    @abstractmethod
    def export(self, folder: Path, step: int, seconds: float, revision: str) -> Path:
        """Write what the stage makes, as it stands. Called on every rank; the main one writes."""

    def sample(self) -> Image.Image | None:
        """A picture of what the stage makes, or None where there is nothing to look at. Called on every rank."""
        return None

    def validate(self) -> dict[str, float]:
        """Figures taken now and then. Called on every rank."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors of this rank alone that a checkpoint must hold."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Put them back."""

    def rate(self, step: int) -> float:
        """Share of the learning rate: a short rise, then all of it, then a fall to zero over the `decay` last part."""
        config = self.config
        fall = (config.steps - step) / (config.decay * config.steps) if config.decay else 1.0
        return min(1.0, (step + 1) / max(1, config.warmup), fall)

    def save(self, path: Path, name: str, card: StudentCard, step: int, seconds: float, revision: str) -> Path:
        """A trained network with its card, to a file."""
        trainee, lora = self.trained[name], self.config.lora
        weights = trainee.weights()
        if self.begun_from:
            revision = f"{self.begun_from.revision}; then {revision}"
            step, seconds = step + (self.begun_from.train_steps or 0), seconds + (self.begun_from.train_seconds or 0)
        card = dataclasses.replace(
            card, revision=revision, data_seed=self.config.data_seed, train_steps=step, train_seconds=round(seconds)
        )
        if self.parallel.is_main:
            num_heads = trainee.net.blocks[0].self_attn.num_heads
            write_student(path, merge_lora(weights, lora) if lora.rank else weights, num_heads, card)
            if lora.rank:
                save_lora(path.with_stem(path.stem + "_lora"), weights, lora, {CARD_KEY: card.to_json()})
        return path


def _fixed(value):
    """A setting without the parts that a resumed run may have otherwise: how far and how carefully it learns."""
    return {k: v for k, v in value.items() if k not in ("lr", "clip", "spike")} if isinstance(value, dict) else value


class Checkpoints:
    """A run's state in its folder: torch.distributed.checkpoint, one folder a checkpoint, whole or not there at all."""

    def __init__(self, folder: Path, stage: Stage, name: str):
        self.folder, self.stage, self.name = folder / "checkpoints", stage, name
        self.config = json.loads(json.dumps(dataclasses.asdict(stage.config)))
        self.parallel = stage.parallel

    def latest(self) -> Path | None:
        """The newest whole one."""
        found = sorted(self.folder.glob("step-????????")) if self.folder.is_dir() else []
        return found[-1] if found else None

    def _tensors(self) -> dict:
        return {name: trainee.state() for name, trainee in self.stage.trained.items()}

    def save(self, step: int, seconds: float, revision: str) -> None:
        """Write the state before `step`; older ones go."""
        final = self.folder / f"step-{step:08d}"
        part = final.with_name(final.name + ".part")
        if self.parallel.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._together()
        with _quiet():
            dcp.save(self._tensors(), checkpoint_id=part, no_dist=not dist.is_initialized())
        torch.save(self.stage.extra_state(), part / f"rank{self.parallel.rank}.pt")
        self._together()
        if self.parallel.is_main:
            progress = {name: trainee.progress() for name, trainee in self.stage.trained.items()}
            state = {"stage": self.name, "step": step, "seconds": seconds, "revision": revision, "config": self.config,
                     "world_size": self.parallel.world_size, "progress": progress}  # fmt: skip
            (part / "run.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for old in sorted(self.folder.glob("step-????????"))[:-KEPT]:
                shutil.rmtree(old)
        self._together()

    def load(self, with_banks: bool = True) -> dict:
        """Fill the stage from the newest checkpoint; returns its `run.json`. An export needs no error banks.

        Raises ValueError where there is none, or where the run was begun with other settings.
        """
        path = self.latest()
        if path is None:
            raise ValueError(f"resume: there is no checkpoint in {self.folder}; start without --resume")
        run = json.loads((path / "run.json").read_text())
        # Settings that there were not yet when it was begun were as they are by default.
        plain = {
            f.name: f.default for f in dataclasses.fields(self.stage.config) if f.default is not dataclasses.MISSING
        }
        begun = plain | run["config"]
        for name, value in self.config.items():
            if name not in MAY_CHANGE and _fixed(begun.get(name)) != _fixed(value):
                raise ValueError(
                    f"{name}: {value} now, {begun.get(name)} when {path} was begun; give the same to resume"
                )
        banks = {rank: torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(run["world_size"])}
        if run["world_size"] != self.parallel.world_size and any(map(bool, banks.values())) and with_banks:
            raise ValueError(
                f"resume: {path} was written by {run['world_size']} processes, each with an error bank of its own;"
                f" start as many, not {self.parallel.world_size}"
            )
        tensors = self._tensors()
        with _quiet():
            dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        for name, trainee in self.stage.trained.items():
            trainee.load_state(tensors[name])
            trainee.load_progress(run["progress"][name])
        if with_banks:
            self.stage.load_extra_state(banks.get(self.parallel.rank, {}))
        return run

    def _together(self) -> None:
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def _quiet():
    """Without being told that a run of one process is a run of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class StopSignal:
    """Set by SIGTERM while it is entered: the run writes a checkpoint and ends well."""

    def __enter__(self) -> "StopSignal":
        self.caught = False
        self.before = signal.signal(signal.SIGTERM, self._catch)
        return self

    def __exit__(self, *exc) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _catch(self, number: int, frame) -> None:
        self.caught = True


def export_run(folder: Path, out: Path, build: Callable[[str, dict], Stage]) -> Path:
    """Write what a run's newest checkpoint holds into another folder. `build` makes a stage of its name and settings.

    Raises ValueError where there is no run.
    """
    found = sorted((folder / "checkpoints").glob("step-????????"))
    if not found:
        raise ValueError(f"run: {folder} holds no checkpoint of a run")
    run = json.loads((found[-1] / "run.json").read_text())
    stage = build(run["stage"], run["config"])
    Checkpoints(folder, stage, run["stage"]).load(with_banks=False)
    return stage.export(out, run["step"], run["seconds"], run["revision"])


def train(stage: Stage, name: str, resume: bool) -> Path:
    """Run a stage to its end, or to SIGTERM; returns what it exported.

    Raises FloatingPointError when more than `max_skipped` updates of a network in a row had to be dropped.
    """
    config, parallel = stage.config, stage.parallel
    folder = Path(config.out)
    checkpoints = Checkpoints(folder, stage, name)
    start, seconds, revision = 0, 0.0, git_revision()
    if resume:
        run = checkpoints.load()
        start, seconds = run["step"], run["seconds"]
        if run["revision"] != revision:
            revision = f"{run['revision']}, from step {start} {revision}"
    elif checkpoints.latest():
        raise ValueError(f"out: {folder} holds a run already; add --resume to go on with it, or choose another out=")
    began, path = time.monotonic() - seconds, folder

    with RunLog(folder, name, config.steps, start, quiet=not parallel.is_main) as run_log, StopSignal() as stop:
        for step in range(start, config.steps):
            values = stage.step(step)
            run_log.step(step, **values)

            for learner, trainee in stage.trained.items():
                if trainee.skipped_now and parallel.is_main:
                    log.warning("step %d, %s: gradient %g: not applied", step, learner, trainee.norm)
                if trainee.skipped > config.max_skipped:
                    raise FloatingPointError(
                        f"{learner}: {trainee.skipped} updates in a row had bad gradients; the last checkpoint is"
                        f" {checkpoints.latest()}. Go on from it with a lower learning rate, or look at the data"
                    )
            stopping = parallel.any(stop.caught)
            if (step + 1) % config.sample_every == 0:
                if figures := stage.validate():
                    run_log.note(step, **figures)
                if picture := stage.sample():
                    run_log.picture(step, picture)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stopping:
                seconds = time.monotonic() - began
                checkpoints.save(step + 1, seconds, revision)
                path = stage.export(folder, step + 1, seconds, revision)
            if stopping and parallel.is_main:
                log.warning("SIGTERM: stopped after step %d; --resume goes on", step)
            if stopping:
                break
    if start >= config.steps:
        path = stage.export(folder, start, seconds, revision)
    return path
