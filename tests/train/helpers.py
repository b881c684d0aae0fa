"""What the tests of training share."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from context_forcing.memory import Memory, MemoryConfig, empty_memory
from context_forcing.model.checkpoints.containers import read_safetensors
from context_forcing.model.config import WanConfig
from context_forcing.model.network import Network
from context_forcing.train.log import MACHINE_METRICS
from context_forcing.train.parallel import ParallelState, module_runner
from context_forcing.train.stages.student import Student
from context_forcing.train.world.prompts import Style, caption
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import SegmentSpec as Segment
from context_forcing.video.story import Story

TINY = WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=2)
SIGMAS = (1.0, 0.8, 0.5)
ALONE = ParallelState(0, 1, torch.device("cpu"), None)
FILES = {
    "vae": "demo_codec", "pretrain": "student", "teacher": "teacher", "local": "student", "contextual": "student"
}  # fmt: skip
"""The stem of each stage's file."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network_of(net: torch.nn.Module, recompute: bool = False) -> Network:
    return Network(net, torch.device("cpu"), torch.float32, run=module_runner(net, recompute))


def student_of(net: torch.nn.Module, num_texts: int = 1, recompute: bool = False) -> Student:
    text = random(num_texts, 5, net.config.text_dim, seed=9)
    return Student(network_of(net, recompute), text, recompute)


def empty(**settings) -> Memory:
    return empty_memory(MemoryConfig(**settings), (16, 4, 6))


def same_tensors(path: Path, other: Path) -> bool:
    """Whether two files have the same tensors, bit for bit."""
    (a, _), (b, _) = read_safetensors(path), read_safetensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """The logged metrics of a run by step, without those of the machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if k not in MACHINE_METRICS} for line in lines}


def generated(pipeline: Pipeline, memory: Memory, style: Style, seed: int, moves: Sequence[int]) -> Memory:
    """The film of a script as `context-forcing generate` makes it."""
    runs = [(move, len(list(run))) for move, run in itertools.groupby(moves)]
    segments = tuple(Segment(prompt=caption(style, move), seconds=0.75 * count) for move, count in runs)
    story = Story(segments=segments, seed=seed).resolve(pipeline.card, memory)
    for memory in pipeline.generate(story, memory):
        pass
    return memory
