"""What made a video, for the tags of its file."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

TAG = "context_forcing"
"""The tag of an mp4 that says what made it, as JSON."""


def git_revision() -> str:
    """The revision of the code, with `+` if the working tree differs from it; `unknown` outside a checkout."""
    if not (ROOT / ".git").exists():  # The folder may lie in the checkout of another project.
        return "unknown"
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def tags_of(inputs: Mapping[str, object]) -> dict[str, str]:
    """The tags of a video that these inputs and this code made."""
    return {TAG: json.dumps({"revision": git_revision(), **inputs})}
