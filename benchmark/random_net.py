"""Networks with random weights, for measurements and tests: no part is without effect."""

import torch

from ..model.config import WanConfig
from ..model.wan import Block, Head, WanModel


def random_net(
    config: WanConfig,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> WanModel:
    """A network whose weights are drawn on its device. Nothing is zero, no gate is shut."""
    device = device or torch.device("cpu")
    with torch.device("meta"):
        net = WanModel(config)
    net = net.to(dtype).to_empty(device=device)
    for name, weight in net.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            torch.nn.init.ones_(weight)
    generator = torch.Generator(device).manual_seed(seed)
    net.reset_parameters(generator)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, (Block, Head)):
            drawn = torch.randn(module.modulation.shape, generator=generator, device=device, dtype=dtype)
            module.modulation.data += 0.3 * drawn
    for weight in (net.head.head.weight, net.get_parameter("time_projection.1.weight")):
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    return net.eval().requires_grad_(False)
