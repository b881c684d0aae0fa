"""A network with its optimisers and the moving average of its weights. Updates with bad gradients are skipped."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from .config import OptimConfig
from .optim import build_optimizers
from .parallel import ParallelState, clip_grad_norm, full_tensor, reshard

HISTORY = 50
"""Number of gradient norms whose median a spike is compared with."""


class TrainedNetwork:
    """A network and its training state. Only parameters that require gradients change."""

    def __init__(self, net: nn.Module, config: OptimConfig, parallel: ParallelState):
        self.net, self.config, self.parallel = net, config, parallel
        self.optimizers = build_optimizers(net, config)
        self.updates = 0
        self.norm = 0.0
        """Gradient norm of the last iteration."""
        self.skipped, self.skipped_last = 0, False
        """Number of successive skipped updates up to now; whether the last one was skipped."""
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.average = {name: p.detach().clone() for name, p in self.parameters()} if config.ema else {}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and sharded parameters that require gradients."""
        reshard(self.net)
        return [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]

    def update(self, loss: float, lr_factor: float = 1.0) -> dict[str, float]:
        """One optimiser step at `lr_factor` times the learning rate, unless loss or gradient is bad. Clears gradients.

        Returns `grad_norm` and `skipped`, the same on every rank.
        """
        self.norm = norm = clip_grad_norm((p for _, p in self.parameters()), self.config.clip)
        self.skipped_last = self._is_bad(loss, norm)
        self.skipped = self.skipped + 1 if self.skipped_last else 0
        if not self.skipped_last:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.config.lr * lr_factor
                optimizer.step()
            self.updates += 1
            self.norms.append(norm)
            self._update_average()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return {"grad_norm": norm, "skipped": float(self.skipped_last)}

    def _is_bad(self, loss: float, norm: float) -> bool:
        spike = self.config.spike and len(self.norms) == HISTORY
        is_spike = spike and norm > self.config.spike * sorted(self.norms)[HISTORY // 2]
        return self.parallel.any(bool(is_spike) or not (math.isfinite(loss) and math.isfinite(norm)))

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = self.config.ema if self.updates > self.config.ema_from else 0.0
        for name, parameter in self.parameters() if self.average else ():
            self.average[name].lerp_(parameter, 1 - decay)

    def _exported(self) -> dict[str, Tensor]:
        """This rank's shards of the average, or of the trained weights if no average is kept, by name."""
        weights = self.average or {name: p.detach() for name, p in self.parameters()}
        return {name: w.to_local() if isinstance(w, DTensor) else w for name, w in weights.items()}

    def exported(self) -> dict[str, Tensor]:
        """A copy of this rank's shards of the trained weights that an export has now, by name."""
        return {name: shard.clone() for name, shard in self._exported().items()}

    @torch.no_grad()
    def set_exported(self, shards: dict[str, Tensor]) -> None:
        """Give an export the weights that `exported` returned. The optimisers are left alone."""
        for name, shard in self._exported().items():
            shard.copy_(shards[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the averaged weights, if an average is kept."""
        own = {name: p.detach().clone() for name, p in self.parameters()} if self.average else {}
        try:
            self._copy(self.average)
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters() if weights else ():
            parameter.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """Sharded tensors of a checkpoint (torch.distributed.checkpoint)."""
        reshard(self.net)
        net, optim = get_state_dict(self.net, self.optimizers)
        if not self.updates:  # get_state_dict has taken a step with zero gradients to create the optimiser state
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    for value in state.values():
                        value.zero_()
        return {"net": net, "optim": optim, "average": self.average}

    def progress(self) -> dict[str, Any]:
        """The numbers of a checkpoint."""
        return {"updates": self.updates, "norms": list(self.norms), "skipped": self.skipped}

    def load_state(self, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Restore a checkpoint. `state` is the value of `state()`, filled from the checkpoint."""
        set_state_dict(self.net, self.optimizers, model_state_dict=state["net"], optim_state_dict=state["optim"])
        self.average = state["average"]
        self.updates, self.skipped = progress["updates"], progress["skipped"]
        self.norms.extend(progress["norms"])

    def weights(self) -> dict[str, Tensor]:
        """All weights on the CPU, averaged if an average is kept; empty on other ranks, but every rank must call it."""
        reshard(self.net)
        weights = {}
        for name, value in (self.net.state_dict() | self.average).items():
            tensor = full_tensor(value).detach()
            if self.parallel.is_main:
                weights[name] = tensor.cpu().clone()
        return weights
