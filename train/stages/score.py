"""A network that continues a video from remembered frames, all frames of the target at once (method.md 5.2, 5.4).

Teacher and critic read the same remembered latents, each through its own keys. The remembered frames see each other,
clean; the target sees them and itself, in both directions; nothing remembered sees the target.

Shapes: B batch (one video), C latent channels, M remembered frames, T target frames, G text groups, L text tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from ...memory.view import MemoryView
from ...model.network import Network

NOTHING = MemoryView()


@dataclass(frozen=True)
class Score:
    """A network that scores targets."""

    network: Network

    def remember(self, context_BCMHW: Tensor, text_GLC: Tensor) -> MemoryView:
        """One pass at sigma 0 over remembered frames, in the order of their positions; a text each or one for all."""
        if not context_BCMHW.shape[2]:
            return NOTHING
        num_frames, latent_size = context_BCMHW.shape[2], _latent_size(context_BCMHW)
        attend = self.network.attend(NOTHING, num_frames, latent_size, keep=True)
        self.network.flow(context_BCMHW, 0.0, self.network.embed_text(text_GLC, len(text_GLC)), attend)
        rotate = self.network.rotate_to_ranks(latent_size)
        return MemoryView(
            keys=tuple(rotate(k).flatten(1, 2) for k, _ in attend.new_kv),
            values=tuple(v.flatten(1, 2) for _, v in attend.new_kv),
            num_frames=num_frames,
        )

    def flow(self, view: MemoryView, x_BCTHW: Tensor, sigma: float, text_GLC: Tensor) -> Tensor:
        """Predicted flow of the target [B, C, T, H, W], float32; one noise level for all its frames."""
        attend = self.network.attend(view, x_BCTHW.shape[2], _latent_size(x_BCTHW))
        return self.network.flow(x_BCTHW, sigma, self.network.embed_text(text_GLC, len(text_GLC)), attend)


def _latent_size(latents_BCTHW: Tensor) -> tuple[int, int, int]:
    _, channels, _, height, width = latents_BCTHW.shape
    return channels, height, width
