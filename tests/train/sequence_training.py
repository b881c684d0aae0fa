"""What each of the processes of tests/train/test_sequence.py computes: `torchrun` starts it.

Arguments: the setting `sequence`, files of student and teacher, a folder for the main process's results, and stages.
With one stage, no run is resumed.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from context_forcing.model.config import PRESETS, WanConfig
from context_forcing.train.checkpoints import Checkpoints
from context_forcing.train.parallel import full_tensor
from context_forcing.train.presets import build_stage, load_config
from context_forcing.train.trained_network import TrainedNetwork

SIZES = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2)
"""Of the preset `demo`, here and in the test."""
OPTIM = ("lr=0.001", "clip=1e9")
SETTINGS = {
    "pretrain": ["init=STUDENT", *(f"optim.{value}" for value in OPTIM), "text_dropout=0.5"],
    # A replica has its own error buffer, so that only one replica is like one process.
    "teacher": ["init=TEACHER", *(f"optim.{value}" for value in OPTIM), "plain_share=0", "recycling.share=1",
                "recycling.clean_share=0", "recycling.learn_clean_share=1", "recompute=true"],
    "contextual": ["student=STUDENT", "teacher=TEACHER", *(f"student_optim.{value}" for value in OPTIM),
                   *(f"critic_optim.{value}" for value in OPTIM), "critic_per_student=1", "share_rollouts=true",
                   "anchor.weight=0.5", "anchor.batch=2", "anchor.chunks=4", "recall_weight=2", "gate_every=3",
                   "gate_limit=99", "recompute=true"],
}  # fmt: skip
"""A batch of two, so that one replica has two samples and each of two replicas has one."""


def compute(name: str, sequence: int, files: list[str], folder: Path, resume: bool) -> dict:
    """Metrics and gradients of two updates; with `resume`, metrics of a third one with and without a checkpoint."""
    overrides = [each.replace("STUDENT", files[0]).replace("TEACHER", files[1]) for each in SETTINGS[name]]
    config = load_config(name, "smoke", [*overrides, f"sequence={sequence}", "device=cpu"])
    stage, grads, update = build_stage(name, config), [], TrainedNetwork.update

    def recorded(self: TrainedNetwork, *args) -> dict[str, float]:
        own = next(key for key, value in stage.trained.items() if value is self)
        grads.append({f"{own} {key}": full_tensor(p.grad).clone() for key, p in self.parameters()})
        return update(self, *args)

    TrainedNetwork.update = recorded
    try:
        metrics = [stage.step(step) for step in range(2)]
    finally:
        TrainedNetwork.update = update
    if not resume:
        return {"metrics": metrics, "grads": grads}
    Checkpoints(folder, stage, name).save(2, 1.0, "r")
    metrics.append(stage.step(2) | stage.validate())
    again = build_stage(name, config)
    Checkpoints(folder, again, name).load()
    extra = {key: value.float() for key, value in again.extra_state().items()}
    return {"metrics": metrics, "grads": grads, "resumed": again.step(2) | again.validate(), "extra": extra}


def main(sequence: str, student: str, teacher: str, folder: str, *stages: str) -> None:
    torch.set_num_threads(1)
    PRESETS["demo"] = dataclasses.replace(PRESETS["demo"], **dataclasses.asdict(SIZES))
    for name in stages:
        found = compute(name, int(sequence), [student, teacher], Path(folder) / name, resume=len(stages) > 1)
        if torch.distributed.get_rank() == 0:
            torch.save(found, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
