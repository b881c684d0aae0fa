"""Optimisers: Muon for the hidden matrices, AdamW for the rest (demo_world.md 3)."""

import torch
from torch import nn


def build_optimizers(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon, its update scaled to AdamW's size, on the blocks' matrices; AdamW on embeddings, head, norms and biases."""
    hidden, rest = [], []
    for name, parameter in net.named_parameters():
        (hidden if name.startswith("blocks.") and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
