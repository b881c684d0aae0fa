"""The costs of a run, estimated before it starts: parameters, memory and operations of one process."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from ..model.config import PRESETS, WanConfig
from ..model.wan import WanModel
from .config import NetworkConfig, OptimConfig
from .lora import add_lora
from .parallel import num_replicas
from .stages.distill import DistillConfig
from .stages.pretrain import PretrainConfig
from .stages.teacher import TeacherConfig

FP32 = 4
OPTIMIZER = 4 * FP32
"""Bytes per trained parameter: weight, gradient, two moments of Adam."""
UNITS = {"parameters": ("M", 1e6), "bytes": ("GB", 1e9), "flop": ("TFLOP", 1e12)}
SCORE_COPIES = 1.5
"""Keys as computed, keys at their positions, and values, in units of keys and values."""


@dataclass(frozen=True)
class Row:
    """One cost."""

    kind: str
    """A key of UNITS."""
    label: str
    most: float
    """In an iteration with the longest rollout."""
    mean: float
    """Mean over the iterations of the run."""


def with_unit(kind: str, figure: float) -> str:
    """A figure in the unit of its kind."""
    unit, scale = UNITS[kind]
    return f"{figure / scale:,.2f} {unit}"


def constant(kind: str, label: str, figure: float) -> Row:
    """A cost that is the same in every iteration."""
    return Row(kind, label, figure, figure)


@dataclass(frozen=True)
class Plan:
    """Costs of one process and one iteration."""

    rows: tuple[Row, ...]
    iterations: int
    world_size: int

    def total(self, kind: str) -> float:
        """Sum of the largest figures of a kind."""
        return sum(row.most for row in self.rows if row.kind == kind)

    @property
    def run_flop(self) -> float:
        """Operations of the whole run, all processes."""
        return sum(row.mean for row in self.rows if row.kind == "flop") * self.iterations * self.world_size

    def hours(self, tflops: float) -> float:
        """GPU hours of the run at a rate of so many TFLOP per second and GPU."""
        return self.run_flop / (tflops * 1e12) / 3600

    def table(self, title: str, tflops: float | None = None) -> Table:
        """A table for the terminal."""
        table = Table("", "", title=title)
        for column in ("longest", "mean"):
            table.add_column(column, justify="right")
        for kind in UNITS:
            rows = [row for row in self.rows if row.kind == kind]
            if kind != "parameters":
                rows.append(Row(kind, "total", self.total(kind), sum(row.mean for row in rows)))
            for row in rows:
                mean = "" if row.mean == row.most else with_unit(kind, row.mean)
                table.add_row(kind, row.label, with_unit(kind, row.most), mean, style="bold" * (row.label == "total"))
            table.add_section()
        processes = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        table.add_row("run", f"{self.iterations:,} iterations, {processes}", "", f"{self.run_flop / 1e18:,.2f} EFLOP")
        if tflops:
            table.add_row("run", f"GPU hours at {tflops:g} TFLOP/s", "", f"{self.hours(tflops):,.1f} h")
        return table


def block_flop(sizes: WanConfig, queries: int, keys: int) -> float:
    """Operations of a forward pass of all blocks: `queries` tokens attend to `keys` tokens and to the text."""
    dim = sizes.dim
    linear = 2 * queries * (6 * dim * dim + 2 * dim * sizes.ffn_dim)  # q, k, v, o; cross-attention q, o; ffn
    attention = 4 * queries * dim * (keys + sizes.text_len)
    return sizes.num_layers * (linear + attention)


def plan(config: NetworkConfig, world_size: int) -> Plan:
    """Costs of a stage. Memories count as full. Raises ValueError unless `sequence` divides the processes."""
    stages = {PretrainConfig: _pretrain, TeacherConfig: _teacher, DistillConfig: _distill}
    rows = stages.get(type(config), lambda *_: ())
    replicas = num_replicas(world_size, config.sequence)
    share = lambda row: Row(row.kind, row.label, row.most / config.sequence, row.mean / config.sequence)
    # The processes of a replica divide tokens and heads, and so all that a sample needs.
    of_samples = map(share, rows(config, math.ceil(config.batch / replicas), replicas))
    return Plan((*_weights(config, world_size), *of_samples), config.steps, world_size)


def _weights(config: NetworkConfig, world_size: int) -> Iterator[Row]:
    """Trained networks by the field of their optimiser, then a frozen one."""
    optims = {
        name.removesuffix("optim").rstrip("_"): value
        for name, value in vars(config).items()
        if isinstance(value, OptimConfig)
    }
    scored_by = config.scored_by if isinstance(config, DistillConfig) else config.preset
    presets = {name: scored_by if name == "critic" else config.preset for name in optims}
    sizes, itemsize = {preset: _parameters(config, preset) for preset in presets.values()}, config.dtype.itemsize
    for preset, (total, trained) in sizes.items():
        yield constant("parameters", f"of a {preset} network", total)
        yield constant(
            "parameters", "trained, of each network" if len(sizes) == 1 else f"trained, of {preset}", trained
        )
    for name, optim in optims.items():
        total, trained = sizes[presets[name]]
        size = trained * (OPTIMIZER + (FP32 if optim.ema else 0)) + (total - trained) * FP32
        yield constant(
            "bytes", f"{name or 'network'}: weights, gradients, optimiser states, average", size / world_size
        )
    if isinstance(config, DistillConfig):
        yield constant("bytes", "teacher, frozen", sizes[scored_by][0] * itemsize / world_size)
    if world_size > 1 or itemsize < FP32:
        # The weights of idle networks are freed (parallel.Gathered).
        largest = max(total for total, _ in sizes.values())
        yield constant("bytes", "weights gathered for passes, one network", largest * itemsize)


def _parameters(config: NetworkConfig, preset: str) -> tuple[int, int]:
    """Parameters of a network, and those that are trained."""
    with torch.device("meta"):
        net = WanModel(PRESETS[preset])
    total = sum(p.numel() for p in net.parameters())
    return total, sum(p.numel() for p in add_lora(net, config.lora, 0).parameters() if p.requires_grad)


def _pretrain(config: PretrainConfig, samples: int, replicas: int) -> Iterator[Row]:
    sizes, chunk = config.network, config.memory.chunk * config.frame_tokens
    clip = 2 * config.num_chunks * chunk  # clean and noisy frames
    together = min(samples, config.clips_per_pass or samples)
    passes = samples * block_flop(sizes, clip, config.memory.capacity * config.frame_tokens + chunk)
    passes += config.openings / replicas * block_flop(sizes, 2 * chunk, chunk)
    # Each stream of a chunk has keys and values of its own.
    frames = 2 * together * config.num_chunks * config.memory.num_slots / (sizes.num_layers if config.recompute else 1)
    yield constant("bytes", "keys and values that chunks attend to", frames * _frame_bytes(config, sizes))
    yield constant("bytes", "for the backward pass", _activations(config, sizes, together * clip))
    yield constant("flop", "forward and backward", _passes(config) * passes)


def _teacher(config: TeacherConfig, samples: int, replicas: int) -> Iterator[Row]:
    sizes, capacity, target = config.network, config.memory.capacity, config.target_chunks
    yield constant(
        "bytes",
        f"keys and values of {config.memory.num_slots} frames",
        config.memory.num_slots * _frame_bytes(config, sizes),
    )
    yield constant(
        "bytes", "keys and values of the scored context", SCORE_COPIES * capacity * _frame_bytes(config, sizes)
    )
    tokens = (capacity + target * config.memory.chunk) * config.frame_tokens
    yield constant("bytes", "for the backward pass", _activations(config, sizes, tokens))
    most, commit = config.num_chunks - target, samples * _chunk_flop(config, sizes)
    # Contexts have 1 to `most` chunks, a share has none.
    mean = (1 - config.plain_share) * (1 + most) / 2
    yield Row("flop", "commits of contexts", most * commit, mean * commit)
    yield constant(
        "flop", "forward and backward", samples * _passes(config) * _score_flop(config, sizes, target, target)
    )


def _distill(config: DistillConfig, samples: int, replicas: int) -> Iterator[Row]:
    sizes, scored_by, capacity = config.network, PRESETS[config.scored_by], config.memory.capacity
    frame, target = _frame_bytes(config, sizes), config.target_chunks * config.memory.chunk
    # The memory before the target and all keys of the target stay until the backward pass.
    yield constant("bytes", f"keys and values of the rollout, {capacity + target} frames", (capacity + target) * frame)
    if not config.recompute:
        yield constant(
            "bytes", "views of the memory, one per chunk of the target", config.target_chunks * capacity * frame
        )
    context = SCORE_COPIES * capacity * _frame_bytes(config, scored_by)
    yield constant("bytes", f"keys and values of a scored context, {capacity} frames", context)
    tokens = (capacity + target) * config.frame_tokens
    backward = max(_activations(config, sizes, tokens) for sizes in (sizes, scored_by))
    yield constant("bytes", "for the backward pass", backward)
    most = _distill_flop(config, samples, config.context_to, config.target_chunks)
    contexts = [config.longest_context(step) for step in range(config.steps)]
    context = sum((longest + 1) / 2 for longest in contexts if longest) / config.steps
    targets = [
        _distill_flop(config, samples, context, chunks)
        for chunks in range(config.target_from, config.target_chunks + 1)
    ]
    for label, figure in most.items():
        yield Row("flop", label, figure, sum(flop[label] for flop in targets) / len(targets))


def _distill_flop(config: DistillConfig, samples: int, context: float, target: int) -> dict[str, float]:
    """Operations of an iteration with `context` and `target` chunks."""
    sizes, passes, share = config.network, _passes(config), samples / config.critic_per_student
    chunk = _chunk_flop(config, sizes)
    rollout = (context + target) * (len(config.denoising_steps) + 1) * chunk
    score = _score_flop(config, PRESETS[config.scored_by], target, config.score_chunks or target)
    flop = {
        "critic: rollouts": (samples - config.share_rollouts * share) * rollout,
        "critic: forward and backward": samples * passes * score,
        "student, its share: rollouts": share * rollout,
        "student, its share: scores": share * score * (2 + bool(config.guidance)),
        "student, its share: backward": share * (passes - 1) * target * chunk,
    }
    if config.anchor.weight:
        clips = share * config.anchor.batch / config.batch
        flop["student, its share: anchor"] = clips * config.anchor.chunks * passes * 2 * chunk  # clean and noisy
    return flop


def _passes(config: NetworkConfig) -> int:
    """A forward and a backward pass, in forward passes."""
    return 4 if config.recompute else 3


def _chunk_flop(config: NetworkConfig, sizes: WanConfig) -> float:
    """Operations of a pass over one chunk and a full memory."""
    chunk = config.memory.chunk * config.frame_tokens
    return block_flop(sizes, chunk, config.memory.capacity * config.frame_tokens + chunk)


def _score_flop(config: NetworkConfig, sizes: WanConfig, target: int, together: int) -> float:
    """Operations of a network's passes over context and target, `together` chunks of `target` in each."""
    context, piece = config.memory.capacity * config.frame_tokens, together * config.memory.chunk * config.frame_tokens
    return (block_flop(sizes, context, context) + block_flop(sizes, piece, context + piece)) * target / together


def _frame_bytes(config: NetworkConfig, sizes: WanConfig) -> float:
    """Keys and values of a latent frame."""
    return 2 * sizes.num_layers * sizes.dim * config.dtype.itemsize * config.frame_tokens


def _activations(config: NetworkConfig, sizes: WanConfig, tokens: int) -> float:
    """Kept for a backward pass: all of every block, or with `recompute` the inputs of blocks and all of one block."""
    inputs, inside = tokens * sizes.dim, tokens * (14 * sizes.dim + 2 * sizes.ffn_dim)
    kept = sizes.num_layers * inputs + inside if config.recompute else sizes.num_layers * inside
    return kept * config.dtype.itemsize
