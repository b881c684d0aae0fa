"""What a video says of the code that made it."""

import os
import shutil
import subprocess

import pytest

from context_forcing.video import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_revision_is_read_without_a_change_of_the_checkout(tmp_path, monkeypatch):
    """A git that is killed while it writes leaves a lock, and then no git works there."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    file = tmp_path / "a"
    file.write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    os.utime(file, (1, 1))  # git looks at it again, and would note that it has not changed
    index = tmp_path / ".git/index"
    before = index.read_bytes()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert len(provenance.git_revision()) == 12
    assert index.read_bytes() == before
    file.write_text("2")
    assert provenance.git_revision().endswith("+")
