"""Teacher forcing sees what the sampler sees; training data, configurations and resuming."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.causal import causal_forward, embed_text
from context_forcing.model.network import Network
from context_forcing.model.sampler import CausalSampler
from context_forcing.train.data.clips import make_batch, memory_layout, random_clip
from context_forcing.train.presets import CONFIGS, load_config
from context_forcing.train.stages.forcing import CLEAN, TeacherForcing, interleave, noisy_part
from context_forcing.train.stages.pretrain import Draws, column_weights, teacher_forced_flow, training_loss

CHUNK, NUM_CHUNKS, GRID = 2, 7, (2, 3)
SETTINGS = [
    dict(sink=1, slow=2, fast=4, policy="uniform", uniform_stride=3),
    dict(sink=0, slow=3, fast=3, policy="novel", slow_similarity_threshold=0.999),
    dict(sink=2, slow=0, fast=2),
    dict(sink=0, slow=0, fast=2),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def clips(net):
    """Two clips with a text per chunk: clean and noisy latents, sigma per frame, text rows [B * K, L, 32]."""
    clean, noisy = random(2, 16, CHUNK * NUM_CHUNKS, 4, 6), random(2, 16, CHUNK * NUM_CHUNKS, 4, 6, seed=1)
    sigma = torch.rand(2, NUM_CHUNKS, generator=torch.Generator().manual_seed(2)).repeat_interleave(CHUNK, 1)
    return clean, noisy, sigma, random(2 * NUM_CHUNKS, 5, 32, seed=3)


def network_of(net):
    return Network(net, torch.device("cpu"), torch.float32)


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
def test_a_teacher_forced_pass_is_the_samplers(net, clips, settings):
    """Clean and noisy flows of every chunk, two clips with layouts of their own, within 1e-5."""
    clean, noisy, sigma, text = clips
    (slots_a, clean_a, noisy_a), (slots_b, clean_b, noisy_b) = (
        by_memory(net, clips, 0, settings), by_memory(net, clips, 1, SETTINGS[2]),
    )  # fmt: skip
    slots = padded([slots_a, slots_b], capacity=9)
    flow = teacher_forced_flow(network_of(net), SimpleNamespace(text=text, slots=slots), clean, noisy, sigma, CHUNK)
    assert relative(flow[:1], noisy_a) < 1e-5 and relative(flow[1:], noisy_b) < 1e-5

    attend = TeacherForcing(slots, CHUNK, GRID, 32)
    levels = torch.stack([0 * sigma, sigma], 1).unflatten(-1, (NUM_CHUNKS, CHUNK)).transpose(1, 2).flatten(1)
    both = causal_forward(
        net, interleave(clean, noisy, CHUNK), 1000 * levels, embed_text(net, text, num_groups=NUM_CHUNKS), attend
    )
    assert relative(noisy_part(both, CHUNK)[:1], noisy_a) < 1e-5
    clean_part = both.unflatten(2, (NUM_CHUNKS, 2, CHUNK))[:, :, :, CLEAN].flatten(2, 3)
    assert relative(clean_part[:1], clean_a) < 1e-5 and relative(clean_part[1:], clean_b) < 1e-5


def test_what_a_chunk_must_not_see_does_not_change_it(make_net, clips):
    """One layer, so that a frame's keys come from its own pixels: only remembered frames and the chunk itself count."""
    net, (clean, noisy, sigma, text) = make_net(num_layers=1), clips
    layout, *_ = by_memory(net, clips, 0, SETTINGS[0])
    slots = padded([layout, layout], capacity=5)
    last = slice((NUM_CHUNKS - 2) * CHUNK, (NUM_CHUNKS - 1) * CHUNK)  # the last chunk but one: it has a future
    seen = layout[NUM_CHUNKS - 2]
    assert 0 < len(seen) < last.start
    flow = lambda clean, noisy: teacher_forced_flow(
        network_of(net), SimpleNamespace(text=text, slots=slots), clean, noisy, sigma, CHUNK
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


def test_the_future_changes_nothing_at_any_depth(net, clips):
    clean, noisy, sigma, text = clips
    layout, *_ = by_memory(net, clips, 0, SETTINGS[0])
    slots = padded([layout, layout], capacity=5)
    flow = lambda clean, noisy: teacher_forced_flow(
        network_of(net), SimpleNamespace(text=text, slots=slots), clean, noisy, sigma, CHUNK
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


@pytest.mark.parametrize(
    "config", [MemoryConfig(), MemoryConfig(sink=1, slow=4, fast=8), MemoryConfig(slow=0)], ids=str
)
def test_layouts_hold_what_a_memory_can(config):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        clip = random_clip(rng, 14, config.chunk, pacing=0.5)
        layout = memory_layout(rng, clip, config)
        assert len(layout) == 14 and layout[0] == ()
        for c, frames in enumerate(layout):
            assert len(frames) <= config.capacity
            assert list(frames) == sorted(set(frames)) and all(0 <= f < c * config.chunk for f in frames)
            recent = range(max(0, c * config.chunk - (config.fast - config.chunk)), c * config.chunk)
            assert set(recent) <= set(frames)
        old = [f for f in layout[-1] if config.sink <= f < 13 * config.chunk - config.fast + config.chunk]
        kinds.add((0 in layout[-1], len(old) > 0))
    expected = {(True, True), (True, False), (False, False)} if config.slow else {(True, False), (False, False)}
    assert kinds == expected, "full, sink and fast, fast alone"


def test_batches_are_a_function_of_their_seed():
    from context_forcing.model.codecs.demo_vae import load_demo_codec

    make = lambda seed: make_batch(load_demo_codec(), MemoryConfig(), seed=seed, size=2, num_chunks=4, text_dropout=0.1)
    a, again, other = make((1, 1, 5)), make((1, 1, 5)), make((1, 1, 6))
    assert (
        torch.equal(a.latents, again.latents) and torch.equal(a.text, again.text) and torch.equal(a.slots, again.slots)
    )
    assert not torch.equal(a.latents, other.latents)
    assert a.latents.shape == (2, 16, 12, 8, 16) and a.text.shape[0] == 8 and a.slots.shape[:2] == (2, 4)
    assert a.slots.shape[2] == (a.slots >= 0).sum(-1).max(), "no wider than the fullest memory"


def test_steps_lower_the_loss():
    """The same batch and noise again and again: what the optimisers are for."""
    from context_forcing.model.codecs.demo_vae import load_demo_codec
    from context_forcing.model.config import WanConfig
    from context_forcing.model.wan import WanModel
    from context_forcing.train.optim import build_optimizers

    config = load_config("pretrain", "smoke", ["num_chunks=3"])
    net = WanModel(WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=1))
    net.reset_parameters(torch.Generator().manual_seed(0))
    batch = make_batch(load_demo_codec(), config.memory, seed=(1, 1), size=1, num_chunks=3, text_dropout=0.0)
    draws = Draws.of(config, batch, torch.Generator().manual_seed(0))
    optimizers, losses = build_optimizers(net, "muon", 2e-3, (0.9, 0.98), 0.01), []
    for _ in range(12):
        loss = training_loss(network_of(net), config, batch, draws) / column_weights(config, batch).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_every_named_configuration_loads():
    for stage, names in CONFIGS.items():
        for name in names:
            assert load_config(stage, name) == CONFIGS[stage][name]


def test_overrides():
    config = load_config(
        "pretrain", "demo", ["steps=7", "optim.lr=1e-3", "optim.clip=2", "memory.slow=0", "out=some/where"]
    )
    assert (config.steps, config.optim.lr, config.optim.clip, config.memory.slow, config.out) == (
        7,
        1e-3,
        2.0,
        0,
        "some/where",
    )
    assert config.memory == MemoryConfig(slow=0)
    assert load_config("pretrain", "demo", ["memory.policy=clean"]).memory.policy == "clean"
    assert load_config("pretrain", "demo", ["steps=7", "steps=8"]).steps == 8


@pytest.mark.parametrize(
    "stage, name, overrides, words",
    [
        ("polish", "demo", [], ["stage", "polish"]),
        ("vae", "huge", [], ["config", "huge"]),
        ("vae", "demo", ["steps"], ["steps", "key=value"]),
        ("vae", "demo", ["depth=3"], ["depth", "unknown"]),
        ("pretrain", "demo", ["memory.slots=3"], ["slots", "unknown"]),
        ("vae", "demo", ["steps=2.5"], ["steps", "2.5", "int"]),
        ("vae", "demo", ["steps=many"], ["steps", "many", "int"]),
        ("vae", "demo", ["steps=true"], ["steps", "true", "int"]),
        ("vae", "demo", ["out=5"], ["out", "5", "str"]),
        ("vae", "demo", ["steps="], ["steps", "int"]),
        ("pretrain", "demo", ["memory=3"], ["memory", "3"]),
        ("pretrain", "demo", ["memory.slow=100"], ["window", "100"]),
        ("pretrain", "demo", ["memory.policy=newest"], ["policy", "newest"]),
    ],
)
def test_bad_configurations(stage, name, overrides, words):
    with pytest.raises(ValueError) as caught:
        load_config(stage, name, overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("steps=[", ["steps"]),  # yaml.ParserError
        ("optim.lr=abc", ["lr", "abc"]),  # could not convert string to float
        ("steps.x=1", ["steps"]),  # TypeError of dataclasses.fields
        ("optim.lr=true", ["lr", "true"]),  # taken for 1.0
        ("optim.lr=nan", ["lr", "nan"]),
        ("preset=huge", ["preset", "huge"]),  # KeyError when the run starts
        ("steps=0", ["steps", "0"]),  # returns a file that does not exist
        ("batch=-1", ["batch", "-1"]),
        ("checkpoint_every=0", ["checkpoint_every", "0"]),  # ZeroDivisionError after the first step
    ],
)
def test_worse_configurations(override, words):
    with pytest.raises(ValueError) as caught:
        load_config("pretrain", "demo", [override])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
