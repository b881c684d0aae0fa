"""Training state on disk: written whole or not at all, read back exactly."""

import os
from pathlib import Path

import torch

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict) -> None:
    """Replace the run's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (NAME + ".part")
    torch.save(state, part)
    os.replace(part, folder / NAME)


def load_checkpoint(folder: Path) -> dict:
    """Raises ValueError where there is nothing to resume."""
    path = folder / NAME
    if not path.exists():
        raise ValueError(f"resume: there is no {path}; start without --resume")
    return torch.load(path, weights_only=True)
