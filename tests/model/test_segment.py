"""How a prompt takes over, what a video is given to begin with, and memories whose keys are made anew."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryView
from context_forcing.memory.memory import CHANGES
from context_forcing.model.sampler import CausalSampler
from context_forcing.model.segment import blend_text, generate_segment, used_rows

SIGMAS = (1.0, 0.6)
SIZES = dict(sink=2, slow=4, fast=4, chunk=2, window=10, slow_similarity_threshold=0.9999)


def text(seed, rows=5):
    return torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(100 + seed))


@pytest.fixture(scope="module")
def tell(net, make_sampler):
    """(memory, prompt, chunks, ...) -> the memory after a segment; `tell.texts` are the prompts of the samplers."""

    def sampler_of(prompt):
        go.texts.append(prompt)
        return make_sampler(net, text=prompt, student="me")

    def go(memory, prompt, num_chunks, seed=3, **settings):
        go.texts = []
        *_, memory = generate_segment(
            sampler_of, memory, prompt, prompt="", seed=seed, num_chunks=num_chunks, sigmas=SIGMAS, **settings
        )
        return memory

    return go


@pytest.fixture(scope="module")
def begun(tell, empty_memory):
    """Five chunks under prompt 0; every part of the memory holds something."""
    memory = tell(empty_memory(**SIZES), text(0), 5)
    assert memory.slots.sink and memory.slots.slow and memory.slots.fast
    return memory


def film(memory):
    return torch.cat(memory.latent_chunks, 2)


def tail(memory, chunks=1):
    return torch.cat(memory.latent_chunks[-chunks:], 2)


def keys(memory):
    return {frame: held.keys for frame, held in memory.store.frames.items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("blend", [0, 2])
def test_the_new_prompt_is_the_one_used(tell, begun, change, blend):
    after = tell(begun, text(1), 4, change=change, blend=blend)
    other = tell(begun, text(2), 4, change=change, blend=blend)
    assert torch.equal(tell.texts[-1] if not blend else after.text, text(1) if blend else text(2))
    assert torch.equal(after.text, text(1)) and torch.equal(other.text, text(2))
    assert not torch.allclose(tail(after), tail(other), atol=1e-4)
    assert torch.equal(film(after)[:, :, :10], film(begun)), "what is made stays"
    assert after.segments[-1].change == change and after.segments[-1].first_frame == 10


@pytest.mark.parametrize("change", ["keep", "recache", "flush"])
def test_the_same_prompt_again_changes_nothing(tell, begun, change, same_memory):
    padded = torch.nn.functional.pad(text(0), (0, 0, 0, 7))
    again = tell(begun, padded, 2, change=change, blend=3)
    assert same_memory(
        dataclasses.replace(again, segments=()), dataclasses.replace(tell(begun, text(0), 2), segments=())
    )


def test_a_first_segment_has_nothing_to_change_from(tell, empty_memory, same_memory):
    plain = tell(empty_memory(**SIZES), text(0), 2)
    for change in CHANGES:
        assert same_memory(tell(empty_memory(**SIZES), text(0), 2, change=change, blend=2), plain)


def test_recache_writes_every_remembered_frame_under_the_new_prompt(tell, begun, net):
    seen = {}
    real = CausalSampler.recache

    def spy(self, memory):
        seen["before"], seen["after"] = memory, real(self, memory)
        return seen["after"]

    CausalSampler.recache = spy
    try:
        tell(begun, text(1), 1, change="recache")
    finally:
        CausalSampler.recache = real
    before, after = seen["before"], seen["after"]
    assert keys(after).keys() == keys(before).keys() == set(begun.slots.all)
    assert all(torch.equal(keys(before)[frame], keys(begun)[frame]) for frame in keys(before)), "the old one is whole"
    for frame in begun.slots.all:
        stale, fresh = before.store.frames[frame], after.store.frames[frame]
        assert not torch.allclose(fresh.keys[-1], stale.keys[-1], atol=1e-4), f"frame {frame} is stale"
        assert fresh.keys.abs().sum() > 0 and fresh.values.abs().sum() > 0
    assert after.slots == before.slots and after.latent_chunks == before.latent_chunks


def test_recache_under_the_same_prompt_finds_what_was_never_out_of_sight(tell, net, make_sampler, empty_memory):
    """As long as nothing was forgotten, rewriting sees exactly what was seen when the film was made."""
    memory = tell(empty_memory(**SIZES), text(0), 2)
    sampler = make_sampler(net, text=text(0))
    assert memory.slots.all == (0, 1, 2, 3)
    again = sampler.recache(memory)
    for frame in memory.slots.all:
        assert torch.equal(keys(again)[frame], keys(memory)[frame])


def test_rewritten_keys_are_not_taken_for_the_old_ones(tell, begun):
    """At rest a memory shares what it can with the one before it; what was written anew it cannot."""
    after = tell(begun, text(1), 1, change="recache")
    rest = after.to("cpu", before=begun)
    assert all(torch.equal(keys(rest)[frame], keys(after)[frame]) for frame in after.slots.all)
    kept = tell(begun, text(1), 1).to("cpu", torch.bfloat16).to("cpu", torch.float32, before=begun)
    assert all(kept.store.frames[frame] is begun.store.frames[frame] for frame in kept.slots.all if frame < 10)


def test_recache_is_causal(make_sampler, begun, net):
    """A remembered frame's keys do not know of those after it."""
    sampler = make_sampler(net, text=text(1))
    before = sampler.recache(begun)
    last = begun.slots.all[-1]
    chunks = list(begun.latent_chunks)
    chunks[last // 2] = chunks[last // 2].clone()
    chunks[last // 2][:, :, last % 2] += 1
    after = sampler.recache(dataclasses.replace(begun, latent_chunks=tuple(chunks)))
    together = begun.slots.all[-2:]  # a pass of two frames
    for frame in begun.slots.all:
        assert torch.equal(keys(after)[frame], keys(before)[frame]) == (frame not in together)


def test_flush_keeps_sink_and_last_chunk(tell, begun):
    told = begun.begin("", 0, text(1), "flush")
    assert told.slots.sink == begun.slots.sink and told.slots.slow == () and told.slots.fast == (8, 9)
    assert set(told.store.frames) == set(told.slots.all)
    assert all(told.store.frames[frame] is begun.store.frames[frame] for frame in told.store.frames)
    after = tell(begun, text(1), 4, change="flush")
    assert not torch.allclose(tail(after), tail(tell(begun, text(1), 4)), atol=1e-4)


@pytest.mark.parametrize("change, sink", [("cut", (0, 1)), ("cut_new_sink", ())])
def test_a_cut_forgets_and_jumps_once(tell, begun, change, sink, monkeypatch):
    first, real = [], MemoryView.positions

    def spy(view, num_frames):
        first.append(real(view, num_frames).start)
        return real(view, num_frames)

    monkeypatch.setattr(MemoryView, "positions", spy)
    after = tell(begun, text(0), 2, change=change)
    in_scene = len(sink)
    # window 10 - chunk 2 for the denoising and the commit of the first chunk; then right behind what is remembered
    assert first == [8, 8, in_scene + 2, in_scene + 2]
    assert after.slots.all[: len(sink) or 2] == (sink or (10, 11))
    assert not after.scene_begins and begun.begin("", 0, None, change).scene_begins


def test_a_blend_goes_from_the_old_prompt_to_the_new(tell, begun):
    tell(begun, text(1, rows=3), 4, blend=3)
    whole = torch.nn.functional.pad(text(1, rows=3), (0, 0, 0, 2))
    expected = [text(1, rows=3), *(torch.lerp(text(0), whole, share) for share in (0.25, 0.5, 0.75))]
    assert len(tell.texts) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(tell.texts, expected))
    assert torch.equal(blend_text(text(0), text(1), 1.0), text(1))


def test_a_blend_longer_than_the_segment_ends_under_the_new_prompt(tell, begun, same_memory):
    """What the memory says of its last prompt is so, and the next segment goes on from there without a jump."""
    assert same_memory(tell(begun, text(1), 3, blend=9), tell(begun, text(1), 3, blend=2))
    assert same_memory(tell(begun, text(1), 1, blend=9), tell(begun, text(1), 1))


def test_an_encoder_that_rounds_otherwise_says_the_same_prompt(tell, begun, same_memory):
    rounded = text(0).bfloat16().float()
    assert not torch.equal(rounded, text(0))
    flushed, kept = (tell(begun, rounded, 1, change=change) for change in ("flush", "keep"))
    assert same_memory(dataclasses.replace(flushed, segments=()), dataclasses.replace(kept, segments=()))


def test_unknown_changes_and_blends_are_refused(tell, begun):
    with pytest.raises(ValueError, match="change: 'melt' is not one of keep, recache"):
        tell(begun, text(1), 1, change="melt")
    with pytest.raises(ValueError, match="blend: -1"):
        tell(begun, text(1), 1, blend=-1)


def test_padding_is_no_part_of_a_prompt():
    rows = text(0)
    assert torch.equal(used_rows(torch.nn.functional.pad(rows, (0, 0, 0, 9)).bfloat16()), rows.bfloat16().float())
    assert used_rows(torch.zeros(1, 4, 8)).shape == (1, 0, 8)


# Chunks of an earlier run


def test_finished_chunks_are_committed_not_made_again(tell, begun, same_memory, monkeypatch):
    whole = tell(begun, text(1), 5, change="recache", blend=2)
    made = whole.latent_chunks[5:8]
    denoised = []
    real = CausalSampler.denoise
    monkeypatch.setattr(
        CausalSampler, "denoise", lambda self, memory, *rest: denoised.append(1) or real(self, memory, *rest)
    )
    assert same_memory(tell(begun, text(1), 5, change="recache", blend=2, finished=made), whole)
    assert len(denoised) == 2


# Given frames


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_video_goes_on_from_what_it_is_given(tell, empty_memory, count):
    given = torch.randn(1, 16, count, 4, 6)
    memory = empty_memory(**SIZES).with_start_latents(given)
    after = tell(memory, text(0), 3)
    assert torch.equal(film(after)[:, :, :count], given), "to the bit"
    assert after.start_latents is None and after.num_frames == count // 2 * 2 + 6
    free = tell(empty_memory(**SIZES), text(0), 3)
    assert not torch.allclose(film(after)[:, :, count : count + 2], film(free)[:, :, count : count + 2], atol=1e-3)


def test_given_frames_are_clean_at_every_step_and_the_others_see_them(tell, empty_memory, net):
    given = torch.randn(1, 16, 1, 4, 6)
    seen = []
    forward = net.patch_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :, 0].clone()))
    times = net.time_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, :, 0].clone()))
    try:
        tell(empty_memory(**SIZES).with_start_latents(given), text(0), 1)
    finally:
        forward.remove()
        times.remove()
    pictures, sigmas = seen[0::2], seen[1::2]
    assert len(pictures) == 3 and all(torch.equal(picture, given[:, :, 0]) for picture in pictures)
    assert all(level[0] == 1 for level in sigmas), "cos(0): a clean frame"
    assert sigmas[0][1] != 1 and sigmas[2][1] == 1


