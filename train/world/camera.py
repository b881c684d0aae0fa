"""The panning camera: from moves to headings and frames, in art pixels."""

from collections.abc import Sequence

import numpy as np

from .geometry import CHUNK, RING_WIDTH, TOKEN, VIEW_WIDTH
from .prompts import Style, check_choice
from .scene import Scene, panorama


def headings(moves: Sequence[int], chunk: int = CHUNK, start: int = 0) -> np.ndarray:
    """Heading in token columns after each latent frame, int64 [T], not wrapped.

    `moves` has one entry per chunk of `chunk` latent frames: -1 (left), 0 or +1 (right) columns per frame. The first
    latent frame of a video is one pixel frame at heading `start`, so its move is ignored.
    """
    for move in moves:
        check_choice("moves", move, (-1, 0, 1))
    steps = np.repeat(np.array(moves, dtype=np.int64), chunk)
    steps[:1] = 0
    return start + steps.cumsum()


def view(ring: np.ndarray, left: int) -> np.ndarray:
    """The camera's picture [32, 64, 3] of a ring [32, 384, 3]; `left` is its left edge in art pixels."""
    left %= RING_WIDTH
    wrapped = max(0, left + VIEW_WIDTH - RING_WIDTH)
    return np.concatenate([ring[:, left : left + VIEW_WIDTH], ring[:, :wrapped]], axis=1)


def render_latent_frames(
    scene: Scene, styles: Sequence[Style], moves: Sequence[int], chunk: int = CHUNK, start: int = 0
) -> np.ndarray:
    """The last pixel frame of every latent frame, uint8 [T, 32, 64, 3]; one style and one move per chunk."""
    if not moves or len(moves) != len(styles):
        raise ValueError(f"moves: {len(moves)} entries for {len(styles)} styles; one of each per chunk is needed")
    rings = {style: panorama(scene, style) for style in styles}
    looks = headings(moves, chunk, start).tolist()
    return np.stack([view(rings[styles[i // chunk]], TOKEN * heading) for i, heading in enumerate(looks)])
