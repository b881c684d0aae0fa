"""Students larger than the device: blocks stay in CPU memory and are copied to the device for their own pass.

The device has room for two blocks: the one that runs, and the next (memory/prefetch.py). Results are bit for bit those
of a student that fits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..memory.prefetch import Prefetch, in_pinned_ram
from .causal import WanNet


class Offload:
    """A ModuleRunner for a network whose blocks stay in CPU memory. Its other modules move to the device."""

    def __init__(self, net: WanNet, device: torch.device):
        blocks = list(net.blocks)
        for name, module in net.named_children():
            if name != "blocks":
                module.to(device)
        if device.type == "cuda":
            for weight in net.blocks.parameters():
                weight.data = in_pinned_ram(weight.data)

        def copy(slot: Sequence[Tensor], number: int) -> None:
            for room, weight in zip(slot, blocks[number].parameters(), strict=True):
                room.copy_(weight, non_blocking=True)

        self.numbers = {block: number for number, block in enumerate(blocks)}
        self.names = [name for name, _ in blocks[0].named_parameters()]
        slots = [[torch.empty_like(weight, device=device) for weight in blocks[0].parameters()] for _ in "ab"]
        self.prefetch = Prefetch(slots, copy, len(blocks))

    def __call__(self, module: nn.Module, function: Callable, *args):
        if module not in self.numbers:
            return function(module, *args)
        weights = dict(zip(self.names, self.prefetch.take(self.numbers[module])))
        return functional_call(module, weights, (function, *args))
