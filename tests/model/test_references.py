"""References: pinned pictures that are remembered and are not in the film."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from context_forcing.memory import MemoryView
from context_forcing.memory.config import CLEAN_POLICIES
from context_forcing.memory.memory import CHANGES
from context_forcing.memory.references import Reference
from context_forcing.memory.snapshot import fingerprint_memory, fingerprint_references, load_memory, save_memory
from context_forcing.model.attention_mass import attention_mass
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.finite import NotFiniteError
from context_forcing.model.sampler import seeded_noise, working_bytes
from context_forcing.model.segment import generate_segment
from context_forcing.video.pipeline import Pipeline

SIGMAS = (1.0, 0.6)
LATENT_SIZE = (16, 4, 6)
SIZES = dict(sink=3, slow=4, fast=4, chunk=2, window=11, slow_similarity_threshold=0.9999)


def text(seed):
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(100 + seed))


def picture(seed, prompt="", own_text=None):
    latents = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(200 + seed))
    return Reference(latents=latents, prompt=prompt, text=own_text)


@pytest.fixture(scope="module")
def sampler_of(net, make_sampler):
    return lambda prompt: make_sampler(net, text=prompt, student="me")


@pytest.fixture(scope="module")
def tell(sampler_of):
    """(memory, prompt, chunks, ...) -> the memory after a segment."""

    def go(memory, prompt, num_chunks, seed=3, **settings):
        *_, memory = generate_segment(
            sampler_of, memory, prompt, prompt="", seed=seed, num_chunks=num_chunks, sigmas=SIGMAS, **settings
        )
        return memory

    return go


@pytest.fixture(scope="module")
def pinned(empty_memory):
    """An empty memory with one reference with a caption, and one without."""
    return empty_memory(**SIZES).with_references([picture(0, "a fox", text(7)), picture(1)])


@pytest.fixture(scope="module")
def begun(tell, pinned):
    memory = tell(pinned, text(0), 6)
    assert memory.slots.slow and memory.slots.fast
    return memory


def film(memory):
    return torch.cat(memory.latent_chunks, 2)


def keys(memory, frame):
    return memory.store.frames[frame].keys


def own_keys(sampler, reference):
    """Keys of a picture that a pass over it alone computes."""
    attend = sampler.network.attend(MemoryView(), 1, LATENT_SIZE, keep=True)
    sampler.network.flow(reference.latents, 0.0, sampler.text, attend)
    return attend.new_kv[0].keys


def test_they_take_slots_of_the_sink_and_are_not_in_the_film(begun):
    assert begun.slots.sink == (-2, -1, 0) and begun.slots.references == (-2, -1)
    assert begun.num_frames == film(begun).shape[2] == 12
    assert len(begun.slots.all) <= begun.config.capacity
    assert min(begun.slots.film) == 0 and {decision.frame for decision in begun.decisions} == set(range(1, 10))
    assert torch.equal(begun.latents_of([-2, 3, -1])[:, :, [0, 2]], torch.cat([p.latents for p in begun.references], 2))


def test_positions_are_ranks_and_stay_in_the_window(sampler_of, begun, pinned, tell):
    first = sampler_of(text(0)).view(sampler_of(text(0)).prepare(pinned.begin("", 3, text(0))))
    assert (first.num_frames, list(first.positions(2))) == (2, [9, 10]), "a scene begins: the last ones of the window"
    second = sampler_of(text(0)).view(tell(pinned, text(0), 1))
    assert (second.num_frames, list(second.positions(2))) == (4, [4, 5]), "ranks"
    view = sampler_of(text(0)).view(begun)
    assert view.num_sink == 3 and view.positions(2)[-1] < begun.config.window
    cut = begun.begin("", 3, text(1), "cut_new_sink")
    assert sampler_of(text(1)).view(cut).positions(2)[-1] == begun.config.window - 1


def test_each_is_read_alone_under_its_own_prompt(sampler_of, begun):
    assert begun.references[0].text is not None and torch.equal(begun.references[1].text, text(0))
    for frame, prompt in ((-2, text(7)), (-1, text(0))):
        assert torch.equal(keys(begun, frame), own_keys(sampler_of(prompt), begun.references[frame]))
    assert not torch.allclose(keys(begun, -2), own_keys(sampler_of(text(0)), begun.references[-2]), atol=1e-4)


def test_they_change_the_film_from_its_first_chunk(tell, empty_memory, begun):
    without = tell(empty_memory(**SIZES), text(0), 1)
    other = tell(empty_memory(**SIZES).with_references([picture(0, "a fox", text(7)), picture(2)]), text(0), 1)
    for memory in (without, other):
        assert not torch.allclose(film(memory), film(begun)[:, :, :2], atol=1e-3)


@torch.inference_mode()
def test_the_built_in_student_does_not_begin_with_the_picture():
    """Next to the reference it would: the first frame then differs by .01."""
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cpu"), torch.float32)
    prompt = encode_demo_text("A desert under a clear sky by day. The camera stays.")
    empty = pipeline.empty_memory()
    film = next(
        pipeline.sampler(prompt).rollout(
            empty, 1, sigmas=pipeline.card.sigmas, noise=seeded_noise(0, empty.latent_size)
        )
    )
    pinned = empty.with_references([Reference(latents=film.latents_of([0]))])
    for scene_begins in (True, False):
        memory = dataclasses.replace(pinned, scene_begins=scene_begins)
        noise = seeded_noise(1, memory.latent_size)
        *_, memory = pipeline.sampler(prompt).rollout(memory, 1, sigmas=pipeline.card.sigmas, noise=noise)
        difference = (memory.latents_of([0]) - film.latents_of([0])).square().mean()
        assert (difference > 0.2) == scene_begins, difference


def test_no_references_are_no_change(tell, empty_memory, same_memory):
    assert same_memory(
        tell(empty_memory(**SIZES).with_references([]), text(0), 3), tell(empty_memory(**SIZES), text(0), 3)
    )


@pytest.mark.parametrize("policy", CLEAN_POLICIES)
def test_a_chain_is_one_run_and_no_policy_touches_them(tell, empty_memory, same_memory, policy):
    pinned = empty_memory(**SIZES, policy=policy, uniform_stride=2).with_references([picture(0), picture(1)])
    whole = tell(pinned, text(0), 8)
    chained = pinned
    for chunks in (1, 4, 3):
        chained = tell(chained, text(0), chunks)
    assert same_memory(dataclasses.replace(chained, segments=whole.segments, texts=whole.texts), whole)
    assert whole.slots.references == (-2, -1) and whole.slots.slow and min(whole.slots.slow) > 0
    assert all(decision.evicted is None or decision.evicted > 0 for decision in whole.decisions)


def test_they_can_be_pinned_one_after_the_other(pinned, tell, empty_memory, same_memory):
    stepwise = empty_memory(**SIZES)
    for reference in pinned.references:
        stepwise = stepwise.with_references([reference])
    assert same_memory(tell(stepwise, text(0), 2), tell(pinned, text(0), 2))


def test_a_sink_full_of_references_holds_no_frame(tell, empty_memory):
    full = empty_memory(**{**SIZES, "policy": "clean"}).with_references([picture(n) for n in range(3)])
    memory = tell(full, text(0), 4)
    assert memory.slots.sink == (-3, -2, -1) and 0 not in memory.slots.fast
    assert memory.decisions[0].similarity is None, "no frame is before the first one"


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_keeps_them_as_they_were(tell, begun, change):
    after = tell(begun, text(1), 3, change=change)
    assert after.slots.sink == (-2, -1, 12 if change == "cut_new_sink" else 0)
    for frame in (-2, -1):
        assert torch.equal(keys(after, frame), keys(begun, frame))
    assert after.references == begun.references


def test_saved_and_loaded_is_kept(tell, begun, pinned, tmp_path, same_memory):
    for number, memory in enumerate((pinned, begun, begun.compact())):
        save_memory(tmp_path / f"{number}", memory)
        loaded = load_memory(tmp_path / f"{number}")
        assert same_memory(loaded, memory) and [each.prompt for each in loaded.references] == ["a fox", ""]
        assert same_memory(tell(loaded, text(1), 2), tell(memory, text(1), 2))
        assert fingerprint_memory(loaded) == fingerprint_memory(memory)
    assert load_file(tmp_path / "1")["film"].shape[2] == begun.num_frames


def test_a_damaged_file_is_refused(begun, tmp_path):
    save_memory(tmp_path / "memory", dataclasses.replace(begun, references=begun.references[:1]))
    with pytest.raises(ValueError, match="damaged: references"):
        load_memory(tmp_path / "memory")


@pytest.mark.parametrize("change", ["keep", "recache"])
def test_a_compact_memory_reads_them_again(sampler_of, tell, begun, change):
    restored = tell(begun.compact(), text(1), 1, change=change)
    for frame in (-2, -1):
        assert torch.equal(keys(restored, frame), keys(begun, frame))


def test_recache_sees_them(sampler_of, begun):
    """What the frames of the film become depends on the references."""
    sampler = sampler_of(text(1))
    other = dataclasses.replace(begun, references=(begun.references[0], picture(5, own_text=text(0))))
    one, two = sampler.recache(begun), sampler.recache(other)
    assert torch.equal(keys(one, -2), keys(two, -2)) and not torch.equal(keys(one, -1), keys(two, -1))
    assert not torch.allclose(keys(one, begun.slots.slow[0]), keys(two, begun.slots.slow[0]), atol=1e-4)


def test_finished_chunks_are_committed_after_them(tell, begun, pinned, same_memory):
    resumed = tell(pinned, text(0), 6, finished=iter(begun.latent_chunks[:4]))
    assert same_memory(resumed, begun)


def test_a_start_image_follows_them(tell, pinned, empty_memory):
    start = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(9))
    memory = tell(pinned.with_start_latents(start), text(0), 3)
    assert torch.equal(film(memory)[:, :, :3], start) and memory.slots.sink == (-2, -1, 0)


def test_first_steps_are_for_a_film_that_has_no_frame(make_sampler, net, pinned):
    sampler = make_sampler(net, text=text(0), first_sigmas=(1.0, 0.8, 0.6, 0.3))
    memory = sampler.prepare(pinned.begin("", 3, text(0)))
    noise = lambda frame, step: torch.randn(1, *memory.latent_size)
    assert len(list(sampler.denoise(memory, sampler.view(memory), SIGMAS, noise))) == 4


def test_attention_on_them_is_reported(sampler_of, begun):
    (shares,) = {len(mass) for mass in attention_mass(sampler_of, begun, SIGMAS).values()}
    assert shares == len(begun.slots.all) + 2


def test_the_estimate_of_device_memory_counts_them(sampler_of, begun, empty_memory):
    network = sampler_of(text(0)).network
    assert begun.num_bytes <= working_bytes(network, begun, "at once")
    without = working_bytes(network, empty_memory(**SIZES), "at once")
    assert working_bytes(network, begun, "at once") == without, "they take slots that are counted already"
    assert any(tensor is begun.references[0].latents for tensor in begun.tensors())


@pytest.mark.parametrize(
    "settings, references, message",
    [
        ({}, [picture(n) for n in range(4)], "references: 4 frames, the sink has 3; give fewer"),
        ({"sink": 0}, [picture(0)], "references: 1 frames, the sink has 0"),
        ({"policy": "released", "fast": 3, "window": 12}, [picture(0)], "policy released"),
        ({}, [Reference(latents=torch.zeros(1, 16, 2, 4, 6))], "number 1 has 2 latent frames"),
        ({}, [Reference(latents=torch.zeros(1, 16, 1, 4, 4))], "does not fit"),
        ({}, [picture(0), Reference(latents=torch.full((1, 16, 1, 4, 6), torch.nan))], "infinity in number 2"),
        ({}, [picture(0, own_text=torch.full((1, 2, 32), torch.inf))], "infinity in number 1"),
    ],
)
def test_what_cannot_be_pinned_is_one_line(empty_memory, settings, references, message):
    with pytest.raises(ValueError, match=message):
        empty_memory(**{**SIZES, **settings}).with_references(references)


def test_a_film_that_has_begun_takes_none(begun):
    with pytest.raises(ValueError, match="references: the memory has 12 frames; references need an empty memory"):
        begun.with_references([picture(0)])


def test_a_reference_whose_keys_overflow_is_named(make_net, make_sampler, pinned):
    net = make_net()
    net.blocks[1].self_attn.k.weight.data[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="reference 1, the commit pass: NaN or infinity in the .* blocks.1"):
        make_sampler(net, text=text(0)).prepare(pinned.begin("", 3, text(0)))


def test_fingerprints_tell_references_apart():
    prints = {
        fingerprint_references([picture(0)]),
        fingerprint_references([picture(1)]),
        fingerprint_references([picture(0, "a fox", text(7))]),
        fingerprint_references([picture(0), picture(1)]),
        fingerprint_references([picture(1), picture(0)]),
    }
    assert len(prints) == 5
