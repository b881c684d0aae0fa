"""Policy recall: what is chosen from the film, and what is not."""

import functools

import pytest
import torch

from context_forcing.memory.descriptors import MAX_TOKENS, Views, describe
from context_forcing.memory.memory import CHANGES, MemoryConfig, empty_memory
from context_forcing.memory.recall import ALIKE, FITS, LOOKED_AT, OF_ONE_PLACE, Film
from context_forcing.memory.references import Reference
from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.memory.stores import FrameKV

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


def described(chunks):
    return functools.reduce(Film.extended, chunks, Film())


def facts(film):
    return film.starts, film.place, film.stretch, film.at, film.total.tolist(), [each.tolist() for each in film.tokens]


def brute_force(chunks, count, held, remembered, readable, reads):
    """The choice by comparing all frames with each other, places included, relative to the mean of the whole film.

    Chunks have three frames.
    """
    tokens = torch.cat([describe(chunk) for chunk in chunks])
    tokens = tokens.float() - tokens.double().mean((0, 1, 2)).float()
    num, latest = len(tokens), len(tokens) - 1
    shift = lambda before: Views(tokens).shift_from(Views(tokens[before]))
    cuts = (shift([max(0, frame - 1) for frame in range(num)])[1] < FITS).tolist()
    stretch = [max((cut for cut in range(frame + 1) if cuts[cut]), default=0) for frame in range(num)]
    before = [max(frame - 3, stretch[frame]) for frame in range(num)]
    place, steps = [0] * num, shift(before)[0].tolist()
    for frame in range(num):
        place[frame] = 0 if before[frame] == frame else place[before[frame]] + steps[frame]
    going = place[latest] - place[latest - 3] if latest >= 3 and stretch[latest] == stretch[latest - 3] else 0
    away = lambda f: abs(place[f] - place[latest] - going * 2 / 3) if stretch[f] == stretch[latest] else 1e9
    fit = Views(tokens).shift_from(Views(tokens[latest:]))[1].tolist()
    free, chosen, read = ({*held} | {*readable}) - {*remembered}, [], set()
    for frame in sorted(range(num), key=lambda f: (away(f), -fit[f])):
        at_hand = {f for f in free if len(read) < reads or f in held or f // 3 in read}
        if frame not in free or not at_hand or len(chosen) == count:
            continue
        alike = {*(Views(tokens).likeness(frame) >= ALIKE).nonzero()[:, 0].tolist()}
        if copies := [f for f in at_hand & alike if (place[f], stretch[f]) == (place[frame], stretch[frame])]:
            chosen.append(min(copies))
            free -= alike
            read |= {min(copies) // 3} if min(copies) not in held else set()
    return tuple(sorted(chosen))


def test_places_are_found(film_of):
    """Pans, a stay, a turn, and more than half of the view between two frames a chunk apart."""
    headings = [0, 1, 2, 3, 4, 5, 5, 5, 5, 4, 3, 2, 0, -2, -4, -6, -8, -10]
    film = described(film_of(headings))
    assert list(film.place) == headings and not any(film.stretch)


def test_a_cut_begins_a_stretch(film_of):
    headings = [*range(9), *range(20, 29), *range(27, 20, -1), 20, 19]
    film = described(film_of(headings))
    assert list(film.stretch) == [0] * 9 + [9] * 18
    assert list(film.place[9:]) == [heading - 20 for heading in headings[9:]]
    # Nine views of the new stretch are free; more are taken from the one before.
    chosen = film.choose(12, range(24), [24, 25, 26], range(24), 20)
    assert {headings[frame] for frame in chosen if frame >= 9} == set(range(20, 29)) and sum(f < 9 for f in chosen) == 3


@pytest.mark.parametrize("move", [-1, 0, 1])
def test_the_frames_around_the_coming_view_are_chosen(film_of, move):
    """Every view around heading 20 is in the film. The camera stands still at 20, or comes there by three columns."""
    begin = 20 - 5 * move
    around = {-1: [*range(10, 31), *range(29, 25, -1)], 0: [*range(10, 31), *range(29, 20, -1)]}
    around[1] = [40 - heading for heading in around[-1]]
    headings = [*around[move], *[begin] * (30 - len(around[move])), *(20 - move * t for t in (5, 4, 3, 2, 1, 0))]
    film = described(film_of(headings))
    chosen = film.choose(5, range(30), range(30, 36), range(30), 20)
    assert {headings[frame] for frame in chosen} == {20 + 2 * move + d for d in (-2, -1, 0, 1, 2)}


def test_places_are_told_apart_where_landmarks_repeat(ring):
    """The same six columns stand at headings 4 and 24. Likeness cannot tell them apart, the path can."""
    ring = ring.clone()
    ring[..., 48:60] = ring[..., 8:20]
    headings = [*range(31), *range(29, 2, -1), 3, 3]
    frames = torch.stack([ring[..., 2 * h : 2 * h + 16] for h in headings], dim=1)[None]
    chosen = described(frames.split(3, dim=2)).choose(4, range(54), range(54, 60), range(54), 20)
    assert {headings[frame] for frame in chosen} <= {1, 2, 3, 4, 5, 6}


def test_views_around_the_latest_are_chosen_and_each_once(film_of):
    """Out by 24 columns, a long stay, and back: what lies ahead is chosen, not the stay."""
    headings = [*range(24), *[24] * 30, *range(23, 11, -1)]
    chosen = described(film_of(headings)).choose(8, range(54), [63, 64, 65], range(63), 20)
    assert len({headings[frame] for frame in chosen}) == 8
    assert {7, 8, 9, 10, 11} <= {headings[frame] for frame in chosen} <= set(range(4, 16))
    assert list(chosen) == sorted(chosen)


def test_of_equal_frames_the_oldest_is_chosen(film_of):
    headings = [5, 20, 30] * 4 + [5, 5, 5]
    chosen = described(film_of(headings, noise=0)).choose(3, range(12), [12, 13, 14], range(12), 20)
    assert chosen == (0, 1, 2)


def test_only_so_many_runs_are_read(film_of):
    headings = [*range(30), *range(29, 14, -1)]
    film, held = described(film_of(headings)), (0, 1, 2, 36, 37, 38)
    for reads in range(4):
        chosen = film.choose(8, held, [42, 43, 44], range(42), reads)
        assert len({frame // 3 for frame in chosen if frame not in held}) == reads
    assert not {36, 37} & set(film.choose(8, held, [36, 37, 42, 43, 44], range(42), 4))


@pytest.mark.parametrize("size", [(8, 16), (60, 104), (90, 160), (5, 7), (2, 4096)], ids=str)
def test_descriptors_are_bounded(size):
    tokens = describe(torch.randn(1, 16, 3, *size))
    assert tokens.shape[0] == 3 and 1 <= tokens[0, ..., 0].numel() <= MAX_TOKENS
    assert tokens[0].nbytes <= 64 * 1024


def test_frames_that_cannot_be_read_are_not_compared(monkeypatch):
    """No two frames of noise are alike."""
    film = described(torch.randn(1, 16, 90, 4, 16, generator=torch.Generator().manual_seed(2)).split(3, dim=2))
    compared, likeness = [], Views.likeness
    monkeypatch.setattr(Views, "likeness", lambda self, index: compared.append(index) or likeness(self, index))
    held = (3, 4, 5, 30, 31, 32)
    assert film.choose(40, held, [0, 1, 2, 87, 88, 89], range(87), 0) == held
    assert len(compared) == len(held)


WALKS = {
    "there and back": [*range(24), *[24] * 9, *range(23, -1, -1)],
    "a long stay, and a cut": [*range(12), *[12] * 30, *range(25, 37), *[36] * 6],
    "to and fro": [*range(9), *range(7, 0, -1), *range(12), *range(10, 0, -1)],
}


@pytest.mark.parametrize("headings", WALKS.values(), ids=list(WALKS))
@pytest.mark.parametrize("reads", [0, 2, 99])
def test_a_short_film_is_compared_whole(film_of, headings, reads):
    """What is found chunk by chunk, relative to the mean up to then, is what a comparison of all frames finds."""
    chunks, film, slow = film_of(headings, noise=0.6), Film(), ()
    for number, chunk in enumerate(chunks, 1):
        film, latest = film.extended(chunk), 3 * number - 1
        given = (6, (*slow, max(0, latest - 5)), (0, latest - 1, latest), range(max(0, latest - 2)), reads)
        slow = film.choose(*given)
        assert slow == brute_force(chunks[:number], *given)
    assert slow


def test_branches_of_a_film_do_not_touch_each_other(film_of):
    """A film that went on two ways, each of them found again from its chunks alone, and the film itself afterwards."""
    begin, *ways = ([*range(12)], [*range(12), *range(10, -2, -1)], [*range(18), *range(30, 36)])
    film = described(film_of(begin, noise=0))
    before = facts(film)
    for headings in ways:
        chunks = film_of(headings, noise=0)
        branch = functools.reduce(Film.extended, chunks[4:], film)
        assert facts(branch) == facts(described(chunks))
        assert list(branch.place[12:18]) == headings[12:18]
    assert facts(film) == before


def committed(memory, chunk):
    """The memory with one more chunk, and with keys and values of all remembered frames."""
    new_kv = lambda count: [FrameKV(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 2)) for _ in range(count)]
    memory = memory.append(chunk, new_kv(chunk.shape[2]))
    return memory.write(memory.unread, new_kv(len(memory.unread)))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pinned", [0, 1], ids=["", "reference"])
def test_a_memory_from_a_file_chooses_the_same(film_of, tmp_path, change, pinned):
    """The file has no description of the film. Neither a change of the prompt nor a reference changes it."""
    chunks, text = film_of([*range(12), *range(10, -5, -1), *range(12)]), torch.ones(1, 3, 8)
    config = MemoryConfig(policy="recall", sink=2, slow=5, fast=5)
    memory = empty_memory(config, (16, ROWS, 16)).with_references([Reference(latents=chunks[0][:, :, :1])] * pinned)
    memory = from_file = memory.begin("one", 1, text)
    for number, chunk in enumerate(chunks):
        if number == 8:
            memory, from_file = (each.begin("two", 1, text + 1, change) for each in (memory, from_file))
        save_memory(tmp_path / "memory", from_file)
        from_file = load_memory(tmp_path / "memory")
        assert from_file.film == Film()
        memory, from_file = committed(memory, chunk), committed(from_file, chunk)
        assert facts(memory.film) == facts(from_file.film)
    assert memory.recalls == from_file.recalls and memory.slots == from_file.slots
    assert memory.slots.slow and facts(memory.film) == facts(described(chunks))


LONG = {
    "to and fro": lambda frame: abs(frame % 40 - 20),
    "a walk straight on": lambda frame: frame,
    "a stay": lambda frame: 5,
    "other views at one place": lambda frame: 0,
}


@pytest.mark.parametrize("name", LONG)
def test_the_work_of_a_choice_is_bounded(monkeypatch, name):
    """A film of 30,000 frames: more than two hours. Every view is noise of its own, so none tells another."""
    num, distinct = 30_000, torch.randn(199, 2, 4, 8, generator=torch.Generator().manual_seed(3)).half()
    place = [LONG[name](frame) for frame in range(num)]
    stretch = [0] * num if name != "other views at one place" else [frame - frame % 10 for frame in range(num)]
    at = {}
    for frame in range(stretch[-1], num):
        at.setdefault(place[frame], []).append(frame)
    film = Film(
        starts=tuple(range(0, num, 3)),
        tokens=tuple(distinct[frame % 199] for frame in range(num)),
        total=torch.zeros(8, dtype=torch.float64),
        place=tuple(place),
        stretch=tuple(stretch),
        at={key: tuple(frames) for key, frames in at.items()},
    )
    looked_at, views = [], Film._views
    monkeypatch.setattr(Film, "_views", lambda self, frames: looked_at.append(len(frames)) or views(self, frames))
    held, fast = tuple(range(100, 112)), (num - 3, num - 2, num - 1)
    chosen = film.choose(12, held, fast, range(num - 3), 4)
    assert len(chosen) == 12
    assert LOOKED_AT / 2 <= max(looked_at) < LOOKED_AT + 2 * OF_ONE_PLACE + len(held)
    assert len({frame // 3 for frame in chosen if frame not in held}) <= 4
    # The next chunk compares its own frames only, and a choice after it looks at the same ones.
    looked_at.clear()
    film = film.extended(torch.randn(1, 2, 3, 4, 8))
    assert max(looked_at) == 3
