"""Headless training of Context Forcing students."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_stage(stage: str, config_name: str, overrides: Sequence[str], resume: bool) -> Path:
    """Run one stage with named settings or those of a YAML file; returns the exported file. Raises ValueError."""
    from .checkpoints import newest_checkpoint
    from .config import ExportConfig
    from .loop import train
    from .presets import build_stage, load_config

    settings = load_config(stage, config_name, overrides)
    if isinstance(settings, ExportConfig):
        return _export(Path(settings.run), settings.folder)
    try:
        return train(build_stage(stage, settings), stage, resume)
    except KeyboardInterrupt:
        newest = newest_checkpoint(Path(settings.out))
        kept = f"{newest.name} is kept, continue with --resume" if newest else "no checkpoint is there yet, start again"
        logging.getLogger("context_forcing").warning("%s: stopped; %s", settings.out, kept)
        raise


def _export(folder: Path, out: Path) -> Path:
    """Export a run's newest checkpoint to another folder. Raises ValueError for a folder without a checkpoint."""
    from .checkpoints import Checkpoints, newest_checkpoint, read_run
    from .presets import build_stage, config_from_json

    path = newest_checkpoint(folder)
    if path is None:
        raise ValueError(f"run: {folder} has no checkpoint; give the folder of a run")
    run = read_run(path)
    stage = build_stage(run["stage"], config_from_json(run["stage"], run["config"] | {"sequence": 1}))
    Checkpoints(folder, stage, run["stage"]).load(extra_state=False)
    return stage.export(out, run["step"], run["seconds"], run["revision"])


def plan_stage(stage: str, config_name: str, overrides: Sequence[str], tflops: float | None = None) -> list[Any]:
    """What a dry run prints: the settings, and a table of the costs of one process if there is a network to train.

    `tflops` is a measured rate of a GPU in TFLOP per second, for GPU hours.
    """
    import yaml

    from .config import NetworkConfig, plain
    from .plan import plan
    from .presets import load_config

    settings = load_config(stage, config_name, overrides)
    values = plain(dataclasses.asdict(settings))
    parts: list[Any] = [f"{stage}, {config_name}", yaml.safe_dump(values, sort_keys=False, default_flow_style=None)]
    if isinstance(settings, NetworkConfig):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        shared = f"{settings.sequence} for each sample, " if settings.sequence > 1 else ""
        title = f"one of {world_size} processes, {shared}an iteration"
        parts.append(plan(settings, world_size).table(title, tflops))
    return parts
