"""A network that learns: its optimisers, its moving average, and the rule for bad gradients."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .optim import build_optimizers
from .parallel import Parallel, clip_grad_norm, full_tensor, reshard

HISTORY = 50
"""Gradient norms that a spike is measured against."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How one network learns."""

    kind: str = "adamw"
    """`adamw`, or `muon` for the blocks' matrices and AdamW for the rest."""
    lr: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    """Largest norm of a gradient; longer ones are scaled to it."""
    spike: float = 20.0
    """A gradient this many times longer than the median of the last fifty is dropped, and said so; 0 keeps all."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""
    ema_from: int = 0
    """Updates before which the average is just the weights."""

    def __post_init__(self):
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"kind: {self.kind!r} is not one of adamw, muon")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: {self.ema} must be at least 0 and below 1")


class TrainedNetwork:
    """A network with what its training keeps. Only parameters that require gradients are touched."""

    def __init__(self, net: nn.Module, config: OptimConfig, parallel: Parallel):
        self.net, self.config, self.parallel = net, config, parallel
        self.optimizers = build_optimizers(net, config.kind, config.lr, config.betas, config.weight_decay)
        self.updates = 0
        self.norm, self.skipped, self.skipped_now = 0.0, 0, False
        """The last gradient's norm; updates dropped in a row; whether the last iteration dropped one."""
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.average = {name: p.detach().clone() for name, p in self.trained()} if config.ema else {}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that learn, sharded."""
        reshard(self.net)
        return [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]

    def update(self, loss: float, rate: float = 1.0) -> dict[str, float]:
        """One step along the gradients at `rate` times the learning rate, unless they are bad; clears them.

        Returns `grad_norm` and `skipped`. All ranks decide alike.
        """
        self.norm = norm = clip_grad_norm((p for _, p in self.trained()), self.config.clip)
        self.skipped_now = skipped = self._is_bad(loss, norm)
        self.skipped = self.skipped + 1 if skipped else 0
        if not skipped:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.config.lr * rate
                optimizer.step()
            self.updates += 1
            self.norms.append(norm)
            self._average()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return {"grad_norm": norm, "skipped": float(skipped)}

    def _is_bad(self, loss: float, norm: float) -> bool:
        finite = math.isfinite(loss) and math.isfinite(norm)
        spiked = False
        if self.config.spike and len(self.norms) == HISTORY:
            spiked = norm > self.config.spike * sorted(self.norms)[HISTORY // 2]
        return self.parallel.any(spiked or not finite)

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.ema if self.updates > self.config.ema_from else 0.0
        for name, parameter in self.trained() if self.average else ():
            self.average[name].lerp_(parameter, 1 - decay)

    def state(self) -> dict:
        """Sharded tensors, for torch.distributed.checkpoint."""
        reshard(self.net)
        net, optim = get_state_dict(self.net, self.optimizers)
        if not self.updates:  # it took an empty step to have a state to give
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    for value in state.values():
                        value.zero_()
        return {"net": net, "optim": optim, "average": self.average}

    def load_state(self, state: dict) -> None:
        """Put a state back; `state` came from `state()` and was filled from a checkpoint."""
        set_state_dict(self.net, self.optimizers, model_state_dict=state["net"], optim_state_dict=state["optim"])
        self.average = state["average"]

    def progress(self) -> dict:
        """Plain numbers to keep beside the tensors."""
        return {"updates": self.updates, "norms": list(self.norms), "skipped": self.skipped}

    def load_progress(self, progress: dict) -> None:
        """Put plain numbers back."""
        self.updates, self.skipped = progress["updates"], progress["skipped"]
        self.norms.extend(progress["norms"])

    def weights(self) -> dict[str, Tensor]:
        """All weights whole, on the CPU, averaged where an average is kept. Every rank must call it, the main one
        has them."""
        reshard(self.net)
        found = {}
        for name, value in self.net.state_dict().items():
            tensor = full_tensor(self.average.get(name, value)).detach()
            if self.parallel.is_main:
                found[name] = tensor.cpu().clone()
        return found
