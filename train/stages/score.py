"""The flow of a target given remembered frames: what the teacher and the critic predict (docs/method.md, Distillation).

Remembered frames attend to each other. The target attends to them and to itself, in both directions.

Shapes: B batch (one video), C latent channels, M remembered frames, T target frames, G text groups, L text tokens.
"""

from typing import cast

import torch
from torch import Tensor

from ...memory.view import MemoryView
from ...model.network import Network


def flow_given_context(
    network: Network, context_BCMHW: Tensor, context_text_GLC: Tensor, x_BCTHW: Tensor, sigma: float, text_GLC: Tensor
) -> Tensor:
    """Predicted flow of a target at one noise level, [B, C, T, H, W], float32.

    The context is clean latents in the order of their positions. There is one text, or one per remembered frame and one
    per chunk of the target.
    """
    _, channels, num_frames, height, width = context_BCMHW.shape
    latent_size, view, text = (channels, height, width), MemoryView(), None
    if num_frames:
        context_text = network.embed_text(context_text_GLC, len(context_text_GLC))
        if context_text_GLC is text_GLC and not torch.is_grad_enabled():
            text = context_text  # with gradients, one embedding would sum them in another order
        attend = network.attend(view, num_frames, latent_size, keep=True)
        network.flow(context_BCMHW, 0.0, context_text, attend)
        rotate, new_kv = network.rotate_to_ranks(latent_size), cast(list[tuple[Tensor, Tensor]], attend.new_kv)
        view = MemoryView(
            keys=tuple(rotate(k).flatten(1, 2) for k, _ in new_kv),
            values=tuple(v.flatten(1, 2) for _, v in new_kv),
            num_frames=num_frames,
        )
    attend = network.attend(view, x_BCTHW.shape[2], latent_size)
    return network.flow(x_BCTHW, sigma, text or network.embed_text(text_GLC, len(text_GLC)), attend)
