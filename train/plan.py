"""The costs of a run, estimated before it starts: parameters, memory and operations of one process."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from ..model.config import WanConfig
from ..model.wan import WanModel
from .config import NetworkConfig, OptimConfig
from .lora import add_lora
from .stages.distill import DistillConfig
from .stages.pretrain import PretrainConfig
from .stages.teacher import TeacherConfig

FP32 = 4
OPTIMIZER = 4 * FP32
"""Bytes per trained parameter: weight, gradient, two moments of Adam."""
UNITS = {"parameters": ("M", 1e6), "bytes": ("GB", 1e9), "flop": ("TFLOP", 1e12)}

Row = tuple[str, str, float]
"""Kind (a key of UNITS), label, figure."""


@dataclass(frozen=True)
class Plan:
    """Costs of one process and one iteration."""

    rows: tuple[Row, ...]

    def total(self, kind: str) -> float:
        """Sum of the figures of a kind."""
        return sum(figure for row, _, figure in self.rows if row == kind)

    def table(self, title: str) -> Table:
        """A table for the terminal."""
        table = Table("", "", title=title)
        table.add_column("", justify="right")
        for kind, (unit, scale) in UNITS.items():
            for row, label, figure in self.rows:
                if row == kind:
                    table.add_row(kind, label, f"{figure / scale:,.2f} {unit}")
            if kind != "parameters":
                table.add_row(f"[bold]{kind}", "[bold]total", f"[bold]{self.total(kind) / scale:,.2f} {unit}")
            table.add_section()
        return table


def block_flop(sizes: WanConfig, queries: int, keys: int) -> float:
    """Operations of a forward pass of all blocks: `queries` tokens attend to `keys` tokens and to the text."""
    dim = sizes.dim
    linear = 2 * queries * (6 * dim * dim + 2 * dim * sizes.ffn_dim)  # q, k, v, o; cross-attention q, o; ffn
    attention = 4 * queries * dim * (keys + sizes.text_len)
    return sizes.num_layers * (linear + attention)


def plan(config: NetworkConfig, world_size: int) -> Plan:
    """Costs of a stage at the longest rollout of the run."""
    stages = {PretrainConfig: _pretrain, TeacherConfig: _teacher, DistillConfig: _distill}
    rows = stages.get(type(config), lambda *_: ())
    return Plan((*_weights(config, world_size), *rows(config, math.ceil(config.batch / world_size), world_size)))


def _weights(config: NetworkConfig, world_size: int) -> Iterator[Row]:
    with torch.device("meta"):
        net = WanModel(config.network)
    total, itemsize = sum(p.numel() for p in net.parameters()), config.dtype.itemsize
    trained = sum(p.numel() for p in add_lora(net, config.lora, 0).parameters() if p.requires_grad)
    optims = {
        name.removesuffix("optim"): value for name, value in vars(config).items() if isinstance(value, OptimConfig)
    }
    has_teacher = isinstance(config, DistillConfig)
    yield "parameters", f"of a {config.preset} network", total
    yield "parameters", "trained, of each network", trained
    for name, optim in optims.items():
        size = trained * (OPTIMIZER + (FP32 if optim.ema else 0)) + (total - trained) * FP32
        yield "bytes", f"{name.rstrip('_') or 'network'}: weights, gradients, Adam, average", size / world_size
    if has_teacher:
        yield "bytes", "teacher, frozen", total * itemsize / world_size
    if world_size > 1 or itemsize < FP32:
        yield "bytes", "weights gathered for passes", (len(optims) + has_teacher) * total * itemsize


def _pretrain(config: PretrainConfig, samples: int, world_size: int) -> Iterator[Row]:
    sizes, chunk = config.network, config.memory.chunk * config.frame_tokens
    clip = 2 * config.num_chunks * chunk  # clean and noisy frames
    together = min(samples, config.clips_per_pass or samples)
    passes = samples * block_flop(sizes, clip, config.memory.capacity * config.frame_tokens + chunk)
    passes += config.openings / world_size * block_flop(sizes, 2 * chunk, chunk)
    # Each stream of a chunk has keys and values of its own.
    frames = 2 * together * config.num_chunks * config.memory.num_slots / (sizes.num_layers if config.recompute else 1)
    yield "bytes", "keys and values that chunks attend to", frames * _frame_bytes(config)
    yield _activations(config, together * clip)
    yield "flop", "forward and backward", (4 if config.recompute else 3) * passes


def _teacher(config: TeacherConfig, samples: int, world_size: int) -> Iterator[Row]:
    frames = config.memory.capacity + config.memory.chunk
    yield "bytes", f"keys and values of {frames} frames", frames * _frame_bytes(config)
    chunk, score = _passes(config, config.target_chunks)
    frames = config.memory.capacity + config.target_chunks * config.memory.chunk
    yield _activations(config, frames * config.frame_tokens)
    yield "flop", "commits of contexts", samples * (config.num_chunks - config.target_chunks) * chunk
    yield "flop", "forward and backward", samples * (4 if config.recompute else 3) * score


def _distill(config: DistillConfig, samples: int, world_size: int) -> Iterator[Row]:
    capacity, target, passes = config.memory.capacity, config.target_chunks, 4 if config.recompute else 3
    # The memory before the target and all keys of the target stay until the backward pass.
    frames = capacity + target * config.memory.chunk
    yield "bytes", f"keys and values of {frames} frames", frames * _frame_bytes(config)
    if not config.recompute:
        yield "bytes", "views of the memory, one per chunk of the target", target * capacity * _frame_bytes(config)
    yield _activations(config, frames * config.frame_tokens)
    chunk, score = _passes(config, config.score_chunks or target)
    rollout = (config.context_to + target) * (len(config.denoising_steps) + 1) * chunk
    share = samples / config.critic_per_student
    yield "flop", "critic: rollouts", samples * rollout
    yield "flop", "critic: forward and backward", samples * passes * score
    yield "flop", "student, its share: rollouts", share * rollout
    yield "flop", "student, its share: scores", share * score * (2 + bool(config.guidance))
    yield "flop", "student, its share: backward", share * (passes - 1) * target * chunk


def _passes(config: TeacherConfig | DistillConfig, score_chunks: int) -> tuple[float, float]:
    """Operations of a pass over one chunk and a full memory, and of a network's passes over context and target.

    `score_chunks` chunks of the target are scored together.
    """
    context, chunk = config.memory.capacity * config.frame_tokens, config.memory.chunk * config.frame_tokens
    flop, piece = functools.partial(block_flop, config.network), score_chunks * chunk
    score = flop(context, context) + flop(piece, context + piece)
    return flop(chunk, context + chunk), score * config.target_chunks / score_chunks


def _frame_bytes(config: NetworkConfig) -> float:
    """Keys and values of a latent frame."""
    return 2 * config.network.num_layers * config.network.dim * config.dtype.itemsize * config.frame_tokens


def _activations(config: NetworkConfig, tokens: int) -> Row:
    """Kept for a backward pass: all of every block, or with `recompute` the inputs of blocks and all of one block."""
    sizes = config.network
    inputs, inside = tokens * sizes.dim, tokens * (14 * sizes.dim + 2 * sizes.ffn_dim)
    kept = sizes.num_layers * inputs + inside if config.recompute else sizes.num_layers * inside
    return "bytes", "for the backward pass", kept * config.dtype.itemsize
