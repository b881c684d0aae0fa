"""The costs of a run, estimated before it starts: parameters, memory and operations of one process."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from ..model.config import WanConfig
from ..model.wan import WanModel
from .config import DistillConfig, NetworkConfig, PretrainConfig, TeacherConfig
from .lora import add_lora

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
    rows = {PretrainConfig: _pretrain, TeacherConfig: _teacher, DistillConfig: _distill}[type(config)]
    return Plan((*_weights(config, world_size), *rows(config, math.ceil(config.batch / world_size), world_size)))


def _weights(config: NetworkConfig, world_size: int) -> Iterator[Row]:
    with torch.device("meta"):
        net = WanModel(config.network)
    total, itemsize = sum(p.numel() for p in net.parameters()), config.dtype.itemsize
    trained = sum(p.numel() for p in add_lora(net, config.lora, 0).parameters() if p.requires_grad)
    frozen = isinstance(config, DistillConfig)
    yield "parameters", f"of a {config.preset} network", total
    yield "parameters", "trained, of each network", trained
    for name, optim in config.optimizers.items():
        size = trained * (OPTIMIZER + (FP32 if optim.ema else 0)) + (total - trained) * FP32
        yield "bytes", f"{name}: weights, gradients, Adam, average", size / world_size
    if frozen:
        yield "bytes", "teacher, frozen", total * itemsize / world_size
    if world_size > 1 or itemsize < FP32:
        yield "bytes", "weights gathered for passes", (len(config.optimizers) + frozen) * total * itemsize


def _pretrain(config: PretrainConfig, samples: int, world_size: int) -> Iterator[Row]:
    sizes, chunk = config.network, config.memory.chunk * config.frame_tokens
    clip = 2 * config.num_chunks * chunk  # clean and noisy frames
    yield "bytes", "for the backward pass", _activations(config, samples * clip)
    passes = samples * block_flop(sizes, clip, config.memory.capacity * config.frame_tokens + chunk)
    passes += config.openings / world_size * block_flop(sizes, 2 * chunk, chunk)
    yield "flop", "forward and backward", _forward_and_backward(config) * passes


def _teacher(config: TeacherConfig, samples: int, world_size: int) -> Iterator[Row]:
    yield _keys_and_values(config, config.memory.capacity + config.memory.chunk)
    yield _scored_activations(config)
    contexts = config.num_chunks - config.target_chunks
    yield "flop", "commits of contexts", samples * contexts * _chunk_flop(config)
    yield "flop", "forward and backward", samples * _forward_and_backward(config) * _score_flop(config, 0)


def _distill(config: DistillConfig, samples: int, world_size: int) -> Iterator[Row]:
    capacity, target = config.memory.capacity, config.target_chunks
    # The memory at the beginning of the target and all keys of the target stay until the backward pass.
    yield _keys_and_values(config, capacity + target * config.memory.chunk)
    if not config.recompute:
        yield (
            "bytes",
            "views of the memory, one per chunk of the target",
            _keys_and_values(config, target * capacity)[2],
        )
    yield _scored_activations(config)
    chunk, score, again = _chunk_flop(config), _score_flop(config, config.score_chunks), _forward_and_backward(config)
    rollout = (config.context_to + target) * (len(config.denoising_steps) + 1) * chunk
    share = samples / config.critic_per_student
    yield "flop", "critic: rollouts", samples * rollout
    yield "flop", "critic: forward and backward", samples * again * score
    yield "flop", "student, its share: rollouts", share * rollout
    yield "flop", "student, its share: scores", share * score * (2 + bool(config.guidance))
    yield "flop", "student, its share: backward", share * (again - 1) * target * chunk


def _forward_and_backward(config: NetworkConfig) -> int:
    """Their operations in units of a forward pass."""
    return 4 if config.recompute else 3


def _chunk_flop(config: NetworkConfig) -> float:
    """Operations of one pass over a chunk and a full memory."""
    chunk = config.memory.chunk * config.frame_tokens
    return block_flop(config.network, chunk, config.memory.capacity * config.frame_tokens + chunk)


def _score_flop(config: TeacherConfig | DistillConfig, score_chunks: int) -> float:
    """Operations of the passes over context and target, `score_chunks` chunks of the target at a time; 0 is all."""
    context, score_chunks = config.memory.capacity * config.frame_tokens, score_chunks or config.target_chunks
    piece = score_chunks * config.memory.chunk * config.frame_tokens
    passes = block_flop(config.network, context, context) + block_flop(config.network, piece, context + piece)
    return passes * config.target_chunks / score_chunks


def _keys_and_values(config: NetworkConfig, frames: int) -> Row:
    size = 2 * config.network.num_layers * config.network.dim * config.dtype.itemsize * config.frame_tokens
    return "bytes", f"keys and values of {frames} frames", frames * size


def _scored_activations(config: TeacherConfig | DistillConfig) -> Row:
    frames = config.target_chunks * config.memory.chunk + config.memory.capacity
    return "bytes", "for the backward pass", _activations(config, frames * config.frame_tokens)


def _activations(config: NetworkConfig, tokens: int) -> float:
    """Bytes kept for a backward pass: all of every block, or with `recompute` their inputs and all of one block."""
    sizes, itemsize = config.network, config.dtype.itemsize
    inside = tokens * (14 * sizes.dim + 2 * sizes.ffn_dim) * itemsize
    if config.recompute:
        return sizes.num_layers * tokens * sizes.dim * itemsize + inside
    return sizes.num_layers * inside
