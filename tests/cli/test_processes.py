"""`generate` under torchrun: several processes make one video."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.sequence import Processes
from context_forcing.video import generate
from context_forcing.video.generate import GenerateRequest
from context_forcing.video.provenance import read_provenance


@pytest.mark.slow
def test_two_processes_make_the_video_of_one(tmp_path, student, frames_of):
    segments = [{"prompt": "A meadow by day.", "seconds": 4.5}, {"prompt": "Snow.", "seconds": 3, "change": "recache"}]
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({"seed": 3, "segments": segments}))
    for name, launch in (("one", []), ("two", ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"])):
        command = [sys.executable, "-m", *launch, "context_forcing.cli", "generate", "story.yaml", "-o", f"{name}.mp4",
                   "--student", str(student), "--device", "cpu", "--memory-out", f"{name}.memory",
                   "--compact"]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("frames, ") == 1, "only the first process reports"
    one, two = (load_file(tmp_path / f"{name}.memory")["film"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    sizes = [(size, len(frames)) for size, frames in (frames_of(tmp_path / f"{name}.mp4") for name in ("one", "two"))]
    assert sizes[0] == sizes[1]
    assert read_provenance(tmp_path / "two.mp4").machine.endswith(", 2 processes")
    names = {"story.yaml", *(f"{name}.{kind}" for name in ("one", "two") for kind in ("mp4", "memory"))}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_files_with_keys_and_values_are_refused(tmp_path):
    files = dict(story=Path("story.yaml"), output=tmp_path / "film.mp4", memory_out=tmp_path / "film.memory")
    request = GenerateRequest(**files, student=StudentSource())
    with pytest.raises(ValueError, match="--memory-out: .*give --compact"), generate._held(request, Processes(0, 2)):
        pass


def test_policy_released_is_refused():
    memory = empty_memory(MemoryConfig(policy="released"), (16, 4, 6))
    with pytest.raises(ValueError, match="policy: released compares whole keys in every layer; use one process"):
        memory.check_supports("several processes")
