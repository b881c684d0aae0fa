"""Students larger than the device: blocks stay in CPU memory and are copied to the device for their own pass.

The device has room for two blocks: the one that runs, and the next, which is copied from pinned memory on a second
stream. Results are bit for bit those of a student that fits.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .causal import WanNet

Slot = dict[str, Tensor]


class Offload:
    """A ModuleRunner for a network whose blocks stay in CPU memory. Its other modules move to the device."""

    def __init__(self, net: WanNet, device: torch.device):
        self.after = dict(zip(net.blocks, [*net.blocks[1:], net.blocks[0]]))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for name, module in net.named_children():
            if name != "blocks":
                module.to(device)
        if self.stream is not None:
            for weight in net.blocks.parameters():
                weight.data = weight.data.pin_memory()
        like = dict(net.blocks[0].named_parameters())
        self.slots: list[Slot] = [{name: torch.empty_like(w, device=device) for name, w in like.items()} for _ in "ab"]
        """The first one gets the next block."""
        self.ahead: nn.Module | None = None
        """The block in the second slot, or on its way there."""

    def __call__(self, module: nn.Module, function: Callable, *args):
        if module not in self.after:
            return function(module, *args)
        if module is not self.ahead:
            self._fetch(module)
        weights = self.slots[1]
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self._fetch(self.after[module])
        return functional_call(module, weights, (function, *args))

    def _fetch(self, block: nn.Module) -> None:
        """Begin to copy the weights of a block to the first slot, then exchange the slots."""
        slot = self.slots[0]
        if self.stream is not None:
            # The last pass that used this slot must end first.
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            for name, weight in block.named_parameters():
                slot[name].copy_(weight, non_blocking=True)
        self.slots, self.ahead = self.slots[::-1], block
