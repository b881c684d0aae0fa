"""The flow of a target given remembered frames: what the teacher and the critic predict (docs/method.md, Distillation).

Remembered frames attend to each other. The target attends to them and to itself, in both directions.

Shapes: B batch (one video), C latent channels, M remembered frames, T target frames, G text groups, L text tokens.
"""

import torch
from torch import Tensor

from ...memory.view import KVBuffer, MemoryView
from ...model.causal import ModuleRunner
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
        alone, kept = network.attend(view, num_frames, latent_size), []

        def attend_and_keep(layer: int, q: Tensor, k: Tensor, v: Tensor, inside: ModuleRunner) -> Tensor:
            if len(kept) == layer:  # a recomputed pass comes here twice
                kept.append((k, v))
            return alone(layer, q, k, v, inside)

        network.flow(context_BCMHW, 0.0, context_text, attend_and_keep)
        rotate = network.rotate_to_ranks(latent_size, num_frames)
        # One pass attends to them, so they have no room for its keys.
        layers = [KVBuffer(rotate(k, range(num_frames)).flatten(1, 2), v.flatten(1, 2)) for k, v in kept]
        view = MemoryView(layers, num_frames)
    attend = network.attend(view, x_BCTHW.shape[2], latent_size)
    return network.flow(x_BCTHW, sigma, text or network.embed_text(text_GLC, len(text_GLC)), attend)
