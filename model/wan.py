"""The modules of Wan 2.1's text-to-video network, with the parameter names of Wan's checkpoints.

The forward pass is in causal.py.
"""

import math

import torch
from torch import nn

from .config import WanConfig


class Attention(nn.Module):
    """q, k, v, o, and RMS norms over the full width before the split into heads."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, function, *args):
        """`function(self, *args)` with the module's hooks, for sharded training."""
        return function(self, *args)


class Head(nn.Module):
    """Modulated projection of tokens to patches of flow."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))


class WanModel(nn.Module):
    """The network. Weights are uninitialised until they are loaded or `reset_parameters` draws them."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        self.text_len = config.text_len
        self.patch_size = config.patch_size
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = Head(config)

    def forward(self, function, *args):
        """`function(self, *args)` with the module's hooks, for sharded training."""
        return function(self, *args)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw random weights for training from scratch."""
        for name, weight in self.named_parameters():
            if name.endswith(("bias", "modulation")):
                nn.init.zeros_(weight)
            elif weight.ndim > 1:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
        for name in ("head.head.weight", "time_projection.1.weight"):
            nn.init.zeros_(self.get_parameter(name))
        for block in self.blocks:
            # Gates start at one, shifts and scales at zero.
            block.get_parameter("modulation").data[:, [2, 5]] = 1
