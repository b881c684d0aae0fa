"""The panning camera: from moves to headings and frames, all in art pixels."""

from collections.abc import Sequence

import numpy as np

from .geometry import FRAMES_PER_LATENT, RING_WIDTH, TOKEN, VIEW_HEIGHT, VIEW_WIDTH
from .prompts import Style, check_choice
from .scene import Scene, panorama

_PIXEL_STEP = TOKEN // FRAMES_PER_LATENT


def frame_moves(chunk_moves: Sequence[int], chunk: int = 3) -> list[int]:
    """One move per latent frame [T] from one per chunk."""
    return [move for move in chunk_moves for _ in range(chunk)]


def headings(moves: Sequence[int], start: int = 0) -> np.ndarray:
    """Heading in token columns after each latent frame, int64 [T], not wrapped; `moves` per latent frame.

    The first latent frame is a single pixel frame at heading `start`: its move is ignored.
    """
    for move in moves:
        check_choice("moves", move, (-1, 0, 1))
    steps = np.array(moves, dtype=np.int64)
    steps[:1] = 0
    return start + steps.cumsum()


def view(pano: np.ndarray, offset_art_px: int) -> np.ndarray:
    """The camera's picture with its left edge at a ring position in art pixels, [32, 64, 3]."""
    return pano[:, (offset_art_px + np.arange(VIEW_WIDTH)) % RING_WIDTH]


def _render(scene: Scene, styles: Sequence[Style], style_index: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    # A view's width of the ring again behind its end: every frame is then one slice, much faster than an index array.
    unrolled = {}
    for style in dict.fromkeys(styles):
        ring = panorama(scene, style)
        unrolled[style] = np.concatenate([ring, ring[:, :VIEW_WIDTH]], axis=1)
    frames = np.empty((len(offsets), VIEW_HEIGHT, VIEW_WIDTH, 3), dtype=np.uint8)
    for frame, index, left in zip(frames, style_index.tolist(), (offsets % RING_WIDTH).tolist()):
        frame[...] = unrolled[styles[index]][:, left : left + VIEW_WIDTH]
    return frames


def _check_lengths(styles_per_chunk: Sequence[Style], moves: Sequence[int], chunk: int) -> None:
    if not moves or len(moves) != len(styles_per_chunk) * chunk:
        raise ValueError(
            f"moves has {len(moves)} entries, must have {chunk} per entry of styles_per_chunk "
            f"({len(styles_per_chunk)}) and at least one; frame_moves expands moves given per chunk"
        )


def render_latent_frames(
    scene: Scene, styles_per_chunk: Sequence[Style], moves: Sequence[int], chunk: int = 3, start: int = 0
) -> np.ndarray:
    """The last pixel frame of every latent frame, uint8 [T, 32, 64, 3]; `moves` per latent frame."""
    moves = list(moves)
    _check_lengths(styles_per_chunk, moves, chunk)
    return _render(scene, styles_per_chunk, np.arange(len(moves)) // chunk, headings(moves, start) * TOKEN)


def render_pixel_frames(
    scene: Scene, styles_per_chunk: Sequence[Style], moves: Sequence[int], chunk: int = 3, start: int = 0
) -> np.ndarray:
    """Every pixel frame, uint8 [1 + 4 (T - 1), 32, 64, 3]; `moves` per latent frame."""
    moves = list(moves)
    _check_lengths(styles_per_chunk, moves, chunk)
    steps = np.repeat(np.diff(headings(moves)), FRAMES_PER_LATENT) * _PIXEL_STEP
    offsets = start * TOKEN + np.concatenate([np.zeros(1, dtype=np.int64), steps.cumsum()])
    latent_index = (np.arange(len(offsets)) + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT
    return _render(scene, styles_per_chunk, latent_index // chunk, offsets)


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, 3] by a whole number."""
    if factor < 1:
        raise ValueError(f"factor is {factor}, must be at least 1")
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
