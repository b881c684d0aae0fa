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


def test_overlapping_views_are_relevant_in_the_order_of_their_overlap(film_of):
    headings = [0, 1, 2, 3, 5, 7, 20, 25, 30, 33, 36, 0]
    relevance = Archive(film_of(headings)).relevance(11)
    order = relevance.argsort(descending=True).tolist()
    assert order[:5] == [11, 0, 1, 2, 3] and {order[5], order[6]} == {4, 10}
    assert relevance[0] > 0.9 > 0.5 > relevance[6]


def test_views_around_the_latest_are_chosen_and_each_once(film_of):
    """Out by 24 columns, a long stay, and back: what lies ahead is chosen, not the stay."""
    headings = [*range(24), *[24] * 30, *range(23, 11, -1)]
    chosen = Archive(film_of(headings)).choose(8, range(54), [63, 64, 65], runs(63), 20)
    assert len({headings[frame] for frame in chosen}) == 8
    assert {10, 11, 13, 14} <= {headings[frame] for frame in chosen} <= set(range(6, 19))
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
