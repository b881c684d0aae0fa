"""Policy recall: before every chunk, slow frames are chosen anew from the whole film (docs/memory.md, Policies).

A latent frame is described by its clean latents. The latest frame is compared with every frame at every shift along the
rows, so that views which overlap are found after a pan. The shift since the last chunk says where the view goes; frames
that show what lies there are the most relevant.

Likeness of two tokens: 2 a.b / (|a|^2 + |b|^2), which is 1 for equal ones and less for another direction or length.

Shapes: T latent frames, R C rows and columns of tokens, D values of a token.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

MAX_TOKENS = 512
"""Largest number of tokens of a descriptor: 64 KiB in float16 with 16 latent channels."""
PATCH = 2
"""Latent rows and columns of a token."""
ALIKE = 0.65
"""Frames of a higher likeness, place by place, show the same: one of them is enough."""
MAX_READS = 4
"""Chunks that are read again after one commit at most; on average one."""
BLOCK = 256
"""Frames compared at once; bounds the size of float32 copies."""


@dataclass(frozen=True)
class Recall:
    """The slow frames of one chunk."""

    frame: int
    """First latent frame of the chunk that they were chosen for."""
    slow: tuple[int, ...]
    num_reads: int
    """Chunks of the film that were read again for them, each in one pass."""


Choose = Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]
"""(frames whose keys are held, frames in sink and fast) -> slow frames for the next chunk."""

_DESCRIPTORS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Descriptors of a chunk's latents, kept as long as the latents."""


def describe(latents_BCTHW: Tensor) -> Tensor:
    """Descriptors of the frames of a chunk, [T, R, C, D], float16."""
    if latents_BCTHW not in _DESCRIPTORS:
        frames = latents_BCTHW[0].movedim(1, 0).float()
        grids = (tuple(max(1, size // PATCH // n) for size in frames.shape[-2:]) for n in itertools.count(1))
        rows, columns = next(grid for grid in grids if math.prod(grid) <= MAX_TOKENS)
        patches = F.adaptive_avg_pool2d(frames, (rows * PATCH, columns * PATCH))
        patches = patches.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))
        _DESCRIPTORS[latents_BCTHW] = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).half()
    return _DESCRIPTORS[latents_BCTHW]


class Archive:
    """The film so far, described. Values of tokens are relative to the film's mean token."""

    def __init__(self, chunks: Sequence[Tensor]):
        self.tokens, self.last_chunk = torch.cat([describe(chunk) for chunk in chunks]), chunks[-1].shape[2]
        sums = [block.double().sum((0, 1, 2)) for block in self.tokens.split(BLOCK)]
        self.mean = (torch.stack(sums).sum(0) / self.tokens[..., 0].numel()).float()

    def shifts(self, frame: int) -> tuple[Tensor, Tensor]:
        """Shifts in columns, [S], and the likeness of a frame with every frame shifted by them, [S, T].

        A frame that begins d columns further right than `frame` fits at shift d. At least two columns overlap.
        """
        (query,) = self._centred(slice(frame, frame + 1))
        columns = query.shape[1]
        most = max(0, columns - 2)
        found = []
        for block in self._blocks():
            pairs = torch.einsum("rcd,trkd->trck", query, block)
            squares = query.square().sum(-1)[None, :, :, None] + block.square().sum(-1)[:, :, None]
            pairs = 2 * pairs / squares.clamp(min=1e-12)
            found.append(
                torch.stack([pairs.diagonal(-d, 2, 3).mean((1, 2)).clamp(min=0) for d in range(-most, most + 1)])
            )
        return torch.arange(-most, most + 1), torch.cat(found, dim=1)

    def relevance(self, latest: int, earlier: int) -> Tensor:
        """How much every frame shows of what comes after `latest`, if the view goes on as since `earlier`, [T].

        For the best shift d of a frame: the square of the likeness there, times the root of the share of columns that
        overlap with `latest`, times the nearness of d to the shift of the coming view.
        """
        shifts, likeness = self.shifts(latest)
        columns = self.tokens.shape[2]
        fit = likeness.square() * (1 - shifts.abs() / columns).sqrt()[:, None]
        coming = -shifts[fit[:, earlier].argmax()]
        nearness = (1 - (shifts - coming).abs() / (1.5 * columns)).clamp(min=0)
        return (fit * nearness[:, None]).amax(0)

    def similarity(self, frame: int) -> Tensor:
        """Likeness with every frame, place by place, [T]."""
        query = self._centred(slice(frame, frame + 1))
        squares = lambda tokens: tokens.square().sum(-1)
        likeness = lambda block: 2 * (query * block).sum(-1) / (squares(query) + squares(block)).clamp(min=1e-12)
        return torch.cat([likeness(block).mean((1, 2)) for block in self._blocks()])

    def choose(
        self, count: int, held: Collection[int], remembered: Sequence[int], readable: Sequence[range], reads: int
    ) -> tuple[int, ...]:
        """The `count` frames most relevant to the latest frame, no two alike, oldest first; none of `remembered`.

        Frames that are not `held` are from `reads` of the `readable` runs at most, those of the most relevant ones.
        """
        free = torch.zeros(len(self.tokens), dtype=torch.bool)
        free[[*held, *itertools.chain(*readable)]] = True
        free[list(remembered)] = False
        chosen, read, latest = [], set(), len(self.tokens) - 1
        relevance = self.relevance(latest, max(0, latest - self.last_chunk))
        for frame in relevance.argsort(descending=True, stable=True).tolist():
            if len(chosen) == count:
                break
            if not free[frame]:
                continue
            if frame not in held:
                run = next(run for run in readable if frame in run)
                if len(read | {run}) > reads:
                    continue
                read.add(run)
            chosen.append(frame)
            free &= self.similarity(frame) < ALIKE
        return tuple(sorted(chosen))

    def _blocks(self) -> Iterator[Tensor]:
        return (self._centred(slice(first, first + BLOCK)) for first in range(0, len(self.tokens), BLOCK))

    def _centred(self, frames: slice) -> Tensor:
        return self.tokens[frames].float() - self.mean
