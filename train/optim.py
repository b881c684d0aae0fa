"""Optimisers: Muon for the matrices of the blocks, AdamW for the rest (docs/method.md, Optimisers)."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from .config import OptimConfig
from .parallel import distribute_like, full_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices [..., m, n] by Newton-Schulz iteration (Jordan et al. 2024)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, scaled to the size of AdamW's updates.

    torch.optim.Muon processes one matrix after the other in bfloat16: seconds per step on a CPU without bfloat16 units.
    This one processes all matrices of a shape together, on the CPU in float32.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                update = torch.stack([full_tensor(update) for update in updates])
                update = update.float() if update.device.type == "cpu" else update.bfloat16()
                update = orthogonalise(update) * (0.2 * max(shape) ** 0.5)
                for parameter, delta in zip(parameters, update):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                        group["lr"] * distribute_like(delta, parameter)
                    )


def build_optimizers(net: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """`adamw`: AdamW for all trained parameters; `muon`: Muon for the matrices of the blocks, AdamW for the rest."""
    hidden, rest = [], []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            muon = config.kind == "muon" and name.startswith("blocks.") and parameter.ndim == 2
            (hidden if muon else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return [Muon(hidden, lr=config.lr, weight_decay=config.weight_decay), adamw] if hidden else [adamw]
