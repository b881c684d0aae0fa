"""References: latent frames that are remembered and are not in the film (docs/memory.md, References)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A picture of a character or a place, as one latent frame."""

    latents: Tensor
    """Clean latents [1, C, 1, H, W], normalised, float32, on the CPU."""
    prompt: str = ""
    """Its caption; empty: none, or not known."""
    text: Tensor | None = None
    """Embedding of the prompt that its keys and values are computed under, [1, L, 4096], without padding rows.

    None until the first segment begins; then that segment's.
    """


def reference_frames(references: Sequence[Reference]) -> tuple[int, ...]:
    """The frame numbers of references: `references[frame]` is the remembered frame `frame`. They are below 0."""
    return tuple(range(-len(references), 0))


def frame_name(frame: int, num_references: int) -> str:
    """`reference 1`, or `latent frame 7`."""
    return f"latent frame {frame}" if frame >= 0 else f"reference {num_references + frame + 1}"
