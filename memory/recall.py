"""Policy recall: before every chunk, slow frames are chosen anew from the film (docs/memory.md, Recall).

The shift along the rows from each frame to the one a chunk later says how the camera moved, and the sum of shifts says
where the view of every frame is. Frames are chosen by their distance to the coming view, and not by likeness alone:
landmarks that look the same stand at many places.

The work for a chunk does not grow with the film: the places of a chunk's frames are found when it is committed, and a
choice looks at a bounded number of frames around the coming view. Of a short film these are all.
"""

import dataclasses
import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .descriptors import Views, describe

ALIKE = 0.65
"""Frames of a higher likeness, place by place, show the same: one of them is enough."""
MAX_READS = 4
"""Chunks that are read again after one commit at most; on average one."""
FITS = 0.1
"""Fit below which no shift says how the camera moved: the film was cut."""
LOOKED_AT = 256
"""Frames that a choice looks at, about, besides those that are held. A film of so few is looked at whole."""
OF_ONE_PLACE = 16
"""Frames of one place that are looked at, at most, where many places are near. Of more, at least half as many are."""


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


@dataclass(frozen=True, kw_only=True)
class Film:
    """The film so far, described: an immutable value, a function of the film's chunks, one after the other.

    Values of tokens are relative to the film's mean token: for places, the mean when the chunk was committed.
    """

    starts: tuple[int, ...] = ()
    """The first frame of every chunk."""
    tokens: tuple[Tensor, ...] = ()
    """The descriptor of every frame, [R, C, D], float16."""
    total: Tensor | None = None
    """Sum of all tokens, [D], float64."""
    place: tuple[int, ...] = ()
    """Of every frame: columns from the first frame of its stretch."""
    stretch: tuple[int, ...] = ()
    """Of every frame: the frame that its stretch begins with. Places of two stretches cannot be compared."""
    at: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The frames at every place of the latest stretch, oldest first."""

    def extended(self, latents_BCTHW: Tensor) -> "Film":
        """The film with one more chunk.

        Where no shift fits two consecutive frames, a new stretch begins. Within a stretch a frame is compared with the
        one a chunk before.
        """
        new = describe(latents_BCTHW)
        first, start = len(self.tokens), self.starts[-1] if self.starts else 0
        film = dataclasses.replace(
            self,
            starts=(*self.starts, first),
            tokens=(*self.tokens, *new.unbind()),
            total=new.double().sum((0, 1, 2)) + (0 if self.total is None else self.total),
        )
        frames, views = range(first, first + len(new)), film._views(range(first, first + len(new)))
        shift = lambda befores: views.shift_from(film._views(befores))
        place, stretch = list(self.place), list(self.stretch)
        for frame, fit in zip(frames, shift([max(0, frame - 1) for frame in frames])[1].tolist()):
            stretch.append(frame if fit < FITS or not frame else stretch[-1])
        befores = [max(start, stretch[frame], frame - len(new)) for frame in frames]
        for frame, before, step in zip(frames, befores, shift(befores)[0].tolist()):
            place.append(0 if before == frame else place[before] + step)
        at = dict(self.at) if self.stretch[-1:] == (stretch[-1],) else {}
        for frame in frames[max(0, stretch[-1] - first) :]:
            at[place[frame]] = (*at.get(place[frame], ()), frame)
        return dataclasses.replace(film, place=tuple(place), stretch=tuple(stretch), at=at)

    def choose(
        self, count: int, held: Collection[int], remembered: Collection[int], readable: range, reads: int
    ) -> tuple[int, ...]:
        """The `count` frames whose views are nearest to the coming one, no two alike, oldest first.

        None is `remembered`. Of frames that show the same from the same place, the oldest is chosen: later ones are
        copies of it. Frames that are not `held` are `readable`, and from `reads` chunks at most.
        """
        if not count:
            return ()
        middle = self._middle()
        frames = sorted({*self._around(middle, readable), *held} - {*remembered})
        if not frames:
            return ()
        views, where = self._views(frames), [(self.stretch[frame], self.place[frame]) for frame in frames]
        same_place: dict[tuple[int, int], set[int]] = {}
        for index, each in enumerate(where):
            same_place.setdefault(each, set()).add(index)
        free, chosen, read = {*range(len(frames))}, [], set()
        is_held = frozenset(bisect_left(frames, frame) for frame in {*held} - {*remembered})
        at_hand = {*is_held}
        can_be_had = free if reads else at_hand
        for index in self._nearest_first(middle, where, views):
            if len(chosen) == count:
                break
            if index not in free or not (candidates := same_place[where[index]] & can_be_had & free):
                continue
            alike = {*(views.likeness(index) >= ALIKE).nonzero()[:, 0].tolist()}
            if not (copies := candidates & alike):
                continue
            oldest = min(copies)
            chosen.append(frames[oldest])
            free -= alike
            chunk = bisect_right(self.starts, frames[oldest])
            if oldest not in is_held and chunk not in read:
                read.add(chunk)
                at_hand |= {i for i, frame in enumerate(frames) if bisect_right(self.starts, frame) == chunk}
                if len(read) == reads:
                    can_be_had = at_hand
        return tuple(sorted(chosen))

    def _middle(self) -> float:
        """The place in the middle of the coming view, which is expected to go on as in the last chunk."""
        latest, length = len(self.place) - 1, len(self.place) - self.starts[-1]
        earlier = max(0, latest - length)
        going = self.place[latest] - self.place[earlier] if self.stretch[latest] == self.stretch[earlier] else 0
        return self.place[latest] + going * (length + 1) / (2 * length)

    def _around(self, middle: float, readable: range) -> Iterator[int]:
        """The readable frames that a choice looks at: at the places nearest to `middle`, and of earlier stretches.

        Where there are more than LOOKED_AT, each place and the earlier stretches give frames spread over the film.
        """
        places, groups, room = sorted(self.at), list[Sequence[int]](), LOOKED_AT
        split = bisect_left(places, middle)
        for place in heapq.merge(places[:split][::-1], places[split:], key=lambda place: abs(place - middle)):
            frames = self.at[place]
            frames = frames[bisect_left(frames, readable.start) : bisect_left(frames, readable.stop)]
            groups.append(frames)
            room -= min(len(frames), OF_ONE_PLACE)
            if room <= 0:
                break
        groups.append(range(readable.start, min(readable.stop, self.stretch[-1])))
        most = LOOKED_AT
        while most > OF_ONE_PLACE and sum(len(_spread(frames, most)) for frames in groups) > LOOKED_AT:
            most //= 2
        for frames in groups:
            yield from _spread(frames, most)

    def _nearest_first(self, middle: float, where: Sequence[tuple[int, int]], views: Views) -> list[int]:
        """The order of frames by the distance from `middle`, and at one place by how well they fit the latest frame.

        Frames of other stretches come last.
        """
        away = [abs(place - middle) if stretch == self.stretch[-1] else math.inf for stretch, place in where]
        fit = views.shift_from(self._views([len(self.tokens) - 1]))[1].tolist()
        return sorted(range(len(where)), key=lambda index: (away[index], -fit[index]))

    def _views(self, frames: Sequence[int]) -> Views:
        """Frames, relative to the mean token of the film."""
        assert self.total is not None, "a film has a chunk"
        mean = self.total / (len(self.tokens) * self.tokens[0][..., 0].numel())
        return Views(torch.stack([self.tokens[frame] for frame in frames]) - mean.float())


def _spread(frames: Sequence[int], most: int) -> Sequence[int]:
    """At most so many of the frames, each the same number apart: a power of two, so that they seldom change."""
    apart = 1
    while len(frames) > most * apart:
        apart *= 2
    return frames[::apart]
