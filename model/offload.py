"""Students larger than the device: blocks wait in CPU memory, and each comes to the device for its own pass only.

There is room for two blocks on the device: the one that runs, and the next, which is copied meanwhile on a stream of
its own from pinned memory. Weights are copied, never changed: results are those of a student that fits, to the bit.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Slot = dict[str, Tensor]


class Offload:
    """A ModuleRunner (causal.py) for a network whose blocks stay in CPU memory; the rest of it moves to the device."""

    def __init__(self, net: nn.Module, device: torch.device):
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
        """The one that the next block goes to stands first."""
        self.ahead: nn.Module | None = None
        """The block that the other one holds or is getting."""

    def __call__(self, module: nn.Module, function: Callable, *args):
        """`function(module, *args)` with the module's weights on the device."""
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
        """Begin to copy a block's weights over those that were used last but one."""
        slot = self.slots[0]
        if self.stream is not None:
            # What was started so far, the last pass over this slot's weights among it, comes first.
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            for name, weight in block.named_parameters():
                slot[name].copy_(weight, non_blocking=True)
        self.slots, self.ahead = self.slots[::-1], block
