"""One video on several processes: each has a part of a frame's tokens and, in self-attention, a part of the heads.

Outside of self-attention tokens do not see each other, so a process computes its own. An exchange before attention
gives it all tokens of its heads, one after attention all heads of its tokens (DeepSpeed-Ulysses, arXiv 2309.14509). So
a memory has the keys and values of a process's heads only. Noise, latents and decisions are the same everywhere.

Shapes: B batch, T latent frames, P tokens per latent frame, N heads, E head dim.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .causal import AttendSelf, ModuleRunner, run_directly


@dataclass(frozen=True)
class Processes:
    """The processes of one video. All compute the same passes in the same order.

    Each computes the same loss. The gradient of a weight is the sum of those of all processes.
    """

    rank: int
    count: int
    group: Any = None
    """A group of torch.distributed; None: all processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the video."""
        return self.rank == 0

    def check(self, num_heads: int, num_tokens: int) -> None:
        """Raises ValueError unless heads, and tokens of a latent frame, divide by the processes."""
        for name, number in (("heads", num_heads), ("tokens per latent frame", num_tokens)):
            if number % self.count:
                raise ValueError(
                    f"processes: {self.count} do not divide {number} {name}; start another number, or change the size"
                )

    def part(self, tokens: Tensor, dim: int) -> Tensor:
        """This process's equal part of a dimension, which does not hold the others in memory."""
        size = tokens.shape[dim] // self.count
        return tokens.narrow(dim, self.rank * size, size).contiguous()

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all processes, in order."""
        return _Whole.apply(part.contiguous(), self, dim)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; changes the tensor."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def share(self, value: Any) -> Any:
        """The main process's value, on all."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def of_heads(self, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys or values of all tokens of this process's heads, from all heads of its tokens."""
        return _Exchange.apply(torch.stack(of_tokens), self, -2, -3).unbind(0)

    def around(self, attend_self: AttendSelf) -> AttendSelf:
        """Self-attention that gets all tokens of this process's heads, for a pass over its part of the tokens."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, inside: ModuleRunner = run_directly) -> Tensor:
            q, k, v = self.of_heads(q, k, v)
            return _Exchange.apply(attend_self(layer, q, k, v, inside), self, -3, -2)

        return attend


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes | None]:
    """The processes that `torchrun` started; None for a process alone. Selects its CUDA device."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


class _Exchange(torch.autograd.Function):
    """Divides a dimension over the processes and collects another one."""

    @staticmethod
    def forward(ctx, x: Tensor, processes: Processes, divided: int, collected: int) -> Tensor:
        ctx.processes, ctx.dims = processes, (divided, collected)
        return _exchange(x, processes, divided, collected)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        divided, collected = ctx.dims
        return _exchange(grads[0], ctx.processes, collected, divided), None, None, None


def _exchange(x: Tensor, processes: Processes, divided: int, collected: int) -> Tensor:
    given = torch.stack(x.chunk(processes.count, dim=divided))
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=processes.group)
    return torch.cat(taken.unbind(0), dim=collected)


class _Whole(torch.autograd.Function):
    """Collects a dimension. Every process has the same gradient of the whole, and takes its part."""

    @staticmethod
    def forward(ctx, part: Tensor, processes: Processes, dim: int) -> Tensor:
        ctx.processes, ctx.dim = processes, dim
        parts = [torch.empty_like(part) for _ in range(processes.count)]
        dist.all_gather(parts, part, group=processes.group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return ctx.processes.part(grads[0], ctx.dim), None, None
