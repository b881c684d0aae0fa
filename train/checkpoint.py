"""Training state on disk: written whole or not at all, read back exactly."""

import os
import subprocess
from pathlib import Path

import torch

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict) -> None:
    """Replace the run's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (NAME + ".part")
    torch.save(state, part)
    os.replace(part, folder / NAME)


MAY_CHANGE = ("steps", "checkpoint_every", "sample_every", "max_skipped", "device", "recompute", "out")
"""Settings that a resumed run may have otherwise than the one before."""


def load_checkpoint(folder: Path, config: dict) -> dict:
    """Raises ValueError where there is nothing to resume, or where it was begun with other settings."""
    path = folder / NAME
    if not path.exists():
        raise ValueError(f"resume: there is no {path}; start without --resume")
    state = torch.load(path, weights_only=True)
    begun = state.get("config", config)
    for name, value in config.items():
        if name not in MAY_CHANGE and begun.get(name) != value:
            raise ValueError(f"{name}: {value} now, {begun.get(name)} when {path} was begun; give the same to resume")
    return state


def check_fresh(folder: Path) -> None:
    """Raises ValueError where a new run would overwrite an older one."""
    if (folder / NAME).exists():
        raise ValueError(f"out: {folder} holds a run already; add --resume to go on with it, or choose another out=")


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
