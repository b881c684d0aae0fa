"""Headless training of Context Forcing students."""

from collections.abc import Sequence
from pathlib import Path


def run_stage(stage: str, config: str, overrides: Sequence[str], resume: bool) -> Path:
    """Run one stage of a named configuration; returns what it wrote. Raises ValueError for what is not known."""
    from .config import load_config

    settings = load_config(stage, config, overrides)
    if stage == "vae":
        from .vae import train_vae

        return train_vae(settings, resume)
    from .pretrain import train_pretrain

    return train_pretrain(settings, resume)
