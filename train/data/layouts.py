"""What each chunk of a training clip remembers: mixed layouts and rules (docs/method.md, Training).

Shapes: C latent channels, T latent frames, H W latent rows and columns.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from ...memory.config import MemoryConfig
from ...memory.policy import Slots, advance
from ..world.geometry import RING_COLUMNS

LAYOUTS = {"full": 0.8, "sink and fast": 0.1, "fast": 0.1}
"""Parts of the memory that a clip has, with the share of clips."""
RULES = {"recall": 0.45, "cover": 0.2, "novel": 0.12, "clean": 0.1, "uniform": 0.05, "random": 0.08}
"""How the slow frames of a clip are chosen, with the share of clips that have slow memory."""
COVER_THRESHOLDS = (0.97, 0.92, 0.85)
STEP_SIMILARITY = 0.045
"""Two views lose this much similarity per camera step between them."""
STYLE_SIMILARITY = 0.12
SAME_VIEW = 0.5
"""Frames less than so many camera steps apart show the same view."""
LEAST_STEP = 1e-3
"""Smallest camera step of a clip from files, whose frames may all be equal."""


@dataclass(frozen=True)
class Views:
    """How far apart the frames of a clip are."""

    distance_TT: np.ndarray
    """In camera steps."""
    similarity_TT: np.ndarray
    """Takes the place of the similarity of keys, which policies compare with their threshold."""
    has_scale: bool = True
    """Whether the similarity can be compared with thresholds for keys."""

    @classmethod
    def of_world(cls, headings: np.ndarray, styles: np.ndarray) -> "Views":
        """From the true headings [T], in columns of the ring, and the style numbers [T]. A step is a column."""
        columns = (headings[None] - headings[:, None]) % RING_COLUMNS
        distance_TT = np.minimum(columns, RING_COLUMNS - columns)
        other_style = styles[None] != styles[:, None]
        return cls(distance_TT, (1 - STEP_SIMILARITY * distance_TT - STYLE_SIMILARITY * other_style).clip(0))

    @classmethod
    def of_latents(cls, latents_CTHW: Tensor) -> "Views":
        """From clean latents: the cosine per token of 2 x 2 latents, mean over tokens; a distance is 1 - similarity.

        A step is the mean distance of a frame to the next one.
        """
        tokens = rearrange(latents_CTHW, "C T (h r) (w c) -> T (h w) (C r c)", r=2, c=2)
        unit = normalize(tokens.float(), dim=-1).flatten(1)
        similarity_TT = (unit @ unit.T / tokens.shape[1]).double().clamp(-1, 1).numpy()
        step = (1 - np.diagonal(similarity_TT, 1)).mean() if len(similarity_TT) > 1 else 0.0
        return cls((1 - similarity_TT) / max(LEAST_STEP, step), similarity_TT, has_scale=False)

    def thresholds(self, policy: str, chunk: int) -> list[float]:
        """What policies clean and novel compare with the threshold: per frame, the similarity to the frame before it,
        or to the most similar frame a chunk or more before it."""
        if policy == "clean":
            return np.diagonal(self.similarity_TT, 1).tolist()
        return [float(self.similarity_TT[t, : t + 1 - chunk].max()) for t in range(chunk, len(self.similarity_TT))]


def memory_layout(rng: np.random.Generator, views: Views, config: MemoryConfig) -> list[tuple[int, ...]]:
    """The frames that each chunk of a clip remembers, in the order of their positions.

    Layouts are mixed, so that a student works with any policy (docs/method.md, Training).
    """
    layout, rule = _draw(rng, LAYOUTS), _draw(rng, RULES)
    config = dataclasses.replace(
        config,
        sink=0 if layout == "fast" else config.sink,
        slow=config.slow if layout == "full" else 0,
        policy={"recall": "fifo", "random": "clean"}.get(rule, rule),
        uniform_stride=config.chunk,
    )
    if rule == "cover":
        config = dataclasses.replace(config, slow_similarity_threshold=float(rng.choice(COVER_THRESHOLDS)))
    if not views.has_scale and (thresholds := views.thresholds(config.policy, config.chunk)):
        # That of a random frame: any share of the clip's frames may be new.
        config = dataclasses.replace(config, slow_similarity_threshold=float(rng.choice(thresholds)))
    similarity = lambda frame, others: views.similarity_TT[frame, list(others)].tolist()
    at_random = lambda frame, others: [float(rng.integers(2)) for _ in others]
    blur = float(rng.choice((0, 1, 3)))
    slots, remembered = Slots(), []
    for first in range(0, len(views.distance_TT), config.chunk):
        slow = slots.slow
        if rule == "recall" and config.slow and first:
            archive = [t for t in range(first) if t not in slots.sink + slots.fast]
            # Around the latest frame, as the policy sees it, or around the coming views.
            around = first - 1 if rng.random() < 0.5 else first + config.chunk - 1
            slow = _nearest(rng, archive, views, around, config.slow, blur) if archive else ()
        remembered.append(slots.sink + slow + slots.fast)
        frames = range(first, first + config.chunk)
        slots, _ = advance(slots, config, frames, at_random if rule == "random" else similarity)
    return remembered


def _draw(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _nearest(
    rng: np.random.Generator, archive: Sequence[int], views: Views, around: int, count: int, blur: float
) -> tuple[int, ...]:
    """Frames of the nearest views, one per view, in the order of the film; `blur` is an error in camera steps."""
    order = np.argsort(views.distance_TT[around, archive] + blur * rng.standard_normal(len(archive)), kind="stable")
    kept: list[int] = []
    for frame in (archive[place] for place in order):
        if len(kept) < count and not (views.distance_TT[frame, kept] < SAME_VIEW).any():
            kept.append(frame)
    return tuple(sorted(kept))
