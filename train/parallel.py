"""One process or many: devices, sharded networks, sums over ranks. The code is the same with and without `torchrun`.

`sequence` processes are a replica. Replicas have samples of their own; the processes of a replica share each of its
samples (model/sequence.py). Weights are sharded over all processes.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ..model.device import pick_device
from ..model.network import ModuleRunner
from ..model.sequence import Processes


@dataclass(frozen=True)
class ParallelState:
    """This process's rank, device and mesh, and the processes it shares samples with."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """All processes; None if nothing is sharded: one process on the CPU."""
    processes: Processes | None = None
    """Those of this replica; None: this one alone."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, images and exports."""
        return self.rank == 0

    @property
    def sequence(self) -> int:
        """Processes of a replica."""
        return self.processes.count if self.processes else 1

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return num_replicas(self.world_size, self.sequence)

    def samples(self, global_batch: int, setting: str = "batch") -> range:
        """This replica's samples of a global batch.

        Raises ValueError, which names the setting, unless all replicas have the same number.
        """
        if global_batch % self.num_replicas:
            shared = f", {self.sequence} for each sample" if self.processes else ""
            raise ValueError(
                f"{setting}: {global_batch} samples do not divide by {self.world_size} processes{shared}; give a"
                f" multiple of {self.num_replicas}"
            )
        return range(self.rank // self.sequence, global_batch, self.num_replicas)

    def mean(self, value: float) -> float:
        """Mean over all ranks, the same number on each. It is that over replicas, whose processes have one value."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.mean(float(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()


def num_replicas(world_size: int, sequence: int) -> int:
    """Number of replicas of `sequence` processes each. Raises ValueError unless they divide the processes."""
    if world_size % sequence:
        raise ValueError(
            f"sequence: {sequence} does not divide {world_size} process{'es' * (world_size > 1)}; start a multiple of"
            f" {sequence} (for a dry run WORLD_SIZE={sequence}), or give sequence=1"
        )
    return world_size // sequence


def start_parallel(device: str = "auto", sequence: int = 1) -> ParallelState:
    """Join the processes that `torchrun` started, or run as one process. `device`: auto, cuda or cpu.

    Successive ranks are a replica of `sequence` processes. Raises ValueError for cuda without a CUDA device, and for a
    number of processes that `sequence` does not divide.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    num_replicas(world_size, sequence)
    if sequence > 1 and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"sequence: needs PyTorch 2.10, this is {torch.__version__}; install it, or give sequence=1")
    chosen, _ = pick_device(device)
    if chosen.type == "cpu":
        if world_size == 1:
            return ParallelState(0, 1, chosen, None)
    else:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        store: dict[str, Any] = {}
        if "RANK" not in os.environ:
            store = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", **store)
    mesh, processes = init_device_mesh(chosen.type, (world_size,)), None
    if sequence > 1:
        group, _ = dist.new_subgroups(sequence)
        processes = Processes(rank % sequence, sequence, group)
    return ParallelState(rank, world_size, chosen, mesh, processes)


def shard_network(net: nn.Module, parallel: ParallelState, dtype: torch.dtype) -> nn.Module:
    """Move a network to the device and shard it block by block (FSDP2): float32 shards, gathered in `dtype`.

    Passes must run modules with `module_runner`: the modules' hooks gather the shards. A pass does not free them,
    because a rollout makes hundreds of passes with the same weights. `Gathered` frees those of idle networks.
    """
    net = net.to(parallel.device)
    if parallel.mesh is None:
        if dtype != torch.float32:
            raise ValueError("precision: one process on the CPU computes in fp32; give precision=fp32, or a GPU")
        return net
    # Blocks return views, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*net.get_submodule("blocks").children(), net):
        sharded = fully_shard(module, mesh=parallel.mesh, mp_policy=policy, reshard_after_forward=False)
        sharded.set_reshard_after_backward(False)
        if parallel.processes:
            # A gradient is the sum over the processes of a replica and the mean over replicas, not the mean over all.
            sharded.set_gradient_divide_factor(parallel.num_replicas)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it adds
    return net


def reshard(net: nn.Module) -> None:
    """Free gathered weights. Call it before sharded weights are updated or read: the next pass gathers them again."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Gathered:
    """The only network of a stage whose weights are gathered."""

    def __init__(self):
        self.net: nn.Module | None = None

    def only(self, net: nn.Module) -> None:
        """Free the weights of any other network. Call it on all ranks before a pass or a backward pass of `net`."""
        if self.net is not None and self.net is not net:
            reshard(self.net)
        self.net = net


def module_runner(net: nn.Module, recompute: bool = False, gathered: Gathered | None = None) -> ModuleRunner:
    """Runs modules through their hooks; with `recompute`, blocks keep only their inputs for the backward pass.

    A recomputed block sees the same values, because memories are immutable. Passes free the weights of the other
    networks of `gathered`.
    """

    def run(module: nn.Module, function: Callable, *args):
        if module is net and gathered:
            gathered.only(net)
        if not recompute or module is net or not torch.is_grad_enabled():
            return module(function, *args)
        return checkpoint(module, function, *args, use_reentrant=False)

    return run


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, equal on every rank, in the dtype and with the shards of `reference`."""
    tensor = tensor.to(reference.dtype)
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale gradients down to the norm `limit` over all shards; returns the norm before."""
    return full_tensor(nn.utils.clip_grad_norm_(list(parameters), limit)).item()
