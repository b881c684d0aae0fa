"""What a rollout is asked for: prompts by sample number, the same on every machine and after every restart."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.text import encode_demo_text
from .world import caption, pacing_script, random_script, random_styles

WORLD_PROMPTS = 3
"""Keeps the seeds of prompts apart from those of clips."""


@dataclass(frozen=True)
class DemoPrompts:
    """Captions of the demo world along random camera scripts, one a chunk."""

    seed: int
    pacing: float = 0.3

    def captions(self, sample: int, num_chunks: int) -> list[str]:
        """The captions of a rollout."""
        rng = np.random.default_rng((self.seed, WORLD_PROMPTS, sample))
        script = pacing_script if rng.random() < self.pacing else random_script
        moves, styles = script(rng, num_chunks), random_styles(rng, num_chunks)
        return [caption(style, move) for style, move in zip(styles, moves)]

    def text(self, sample: int, num_chunks: int) -> Tensor:
        """Text rows [chunks, L, 4096]."""
        rows = torch.cat([encode_demo_text(text) for text in self.captions(sample, num_chunks)])
        used = int(rows.ne(0).any(-1).sum(-1).max())
        return rows[:, :used]
