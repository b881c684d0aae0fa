"""Policy recall: what is chosen from the film, and what is not."""

import gc

import pytest
import torch

from context_forcing.memory.recall import _DESCRIPTORS, MAX_TOKENS, Archive, describe

RING, ROWS = 40, 4
"""Columns of a made-up place all around, and rows, in latents."""


@pytest.fixture(scope="module")
def ring():
    return torch.randn(16, ROWS, 2 * RING, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2)


@pytest.fixture(scope="module")
def film_of(ring):
    """(headings in tokens) -> chunks of three frames, views of 8 tokens, a little noise on each."""

    def make(headings, noise=0.1):
        generator = torch.Generator().manual_seed(1)
        frames = [ring[..., 2 * (h % RING) : 2 * (h % RING) + 16] for h in headings]
        frames = torch.stack([f + noise * torch.randn(f.shape, generator=generator) for f in frames], dim=1)[None]
        return frames.split(3, dim=2)

    return make


def runs(num_frames):
    return [range(first, first + 3) for first in range(0, num_frames, 3)]


def test_places_are_found(film_of):
    """Pans, a stay, a turn, and more than half of the view between two frames a chunk apart."""
    headings = [0, 1, 2, 3, 4, 5, 5, 5, 5, 4, 3, 2, 0, -2, -4, -6, -8, -10]
    place, stretch = Archive(film_of(headings)).places()
    assert place.tolist() == headings and not stretch.any()


def test_a_cut_begins_a_stretch(film_of):
    headings = [*range(9), *range(20, 29), *range(27, 20, -1), 20, 19]
    archive = Archive(film_of(headings))
    place, stretch = archive.places()
    assert stretch.tolist() == [0] * 9 + [1] * 18
    assert (place[9:] - place[9]).tolist() == [heading - 20 for heading in headings[9:]]
    # Nine views of the new stretch are free; more are taken from the one before.
    chosen = archive.choose(12, range(24), [24, 25, 26], runs(24), 20)
    assert {headings[frame] for frame in chosen if frame >= 9} == set(range(20, 29)) and sum(f < 9 for f in chosen) == 3


@pytest.mark.parametrize("move", [-1, 0, 1])
def test_the_frames_around_the_coming_view_are_chosen(film_of, move):
    """Every view around heading 20 is in the film. The camera stands still at 20, or comes there by three columns."""
    begin = 20 - 5 * move
    around = {-1: [*range(10, 31), *range(29, 25, -1)], 0: [*range(10, 31), *range(29, 20, -1)]}
    around[1] = [40 - heading for heading in around[-1]]
    headings = [*around[move], *[begin] * (30 - len(around[move])), *(20 - move * t for t in (5, 4, 3, 2, 1, 0))]
    archive = Archive(film_of(headings))
    chosen = archive.choose(5, range(30), range(30, 36), runs(30), 20)
    assert {headings[frame] for frame in chosen} == {20 + 2 * move + d for d in (-2, -1, 0, 1, 2)}


def test_places_are_told_apart_where_landmarks_repeat(ring):
    """The same six columns stand at headings 4 and 24. Likeness cannot tell them apart, the path can."""
    ring = ring.clone()
    ring[..., 48:60] = ring[..., 8:20]
    headings = [*range(31), *range(29, 2, -1), 3, 3]
    frames = torch.stack([ring[..., 2 * h : 2 * h + 16] for h in headings], dim=1)[None]
    chosen = Archive(frames.split(3, dim=2)).choose(4, range(54), range(54, 60), runs(54), 20)
    assert {headings[frame] for frame in chosen} <= {1, 2, 3, 4, 5, 6}


def test_views_around_the_latest_are_chosen_and_each_once(film_of):
    """Out by 24 columns, a long stay, and back: what lies ahead is chosen, not the stay."""
    headings = [*range(24), *[24] * 30, *range(23, 11, -1)]
    chosen = Archive(film_of(headings)).choose(8, range(54), [63, 64, 65], runs(63), 20)
    assert len({headings[frame] for frame in chosen}) == 8
    assert {7, 8, 9, 10, 11} <= {headings[frame] for frame in chosen} <= set(range(4, 16))
    assert list(chosen) == sorted(chosen)


def test_of_equal_frames_the_oldest_is_chosen(film_of):
    headings = [5, 20, 30] * 4 + [5, 5, 5]
    chosen = Archive(film_of(headings, noise=0)).choose(3, range(12), [12, 13, 14], runs(12), 20)
    assert chosen == (0, 1, 2)


def test_only_so_many_runs_are_read(film_of):
    headings = [*range(30), *range(29, 14, -1)]
    archive, held = Archive(film_of(headings)), (0, 1, 2, 36, 37, 38)
    for reads in range(4):
        chosen = archive.choose(8, held, [42, 43, 44], runs(42), reads)
        assert len({frame // 3 for frame in chosen if frame not in held}) == reads
    assert not {36, 37} & set(archive.choose(8, held, [36, 37, 42, 43, 44], runs(42), 4))


@pytest.mark.parametrize("size", [(8, 16), (60, 104), (90, 160), (5, 7), (2, 4096)], ids=str)
def test_descriptors_are_bounded(size):
    tokens = describe(torch.randn(1, 16, 3, *size))
    assert tokens.shape[0] == 3 and 1 <= tokens[0, ..., 0].numel() <= MAX_TOKENS
    assert tokens[0].nbytes <= 64 * 1024


def test_descriptors_live_as_long_as_their_latents():
    latents = torch.randn(1, 16, 3, 8, 16)
    assert describe(latents) is describe(latents)
    before = len(_DESCRIPTORS)
    del latents
    gc.collect()
    assert len(_DESCRIPTORS) == before - 1


def test_frames_that_cannot_be_read_are_not_compared(monkeypatch):
    """Else the cost of a chunk grows with the square of the film. No two frames of noise are alike."""
    archive = Archive(torch.randn(1, 16, 90, 4, 16, generator=torch.Generator().manual_seed(2)).split(3, dim=2))
    compared, similarity = [], Archive.similarity
    monkeypatch.setattr(Archive, "similarity", lambda self, frame: compared.append(frame) or similarity(self, frame))
    held = (3, 4, 5, 30, 31, 32)
    assert archive.choose(40, held, [0, 1, 2, 87, 88, 89], runs(87), 0) == held
    assert len(compared) == len(held)
