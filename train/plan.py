"""What a run will cost, before it starts: parameters, memory and arithmetic per process (method.md 4.5)."""

import math
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from ..model.config import PRESETS, WanConfig
from ..model.wan import WanModel
from .config import DistillConfig, NetworkConfig, PretrainConfig, TeacherConfig
from .lora import add_lora
from .parallel import PRECISIONS

FP32 = 4
OPTIMISER = 4 * FP32
"""Bytes a learning parameter needs: itself, its gradient, two moments of Adam."""


@dataclass(frozen=True)
class Plan:
    """Figures of one process; bytes and floating point operations."""

    rows: tuple[tuple[str, str, float], ...]
    """(kind, what, figure); kinds are parameters, bytes, flop."""

    def total(self, kind: str) -> float:
        """Sum of the figures of a kind."""
        return sum(figure for row, _, figure in self.rows if row == kind)

    def table(self, title: str) -> Table:
        """For a person."""
        table = Table(title=title)
        table.add_column("")
        table.add_column("")
        table.add_column("", justify="right")
        for kind, units in (("parameters", "M"), ("bytes", "GB"), ("flop", "TFLOP")):
            scale = {"M": 1e6, "GB": 1e9, "TFLOP": 1e12}[units]
            for row, what, figure in self.rows:
                if row == kind:
                    table.add_row(kind, what, f"{figure / scale:,.2f} {units}")
            if kind != "parameters":
                table.add_row(f"[bold]{kind}", "[bold]together", f"[bold]{self.total(kind) / scale:,.2f} {units}")
            table.add_section()
        return table


def block_flop(sizes: WanConfig, queries: int, keys: int) -> float:
    """One pass of the blocks over `queries` tokens that see `keys` tokens, and the text; forward only."""
    dim, text = sizes.dim, sizes.text_len
    linear = 2 * queries * (6 * dim * dim + 2 * dim * sizes.ffn_dim)  # q k v o, cross q o, ffn
    attention = 4 * queries * dim * (keys + text)
    return sizes.num_layers * (linear + attention)


def plan(config: NetworkConfig, world_size: int) -> Plan:
    """The figures of a stage of distillation, at the longest rollout it will come to."""
    sizes, dtype = PRESETS[config.preset], PRECISIONS[config.precision].itemsize
    frame = config.frame_tokens
    with torch.device("meta"):
        net = WanModel(sizes)
    total = sum(p.numel() for p in net.parameters())
    learning = total if not config.lora.rank else _learning(net, config)
    memory = config.memory
    per_rank = math.ceil(config.batch / world_size)

    rows = [("parameters", f"of a {config.preset} network", total), ("parameters", "that learn, each", learning)]
    for name, optim in config.learners.items():
        held = learning * (OPTIMISER + (FP32 if optim.ema else 0)) + (total - learning) * FP32
        rows.append(("bytes", f"{name}: weights, gradients, Adam, average", held / world_size))
    networks = len(config.learners)
    if isinstance(config, DistillConfig):
        networks += 1
        rows.append(("bytes", "teacher, frozen", total * dtype / world_size))
    if world_size > 1 or dtype < FP32:
        rows.append(("bytes", "weights gathered for passes", networks * total * dtype))
    context, again = memory.capacity * frame, 4 if config.recompute else 3
    if isinstance(config, PretrainConfig):
        clip = 2 * config.num_chunks * memory.chunk * frame  # clean and noisy
        rows.append(("bytes", "for the backward pass", _activations(sizes, per_rank * clip, config.recompute, dtype)))
        passes = per_rank * block_flop(sizes, clip, context + memory.chunk * frame)
        passes += config.openings / world_size * block_flop(sizes, 2 * memory.chunk * frame, memory.chunk * frame)
        rows.append(("flop", "forward and backward", again * passes))
        return Plan(tuple(rows))
    target = config.target_chunks * memory.chunk * frame
    frame_bytes = 2 * sizes.num_layers * sizes.dim * dtype * frame
    # What a memory held when the target began stays until the backward pass, and all the target adds to it.
    frames = memory.capacity + (config.target_chunks if isinstance(config, DistillConfig) else 1) * memory.chunk
    rows.append(("bytes", f"keys and values of {frames} frames", frames * frame_bytes))
    if isinstance(config, DistillConfig) and not config.recompute:
        views = config.target_chunks * memory.capacity * frame_bytes
        rows.append(("bytes", "what each chunk of the target saw, laid out", views))
    rows.append(("bytes", "for the backward pass", _activations(sizes, target + context, config.recompute, dtype)))

    piece = target
    if isinstance(config, DistillConfig) and config.score_chunks:
        piece = config.score_chunks * memory.chunk * frame
    score = block_flop(sizes, context, context) + block_flop(sizes, piece, context + piece)
    score *= target / piece
    chunk = block_flop(sizes, memory.chunk * frame, context + memory.chunk * frame)
    if isinstance(config, TeacherConfig):
        watched = (config.num_chunks - config.target_chunks) * chunk
        rows.append(("flop", "contexts, remembered", per_rank * watched))
        rows.append(("flop", "forward and backward", per_rank * again * score))
        return Plan(tuple(rows))
    passes = len(config.denoising_steps) + 1
    rollout = (config.context_to + config.target_chunks) * passes * chunk
    share = 1 / config.critic_per_student
    scores = score * (2 + bool(config.guidance))
    rows += [
        ("flop", "critic: rollouts", per_rank * rollout),
        ("flop", "critic: forward and backward", per_rank * again * score),
        ("flop", "student, its share: rollouts", per_rank * share * rollout),
        ("flop", "student, its share: scores", per_rank * share * scores),
        ("flop", "student, its share: backward", per_rank * share * (again - 1) * config.target_chunks * chunk),
    ]
    return Plan(tuple(rows))


def _learning(net: nn.Module, config: NetworkConfig) -> int:
    return sum(p.numel() for p in add_lora(net, config.lora, 0).parameters() if p.requires_grad)


def _activations(sizes: WanConfig, tokens: int, recompute: bool, dtype: int) -> float:
    """Bytes a pass keeps for its backward pass: block inputs, and everything inside one block or inside all."""
    inside = tokens * (14 * sizes.dim + 2 * sizes.ffn_dim) * dtype
    if recompute:
        return sizes.num_layers * tokens * sizes.dim * dtype + inside
    return sizes.num_layers * inside
