"""Headless training of Context Forcing students."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_stage(stage: str, config_name: str, overrides: Sequence[str], resume: bool) -> Path:
    """Run one stage with named settings or those of a YAML file; returns the exported file. Raises ValueError."""
    from .config import ExportConfig
    from .loop import export_run, train
    from .presets import build_stage, config_from_json, load_config

    settings = load_config(stage, config_name, overrides)
    if isinstance(settings, ExportConfig):
        build = lambda name, raw: build_stage(name, config_from_json(name, raw))
        return export_run(Path(settings.run), Path(settings.out), build)
    return train(build_stage(stage, settings), stage, resume)


def plan_stage(stage: str, config_name: str, overrides: Sequence[str]) -> list[Any]:
    """What a dry run prints: the settings, and a table of the costs of one process if there is a network to train."""
    import yaml

    from .config import NetworkConfig
    from .plan import plan
    from .presets import load_config

    settings = load_config(stage, config_name, overrides)
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    parts: list[Any] = [f"{stage}, {config_name}", yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)]
    if isinstance(settings, NetworkConfig):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        parts.append(plan(settings, world_size).table(f"one of {world_size} processes, an iteration"))
    return parts
