"""From nothing to a distilled student, by the script that docs/demo_student.md names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import SegmentSpec, Story

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_stage_from_one_script(tmp_path):
    command = tmp_path / "context-forcing"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from context_forcing.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "CONFIG": "smoke", "CONTEXT_FORCING": str(command), "OMP_NUM_THREADS": "1"}
    script = [ROOT / "scripts/train_demo.sh", tmp_path / "runs"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    student = tmp_path / "runs/contextual/student.safetensors"
    card = StudentSource(student).open().card
    assert (card.stage, card.train_steps) == ("contextual", 4 + 4 + 4), "pretrain, local, contextual"
    pipeline = Pipeline.load(StudentSource(student).open(), torch.device("cpu"), torch.float32)
    scene = SegmentSpec(prompt="A meadow by day. The camera stays.", seconds=0.75)
    empty = pipeline.empty_memory()
    (memory,) = pipeline.generate(Story(segments=(scene,)).resolve(pipeline.card, empty), empty)
    assert memory.latent_chunks[0].isfinite().all() and memory.latent_chunks[0].std() > 0
