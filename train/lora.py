"""Low-rank adapters through peft, so that a 1.3B student, critic and teacher train on one GPU (method.md 2.3)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.checkpoints.lora import add_low_rank

ADAPTER = "default"
"""peft's name for the only adapter of a network."""
BASE, DOWN, UP = ".base_layer", f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get adapters, and of what rank."""

    rank: int = 0
    """0: no adapters, all weights learn."""
    alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0: alpha is the rank."""
    targets: tuple[str, ...] = (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
        "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
    )  # fmt: skip
    """Ends of the names of the layers."""

    def __post_init__(self):
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(f"rank: {self.rank} and alpha: {self.alpha} must be 0 or more")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return (self.alpha or self.rank) / self.rank


def add_lora(net: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """The network with adapters that alone learn; they add nothing yet. Rank 0 leaves it as it is.

    Raises ValueError when a target names no layer.
    """
    if not config.rank:
        return net
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if missing := [target for target in config.targets if not any(name.endswith("." + target) for name in names)]:
        raise ValueError(f"targets: {missing[0]!r} names no linear layer; layers are for example {names[-1]}")
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=list(config.targets), lora_dropout=0.0
    )
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(settings, net, adapter_name=ADAPTER)


def merge_lora(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A whole state dict with adapters -> plain names, W + scale * up @ down, multiplied in float32."""
    merged = {}
    for name, value in state.items():
        layer, dot, kind = name.rpartition(".")
        if layer.endswith((DOWN, UP)):
            continue
        plain = layer.removesuffix(BASE)
        if plain != layer and kind == "weight":
            up, down = state[f"{plain}{UP}.weight"], state[f"{plain}{DOWN}.weight"]
            value = add_low_rank(value, up, down, config.scale).to(value.dtype)
        merged[plain + dot + kind] = value
    return merged


def save_lora(path: Path, state: dict[str, Tensor], config: LoraConfig, metadata: dict[str, str]) -> None:
    """The adapters alone, under the names ComfyUI's LoRA loader reads: lora_A, lora_B and alpha a layer."""
    tensors = {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if layer.endswith((DOWN, UP)):
            plain, kind = layer.removesuffix(f".{ADAPTER}").rsplit(".", 1)
            tensors[f"diffusion_model.{plain}.{kind}.weight"] = value.contiguous()
            tensors[f"diffusion_model.{plain}.alpha"] = torch.tensor(float(config.alpha or config.rank))
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata)
    part.replace(path)
