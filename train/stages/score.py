"""A network that continues a video from remembered frames, all frames of the target at once (method.md 5.2, 5.4).

Teacher and critic read the same remembered latents, each through its own keys. The remembered frames see each other,
clean; the target sees them and itself, in both directions; nothing remembered sees the target.

Shapes: B batch (one video), C latent channels, M remembered frames, T target frames, G text groups, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...memory.view import MemoryView
from ...model.causal import Call, MemoryAttention, causal_forward, embed_text
from ...model.flow import TIMESTEPS
from ...model.rope import rotary_table, rotate

NOTHING = MemoryView(keys=(), values=(), num_frames=0)


@dataclass(frozen=True)
class Score:
    """A network with the way its passes are entered (`parallel.entry`), computing in `dtype`."""

    net: nn.Module
    dtype: torch.dtype
    call: Call

    def remember(self, context_BCMHW: Tensor, text_GLC: Tensor) -> MemoryView:
        """One pass at sigma 0 over remembered frames, in the order of their positions; a text each or one for all."""
        if not context_BCMHW.shape[2]:
            return NOTHING
        attend = self._attend(NOTHING, context_BCMHW, keep=True)
        self._pass(context_BCMHW, 0.0, text_GLC, attend)
        num_frames, grid = context_BCMHW.shape[2], self._grid(context_BCMHW)
        table = rotary_table(torch.arange(num_frames, device=context_BCMHW.device), *grid, self._head_dim)
        return MemoryView(
            keys=tuple(rotate(k, table).flatten(1, 2) for k, _ in attend.new_kv),
            values=tuple(v.flatten(1, 2) for _, v in attend.new_kv),
            num_frames=num_frames,
        )

    def flow(self, view: MemoryView, x_BCTHW: Tensor, sigma: float, text_GLC: Tensor) -> Tensor:
        """Predicted flow of the target [B, C, T, H, W], float32; one noise level for all its frames."""
        return self._pass(x_BCTHW, sigma, text_GLC, self._attend(view, x_BCTHW))

    def _pass(self, x_BCTHW: Tensor, sigma: float, text_GLC: Tensor, attend: MemoryAttention) -> Tensor:
        timestep = torch.full((1, x_BCTHW.shape[2]), TIMESTEPS * sigma, device=x_BCTHW.device)
        text = self.call(self.net, embed_text, text_GLC.to(self.dtype), len(text_GLC), self.call)
        x = x_BCTHW.to(self.dtype)
        return self.call(self.net, causal_forward, x, timestep, text, attend, attend.attention, self.call).float()

    def _attend(self, view: MemoryView, x_BCTHW: Tensor, keep: bool = False) -> MemoryAttention:
        return MemoryAttention(
            view, self._grid(x_BCTHW), x_BCTHW.shape[2], self._head_dim, x_BCTHW.device, keep=keep
        )  # fmt: skip

    def _grid(self, x_BCTHW: Tensor) -> tuple[int, int]:
        _, patch_rows, patch_columns = self.net.patch_size
        return x_BCTHW.shape[3] // patch_rows, x_BCTHW.shape[4] // patch_columns

    @property
    def _head_dim(self) -> int:
        return self.net.blocks[0].self_attn.head_dim
