"""Low-rank adapters through peft: they allow to train Wan 1.3B on one GPU (docs/method.md, Checkpoints)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..memory.fields import quoted
from ..memory.files import atomic_path
from ..model.checkpoints.lora import add_low_rank
from .config import LoraConfig

ADAPTER = "default"
"""peft's name of the adapter."""
BASE, DOWN, UP = ".base_layer", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(net: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """The network with adapters whose product is zero; only they are trained. Rank 0 returns the network unchanged.

    Raises ValueError for a target that matches no layer.
    """
    if not config.rank:
        return net
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if missing := [target for target in config.targets if not any(name.endswith("." + target) for name in names)]:
        raise ValueError(f"targets: {quoted(missing[0])} names no linear layer; layers are for example {names[-1]}")
    alpha: Any = config.alpha or config.rank
    settings = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets), lora_dropout=0.0)
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(settings, net, adapter_name=ADAPTER)


def adapters(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Up [out, r] and down [r, in] of every adapted weight, by its plain name."""
    layers = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    return {f"{layer}.weight": (state[layer + UP], state[layer + DOWN]) for layer in layers}


def merge_lora(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A state dict with adapters -> plain names, W + (alpha / rank) up @ down, multiplied in float32."""
    pairs = adapters(state)
    plain = {name.replace(BASE, ""): value for name, value in state.items() if not name.endswith((DOWN, UP))}
    merged = {
        name: add_low_rank(plain[name], *pair, config.scale).to(plain[name].dtype) for name, pair in pairs.items()
    }
    return plain | merged


def save_lora(path: Path, state: dict[str, Tensor], config: LoraConfig, metadata: dict[str, str]) -> None:
    """Write the adapters of a state dict with the names of ComfyUI's LoRA loader: lora_A, lora_B, alpha per layer."""
    tensors, alpha = {}, torch.tensor(float(config.alpha or config.rank))
    for weight, (up, down) in adapters(state).items():
        layer = f"diffusion_model.{weight.removesuffix('.weight')}"
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.alpha": alpha.clone()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata)
