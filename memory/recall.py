"""Policy recall: before every chunk, slow frames are chosen anew from the whole film (docs/memory.md, Policies).

A latent frame is described by its clean latents. The shift along the rows from each frame to the one a chunk later says
how the camera moved, and the sum of shifts says where the view of every frame is. Frames are chosen by their distance
to the coming view, and not by likeness alone: landmarks that look the same stand at many places.

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
FITS = 0.1
"""Fit below which no shift says how the camera moved: the film was cut."""
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

    def places(self) -> tuple[Tensor, Tensor]:
        """The place of every frame, in columns from the first frame, and its stretch of the film, [T] each.

        Where no shift fits two consecutive frames, a new stretch begins; places of two stretches cannot be compared.
        Within a stretch a frame is compared with the one a chunk before.
        """
        frames = torch.arange(len(self.tokens))
        is_cut = self._step(frames, (frames - 1).clamp(min=0))[1] < FITS
        begin = torch.where(is_cut, frames, 0).cummax(0).values
        before = (frames - self.last_chunk).maximum(begin)
        place, steps = [0] * len(frames), self._step(frames, before)[0].tolist()
        for frame, earlier in enumerate(before.tolist()):
            place[frame] = place[earlier] + steps[frame]
        return torch.tensor(place), is_cut.long().cumsum(0)

    def _step(self, frames: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The best shift of every frame from another, in columns, and the fit there, [T] each."""
        pairs = zip(before.split(BLOCK), frames.split(BLOCK))
        fits = torch.cat([self._fit(self._centred(earlier), self._centred(later)) for earlier, later in pairs], dim=1)
        fit, best = fits.max(dim=0)
        return self._shifts()[best], fit

    def resemblance(self, frame: int) -> Tensor:
        """How well every frame fits a frame at its best shift, [T]."""
        query = self._centred(slice(frame, frame + 1))
        return torch.cat([self._fit(query, block).amax(0) for block in self._blocks()])

    def similarity(self, frame: int) -> Tensor:
        """Likeness with every frame, place by place, [T]."""
        query = self._centred(slice(frame, frame + 1))
        squares = lambda tokens: tokens.square().sum(-1)
        likeness = lambda block: 2 * (query * block).sum(-1) / (squares(query) + squares(block)).clamp(min=1e-12)
        return torch.cat([likeness(block).mean((1, 2)) for block in self._blocks()])

    def choose(
        self, count: int, held: Collection[int], remembered: Sequence[int], readable: Sequence[range], reads: int
    ) -> tuple[int, ...]:
        """The `count` frames whose views are nearest to the coming one, no two alike, oldest first.

        None is `remembered`. Of frames that show the same from the same place, the oldest is chosen: later ones are
        copies of it. Frames that are not `held` are from `reads` of the `readable` runs at most.
        """
        if not count:
            return ()
        free = torch.zeros(len(self.tokens), dtype=torch.bool)
        free[[*held, *itertools.chain(*readable)]] = True
        free[list(remembered)] = False
        place, stretch = self.places()
        run_of = {frame: run for run in readable for frame in run}
        is_held = torch.zeros_like(free)
        is_held[list(held)] = True
        can_be_had = torch.ones_like(free) if reads else is_held
        chosen, read = [], set()
        for frame in self._nearest(place, stretch):
            if len(chosen) == count:
                break
            candidates = free & can_be_had & (place == place[frame]) & (stretch == stretch[frame])
            if not free[frame] or not candidates.any():
                continue
            alike = self.similarity(frame) >= ALIKE
            copies = (candidates & alike).nonzero()[:, 0].tolist()
            if not copies:
                continue
            chosen.append(copies[0])
            free &= ~alike
            if not is_held[copies[0]]:
                read.add(run_of[copies[0]])
            if len(read) == reads:
                can_be_had = is_held.clone()
                can_be_had[list(itertools.chain(*read))] = True
        return tuple(sorted(chosen))

    def _nearest(self, place: Tensor, stretch: Tensor) -> list[int]:
        """All frames, those nearest to the coming view first; frames of one place in the order of their resemblance.

        The view is expected to go on as in the last chunk. Frames of other stretches come last.
        """
        latest = len(place) - 1
        earlier = max(0, latest - self.last_chunk)
        going = place[latest] - place[earlier] if stretch[latest] == stretch[earlier] else place.new_zeros(())
        middle = place[latest] + going * (self.last_chunk + 1) / (2 * self.last_chunk)
        away = torch.where(stretch == stretch[latest], (place - middle).abs(), torch.inf)
        order = self.resemblance(latest).argsort(descending=True, stable=True)
        return order[away[order].argsort(stable=True)].tolist()

    def _shifts(self) -> Tensor:
        """The shifts at which frames are compared, in columns, [S]. At least two columns overlap."""
        most = max(0, self.tokens.shape[2] - 2)
        return torch.arange(-most, most + 1)

    def _fit(self, earlier: Tensor, later: Tensor) -> Tensor:
        """How well frames fit others (one, or one each) whose view begins so many columns further right, [S, T].

        The square of the likeness, times the root of the share of columns that overlap.
        """
        likeness = 2 * torch.einsum("trcd,trkd->trck", earlier.expand_as(later), later)
        squares = earlier.square().sum(-1)[..., :, None] + later.square().sum(-1)[..., None, :]
        likeness = likeness / squares.clamp(min=1e-12)
        columns = self.tokens.shape[2]
        return torch.stack(
            [
                likeness.diagonal(-d, 2, 3).mean((1, 2)).clamp(min=0).square() * (1 - abs(d) / columns) ** 0.5
                for d in self._shifts().tolist()
            ]
        )

    def _blocks(self) -> Iterator[Tensor]:
        return (self._centred(slice(first, first + BLOCK)) for first in range(0, len(self.tokens), BLOCK))

    def _centred(self, frames: slice | Tensor) -> Tensor:
        return self.tokens[frames].float() - self.mean
