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
    if stage == "pretrain":
        from .pretrain import train_pretrain

        return train_pretrain(settings, resume)
    from .loop import train
    from .parallel import start_parallel

    parallel = start_parallel(settings.device)
    if stage == "teacher":
        from .teacher import TeacherStage

        return train(TeacherStage(settings, parallel), stage, resume)
    from .distill import DistillStage

    return train(DistillStage(settings, parallel), stage, resume)
