"""One process or many: devices, sharded networks, sums over ranks. The same code under `torchrun` and without it."""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ..model.network import ModuleRunner, Network

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What the networks compute in; master weights, optimiser states and losses are float32 always."""


@dataclass(frozen=True)
class Parallel:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """None where nothing is sharded: one process on the CPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, pictures and exports."""
        return self.rank == 0

    def samples(self, global_batch: int) -> range:
        """Which samples of a global batch are this rank's. Raises ValueError unless every rank gets as many."""
        if global_batch % self.world_size:
            raise ValueError(f"batch: {global_batch} samples do not divide by {self.world_size} processes")
        return range(self.rank, global_batch, self.world_size)

    def mean(self, value: float) -> float:
        """Mean over all ranks; the same number on each, so that decisions taken on it agree."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.mean(float(flag)) > 0


def start_parallel(device: str = "auto") -> Parallel:
    """Join the processes that `torchrun` started, or stand alone. `device`: auto, cuda or cpu.

    Raises ValueError for cuda without a CUDA device.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda, but torch sees no CUDA device; give device=cpu or install a CUDA build of torch"
        )
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: {device!r} is not one of auto, cuda, cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if world_size == 1 and not cuda:
        return Parallel(0, 1, where, None)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo")
        else:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return Parallel(rank, world_size, where, init_device_mesh(where.type, (world_size,)))


def shard(net: nn.Module, parallel: Parallel, dtype: torch.dtype) -> nn.Module:
    """A network on this process's device; over a mesh its float32 parameters are sharded block by block (FSDP2).

    Passes must enter through `entry(...)`, which calls the modules' own forward: that is where shards are gathered.
    A rollout makes hundreds of passes with the same weights, so they stay gathered until `gather_no_more`.
    """
    net = net.to(parallel.device)
    if parallel.mesh is None:
        if dtype != torch.float32:
            raise ValueError("precision: one process on the CPU computes in fp32; give precision=fp32, or a GPU")
        return net
    # Blocks return views; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*net.blocks, net):
        fully_shard(module, mesh=parallel.mesh, mp_policy=policy, reshard_after_forward=False)
    net.set_reshard_after_backward(False)
    return net


def reshard(net: nn.Module) -> None:
    """Give up gathered weights: before the sharded ones are updated or read, else passes would go on with old ones."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def entry(net: nn.Module, recompute: bool = False) -> ModuleRunner:
    """How passes enter `net`: through its hooks, and with `recompute` keeping only block inputs for the backward pass.

    Recomputing is right only because a pass reads immutable memories: nothing it saw can have changed.
    """

    def run(module: nn.Module, function: Callable, *args):
        if not recompute or module is net or not torch.is_grad_enabled():
            return module(function, *args)
        return checkpoint(module, function, *args, use_reentrant=False)

    return run


def network_of(net: nn.Module, parallel: Parallel, precision: str, recompute: bool = False) -> Network:
    """A network that computes in a precision on this process's device; its passes enter through `entry`."""
    return Network(net, parallel.device, PRECISIONS[precision], run=entry(net, recompute))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor laid out as `reference` is, in its dtype; every rank keeps its own part, nothing is sent."""
    tensor = tensor.to(reference.dtype)
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients so that their norm over all shards is at most `limit`; returns the norm before."""
    return full_tensor(nn.utils.clip_grad_norm_(list(parameters), limit)).item()
