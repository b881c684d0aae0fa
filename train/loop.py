"""The training loop of every stage: resume, step, log, sample, checkpoint, export."""

import contextlib
import logging
import signal
import time
from pathlib import Path

from ..memory.files import hold_folder
from ..video.provenance import git_revision
from .checkpoints import Checkpoints, newest_checkpoint
from .log import RunLog
from .stage import Stage

log = logging.getLogger("context_forcing")


class StopSignal:
    """Context manager that catches SIGTERM, so that the run writes a checkpoint and ends."""

    def __enter__(self) -> "StopSignal":
        self.caught = False
        self.previous = signal.signal(signal.SIGTERM, self._catch)
        return self

    def __exit__(self, *exc) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _catch(self, number: int, frame) -> None:
        self.caught = True


def train(stage: Stage, name: str, resume: bool) -> Path:
    """Run a stage to its end, to SIGTERM, or until it is `finished`; returns the exported file.

    Raises FloatingPointError after more than `max_skipped` successive skipped updates of a network, and ValueError if
    files cannot be written or another process trains in the same folder.
    """
    folder = Path(stage.config.out)
    held = hold_folder("out", folder) if stage.parallel.is_main else contextlib.nullcontext()
    with held:
        try:
            return _train(stage, name, resume)
        except OSError as error:
            newest = newest_checkpoint(folder)
            kept = f"{newest.name} is kept: make room, then --resume" if newest else "make room, then start again"
            raise ValueError(f"out: {folder} cannot be written ({error.strerror or error}); {kept}") from None


def _train(stage: Stage, name: str, resume: bool) -> Path:
    config, parallel, folder = stage.config, stage.parallel, Path(stage.config.out)
    checkpoints = Checkpoints(folder, stage, name)
    start, seconds, revision = 0, 0.0, git_revision()
    if resume:
        run = checkpoints.load()
        start, seconds = run["step"], run["seconds"]
        if run["revision"] != revision:
            revision = f"{run['revision']}, from step {start} {revision}"
    elif newest_checkpoint(folder):
        raise ValueError(f"out: {folder} holds a run already; add --resume to continue it, or choose another out=")
    else:
        for network, path in stage.starts.items():
            log.info("%s starts from %s", network, path or "new weights")
    begin, path = time.monotonic() - seconds, folder

    with RunLog(folder, name, config.steps, start, enabled=parallel.is_main) as run_log, StopSignal() as stop:
        for step in range(start, start if stage.finished else config.steps):
            run_log.log_step(step, stage.step(step))

            for network, trained in stage.trained.items():
                if trained.skipped_last and parallel.is_main:
                    log.warning("step %d, %s: update skipped, gradient norm %g", step, network, trained.norm)
                if trained.skipped > config.max_skipped:
                    raise FloatingPointError(
                        f"{network}: {trained.skipped} updates in a row were skipped (gradient norm {trained.norm:g});"
                        f" resume from {newest_checkpoint(folder)} with a lower learning rate, or check the data"
                    )

            caught = parallel.any(stop.caught)
            stopping = caught or stage.finished
            if (step + 1) % config.sample_every == 0:
                if metrics := stage.validate():
                    run_log.log_validation(step, metrics)
                if image := stage.sample():
                    run_log.log_image(step, image)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stopping:
                seconds = time.monotonic() - begin
                checkpoints.save(step + 1, seconds, revision)
                path = stage.export(folder, step + 1, seconds, revision)
            if stopping:
                if parallel.is_main and stage.finished:
                    log.warning("the stage has ended the run after step %d; its file has the weights it kept", step + 1)
                elif parallel.is_main:
                    log.warning("SIGTERM: stopped after step %d; continue with --resume", step + 1)
                break
    if start >= config.steps or (stage.finished and path == folder):
        path = stage.export(folder, start, seconds, revision)
    return path