def test_splitting_after_given_frames_changes_nothing(tell, empty_memory, same_memory):
    memory = empty_memory(**SIZES).with_start_latents(torch.randn(1, 16, 5, 4, 6))
    whole = tell(memory, text(0), 4)
    parts = tell(tell(memory, text(0), 1), text(0), 3)
    assert same_memory(*(dataclasses.replace(each, segments=()) for each in (whole, parts)))


def test_frames_are_given_to_empty_memories_of_their_size(begun, empty_memory):
    with pytest.raises(ValueError, match="^memory: it has 10 frames"):
        begun.with_start_latents(torch.zeros(1, 16, 1, 4, 6))
    with pytest.raises(ValueError, match="does not fit"):
        empty_memory(**SIZES).with_start_latents(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match="has a start image or clip already"):
        empty_memory(**SIZES).with_start_latents(torch.zeros(1, 16, 1, 4, 6)).with_start_latents(
            torch.zeros(1, 16, 1, 4, 6)
        )


# Compact memories


def test_a_compact_memory_is_small_and_goes_on(tell, begun):
    compact = begun.compact()
    assert compact.is_compact and compact.num_bytes == 0 and not begun.is_compact
    after, exact = tell(compact, text(0), 1), tell(begun, text(0), 1)
    assert after.slots.all == exact.slots.all
    difference = (tail(after) - tail(exact)).abs().mean() / tail(exact).abs().mean()
    assert 0 < difference < 0.2


def test_recache_needs_no_keys(tell, begun, same_memory):
    """It writes them all anew: from a compact memory the same to the bit."""
    parts = (tell(memory, text(1), 2, change="recache") for memory in (begun, begun.compact()))
    assert same_memory(*parts)


def test_a_compact_memory_is_rebuilt_under_the_prompt_it_ends_with(tell, begun):
    """`keep` must not read the past under the new prompt: that is what `recache` is for."""
    tell(begun.compact(), text(1), 1)
    assert torch.equal(tell.texts[0], text(0)) and torch.equal(tell.texts[-1], text(1))


def test_another_student_s_memory_is_refused(net, make_sampler, begun):
    sampler = make_sampler(net, text=text(0), student="you")
    with pytest.raises(ValueError, match="another student"):
        sampler.prepare(begun)
