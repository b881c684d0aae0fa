"""Teacher forcing: every chunk sees what it sees in the sampler."""

from types import SimpleNamespace

import pytest
import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.causal import causal_forward, embed_text
from context_forcing.model.sampler import CausalSampler
from context_forcing.train.stages import forcing
from context_forcing.train.stages.forced_loss import teacher_forced_flow
from context_forcing.train.stages.forcing import CLEAN, TeacherForcing, interleave, noisy_part

from .helpers import network_of, random

CHUNK, NUM_CHUNKS, GRID = 2, 7, (2, 3)
SETTINGS = [
    dict(sink=1, slow=2, fast=4, policy="uniform", uniform_stride=3),
    dict(sink=0, slow=3, fast=3, policy="novel", slow_similarity_threshold=0.999),
    dict(sink=2, slow=0, fast=2),
    dict(sink=0, slow=0, fast=2),
]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=["together", "one by one"])
def ways(request, monkeypatch):
    """Both ways to attend: all chunks under a mask, and each by itself."""
    if request.param == "one by one":
        monkeypatch.setattr(forcing, "MASK_BYTES", 0)


@pytest.fixture(scope="module")
def clips(net):
    """Two clips with a text per chunk: clean and noisy latents, sigma per frame, text rows [B * K, L, 32]."""
    clean, noisy = random(2, 16, CHUNK * NUM_CHUNKS, 4, 6), random(2, 16, CHUNK * NUM_CHUNKS, 4, 6, seed=1)
    sigma = torch.rand(2, NUM_CHUNKS, generator=torch.Generator().manual_seed(2)).repeat_interleave(CHUNK, 1)
    return clean, noisy, sigma, random(2 * NUM_CHUNKS, 5, 32, seed=3)


def by_memory(net, clips, b, settings):
    """One clip through the sampler's way: chunk by chunk over a Memory. Slots, clean flows and noisy flows."""
    clean, noisy, sigma, text = clips
    memory = empty_memory(MemoryConfig(chunk=CHUNK, **settings), (16, 4, 6))
    slots, flows = [], ([], [])
    for c in range(NUM_CHUNKS):
        frames = slice(c * CHUNK, (c + 1) * CHUNK)
        rows = embed_text(net, text[b * NUM_CHUNKS + c][None])
        sampler = CausalSampler(network=network_of(net), text=rows)
        slots.append(memory.slots.all)
        for stream, (clip, level) in enumerate([(clean, 0 * sigma), (noisy, sigma)]):
            attend = sampler.network.attend(sampler.view(memory), CHUNK, memory.latent_size)
            timestep = 1000 * level[b : b + 1, frames]
            flows[stream].append(causal_forward(net, clip[b : b + 1, :, frames], timestep, rows, attend))
        memory = sampler.commit(memory, clean[b : b + 1, :, frames])
    return slots, torch.cat(flows[0], dim=2), torch.cat(flows[1], dim=2)


def padded(layouts, capacity):
    slots = torch.full((len(layouts), NUM_CHUNKS, capacity), -1)
    for b, layout in enumerate(layouts):
        for c, frames in enumerate(layout):
            slots[b, c, : len(frames)] = torch.tensor(frames, dtype=slots.dtype)
    return slots


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_teacher_forced_pass_is_the_samplers(net, clips, settings, ways):
    """Clean and noisy flows of every chunk, two clips with layouts of their own, within 1e-5."""
    clean, noisy, sigma, text = clips
    (slots_a, clean_a, noisy_a), (slots_b, clean_b, noisy_b) = (
        by_memory(net, clips, 0, settings), by_memory(net, clips, 1, SETTINGS[2]),
    )  # fmt: skip
    slots = padded([slots_a, slots_b], capacity=9)
    flow = teacher_forced_flow(
        network_of(net),
        SimpleNamespace(text=text.unflatten(0, (2, NUM_CHUNKS)), slots=slots),
        clean,
        noisy,
        sigma,
    )
    assert relative(flow[:1], noisy_a) < 1e-5 and relative(flow[1:], noisy_b) < 1e-5

    attend = TeacherForcing(slots, CHUNK, GRID, 32)
    levels = torch.stack([0 * sigma, sigma], 1).unflatten(-1, (NUM_CHUNKS, CHUNK)).transpose(1, 2).flatten(1)
    both = causal_forward(
        net, interleave(clean, noisy, CHUNK), 1000 * levels, embed_text(net, text, num_groups=NUM_CHUNKS), attend
    )
    assert relative(noisy_part(both, CHUNK)[:1], noisy_a) < 1e-5
    clean_part = both.unflatten(2, (NUM_CHUNKS, 2, CHUNK))[:, :, :, CLEAN].flatten(2, 3)
    assert relative(clean_part[:1], clean_a) < 1e-5 and relative(clean_part[1:], clean_b) < 1e-5


def test_what_a_chunk_must_not_see_does_not_change_it(make_net, clips, ways):
    """One layer, so that a frame's keys come from its own pixels: only remembered frames and the chunk itself count."""
    net, (clean, noisy, sigma, text) = make_net(num_layers=1), clips
    layout, *_ = by_memory(net, clips, 0, SETTINGS[0])
    slots = padded([layout, layout], capacity=5)
    last = slice((NUM_CHUNKS - 2) * CHUNK, (NUM_CHUNKS - 1) * CHUNK)  # the last chunk but one: it has a future
    seen = layout[NUM_CHUNKS - 2]
    assert 0 < len(seen) < last.start
    flow = lambda clean, noisy: teacher_forced_flow(
        network_of(net),
        SimpleNamespace(text=text.unflatten(0, (2, NUM_CHUNKS)), slots=slots),
        clean,
        noisy,
        sigma,
    )[0, :, last]
    before = flow(clean, noisy)
    for frame in range(NUM_CHUNKS * CHUNK):
        changed = clean.clone()
        changed[0, :, frame] += 1
        assert torch.equal(flow(changed, noisy), before) == (frame not in seen), f"clean frame {frame}"
        changed = noisy.clone()
        changed[0, :, frame] += 1
        assert torch.equal(flow(clean, changed), before) == (frame not in range(last.start, last.stop)), (
            f"noisy {frame}"
        )
    other_clip = clean.clone()
    other_clip[1] += 1
    assert torch.equal(flow(other_clip, noisy), before)


def test_the_future_changes_nothing_at_any_depth(net, clips, ways):
    clean, noisy, sigma, text = clips
    layout, *_ = by_memory(net, clips, 0, SETTINGS[0])
    slots = padded([layout, layout], capacity=5)
    flow = lambda clean, noisy: teacher_forced_flow(
        network_of(net),
        SimpleNamespace(text=text.unflatten(0, (2, NUM_CHUNKS)), slots=slots),
        clean,
        noisy,
        sigma,
    )[:, :, : 4 * CHUNK]
    before = flow(clean, noisy)
    clean, noisy = clean.clone(), noisy.clone()
    clean[:, :, 4 * CHUNK :] = 7
    noisy[:, :, 4 * CHUNK :] = 7
    assert torch.equal(flow(clean, noisy), before)


def test_interleave_and_back():
    clean, noisy = random(2, 16, 6, 4, 6), random(2, 16, 6, 4, 6, seed=1)
    both = interleave(clean, noisy, 2)
    assert torch.equal(noisy_part(both, 2), noisy)
    assert torch.equal(both[:, :, :4], torch.cat([clean[:, :, :2], noisy[:, :, :2]], dim=2))
