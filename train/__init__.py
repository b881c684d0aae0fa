"""Headless training of Context Forcing students."""

import json
from collections.abc import Sequence
from pathlib import Path


def run_stage(stage: str, config: str, overrides: Sequence[str], resume: bool) -> Path:
    """Run one stage of a named configuration or a YAML file; returns what it wrote.

    Raises ValueError for what is not known.
    """
    from .config import from_plain, load_config

    settings = load_config(stage, config, overrides)
    from .loop import export_run, train

    if stage == "export":
        return export_run(Path(settings.run), Path(settings.out), lambda name, raw: _stage(name, from_plain(name, raw)))
    return train(_stage(stage, settings), stage, resume)


def _stage(stage: str, settings):
    from .parallel import start_parallel
    from .stages.codec import VaeStage
    from .stages.distill import DistillStage
    from .stages.pretrain import PretrainStage
    from .stages.teacher import TeacherStage

    kind = {"vae": VaeStage, "pretrain": PretrainStage, "teacher": TeacherStage}.get(stage, DistillStage)
    return kind(settings, start_parallel(settings.device))


def plan_stage(stage: str, config: str, overrides: Sequence[str]) -> list:
    """What to print for a dry run: the settings, and where they can be told the costs. Under torchrun, of a process."""
    import dataclasses
    import os

    import yaml

    from .config import NetworkConfig, load_config
    from .plan import plan

    settings = load_config(stage, config, overrides)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    said = [f"{stage}, {config}", yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)]
    if isinstance(settings, NetworkConfig):
        said.append(plan(settings, world_size).table(f"one of {world_size} processes, an iteration"))
    return said
