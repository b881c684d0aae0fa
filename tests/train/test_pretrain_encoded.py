"""Pretraining on encoded sets: its batches are those of clips drawn on the fly, and its layouts come from latents."""

import dataclasses

import numpy as np
import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_vae import load_demo_codec
from context_forcing.train import run_stage
from context_forcing.train.config import OptimConfig
from context_forcing.train.data.batches import Batch, encoded_batch
from context_forcing.train.data.clips import Clip, ShownBy, columns_shown_by, random_clip, to_latents, to_text
from context_forcing.train.data.encode import EncodeSettings, load_encoder
from context_forcing.train.data.layouts import Views, memory_layout
from context_forcing.train.data.manifest import Header
from context_forcing.train.data.shards import EncodedSet, ShardWriter
from context_forcing.train.plan import plan
from context_forcing.train.presets import load_config
from context_forcing.train.stages.forced_loss import LossNoise, column_weights, training_loss
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.world.scene import Scene
from context_forcing.train.world.scripts import random_styles

from .helpers import ALONE, metrics_of, network_of
from .videos import film, run

MEMORY = MemoryConfig(sink=1, slow=2, fast=4, window=21)
NUM_CHUNKS = 5
HALF = 2**-11
"""Relative rounding of fp16."""


def pan(seed: int) -> Clip:
    """A clip with one caption: the style and the move never change."""
    rng = np.random.default_rng(seed)
    styles = (random_styles(rng, 1)[0],) * NUM_CHUNKS
    return Clip(scene=Scene.sample(rng), styles=styles, moves=(1,) * NUM_CHUNKS, chunk=3, start=5 * seed)


def pixels(clip: Clip) -> np.ndarray:
    """A video that shows each latent frame of a clip for its four pixel frames, uint8 [1 + 4 (T - 1), H, W, 3]."""
    frames = clip.art().repeat(2, axis=1).repeat(2, axis=2)
    return np.concatenate([frames[:1], frames[1:].repeat(4, axis=0)])


@pytest.fixture(scope="module")
def clips():
    return [pan(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def encoded(clips, tmp_path_factory):
    """The clips as `context-forcing encode` stores decoded videos."""
    folder, encoder = tmp_path_factory.mktemp("sets") / "clips", load_encoder(EncodeSettings(), True)
    header = Header(
        source="pans", model="demo", vae="v", text_encoder="demo", dtype="fp16", fps=16, size=(128, 64), frames=15
    )
    writer = ShardWriter(folder, header, 2**20)
    for number, clip in enumerate(clips):
        tensors = {"latents": encoder.latents(pixels(clip)).half(), "text": encoder.text(clip.captions[0]).half()}
        writer.add(str(number), 0.0, clip.captions[0], tensors)
    writer.write_empty_text(lambda: encoder.text("").half())
    writer.flush()
    return folder


def from_set(folder, **settings) -> tuple[Batch, list[int]]:
    """A batch of all clips, and which clip each one is."""
    data = EncodedSet(folder, 1)
    order = [int(data.entry(number).source) for number in range(3)]
    settings = dict(seed=(1, 1, 0), numbers=range(3), num_chunks=NUM_CHUNKS) | settings
    return encoded_batch(data, MEMORY, **settings), order


def drawn(clips, slots) -> Batch:
    """The batch of clips drawn on the fly, with their true columns."""
    text = to_text([caption for clip in clips for caption in clip.captions]).unflatten(0, (len(clips), NUM_CHUNKS))
    shown_by = [columns_shown_by(clip, slots[b].tolist(), MEMORY.fast - 3) for b, clip in enumerate(clips)]
    return Batch(to_latents(load_demo_codec(), clips), text, slots, torch.from_numpy(np.stack(shown_by)))


def test_an_encoded_clip_is_the_clip_drawn_on_the_fly_rounded_to_half(encoded, clips):
    batch, order = from_set(encoded)
    fly = drawn([clips[i] for i in order], batch.slots)
    assert ((batch.latents - fly.latents).abs() <= HALF * fly.latents.abs() + 1e-5).all()
    rows = batch.text.shape[2]
    assert batch.text.shape[:2] == (3, 1)
    for text_GLC, same_GLC in zip(batch.text, fly.text):
        assert all(torch.allclose(text_GLC[0], same_LC[:rows], atol=1e-3) for same_LC in same_GLC)
    assert (batch.shown_by == ShownBy.UNKNOWN).all()


def test_a_video_file_adds_its_codecs_loss_only(clips, tmp_path):
    film(tmp_path / "videos" / "pan.mp4", pixels(clips[0]), caption=clips[0].captions[0])
    run(tmp_path / "videos", tmp_path / "set", EncodeSettings(frames=15))
    latents, _ = EncodedSet(tmp_path / "set", 1).sample(0)
    fly = to_latents(load_demo_codec(), clips[:1])
    assert (latents - fly).square().mean() < 0.02 * fly.square().mean()


def test_the_loss_is_that_of_clips_drawn_on_the_fly_where_columns_weigh_the_same(encoded, clips, make_net):
    batch, order = from_set(encoded)
    fly = drawn([clips[i] for i in order], batch.slots)
    settings = [f"num_chunks={NUM_CHUNKS}", "memory={sink: 1, slow: 2, fast: 4}", "unseen_weight=1", "recall_weight=1"]
    config = load_config("pretrain", "smoke", settings)
    network = network_of(make_net(dim=32, ffn_dim=64, num_heads=1, num_layers=2, text_dim=4096, text_len=512))

    def loss(batch, config=config):
        noise = LossNoise.draw(config, batch, torch.full(batch.slots.shape[:2], 0.7), torch.Generator().manual_seed(0))
        return (training_loss(network, config, batch, noise) / column_weights(config, batch).sum()).item()

    assert loss(batch) == pytest.approx(loss(fly), rel=1e-3)
    unequal = dataclasses.replace(config, recall_weight=50.0, unseen_weight=0.1)
    assert loss(fly, unequal) != pytest.approx(loss(fly), rel=1e-3), "the demo world's weights act"
    assert loss(batch, unequal) == loss(batch), "an encoded set's columns all have weight 1"


def test_batches_of_a_set_are_a_function_of_their_seed(encoded):
    make = lambda **settings: from_set(encoded, **settings)[0]
    a, again, other = make(), make(), make(seed=(1, 1, 1))
    assert torch.equal(a.slots, again.slots) and torch.equal(a.latents, again.latents)
    assert a.slots.shape != other.slots.shape or not torch.equal(a.slots, other.slots)
    assert not make(text_dropout=1.0).text.any(), "the demo's empty prompt is zero"
    assert make(num_chunks=1, numbers=range(2)).latents.shape == (2, 16, 3, 8, 16)


def test_layouts_from_latents_hold_what_a_memory_can():
    config, rng, kinds, slow = MemoryConfig(), np.random.default_rng(0), set(), []
    for _ in range(60):
        clip = random_clip(rng, 14, 3, pacing=0.5)
        layout = memory_layout(rng, Views.of_latents(to_latents(load_demo_codec(), [clip])[0]), config)
        for c, frames in enumerate(layout):
            assert len(frames) <= config.capacity
            assert list(frames) == sorted(set(frames)) and all(0 <= f < 3 * c for f in frames)
            assert set(range(max(0, 3 * c - 3), 3 * c)) <= set(frames)
        old = [f for f in layout[-1] if config.sink <= f < 13 * 3 - 3]
        kinds.add((0 in layout[-1], bool(old)))
        slow.append(len(old))
    assert kinds >= {(True, True), (True, False), (False, False)}
    assert sum(number == 12 for number in slow) > 15 and sum(0 < number < 12 for number in slow) > 5


def test_latents_tell_a_view_that_was_seen_before():
    """The nearest earlier frame shows the same columns in the same style, wherever there is one."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(10):
        clip = random_clip(rng, 10, 3, pacing=1.0)
        true, views = clip.views, Views.of_latents(to_latents(load_demo_codec(), [clip])[0])
        for t in range(6, 30):
            seen = np.flatnonzero(true.similarity_TT[t, : t - 3] == 1)
            if len(seen):
                assert int(views.distance_TT[t, : t - 3].argmin()) in seen
                found += 1
    assert found > 50


def test_frames_that_are_all_equal_have_a_layout():
    views = Views.of_latents(torch.ones(16, 15, 8, 16))
    assert np.isfinite(views.distance_TT).all() and len(memory_layout(np.random.default_rng(0), views, MEMORY)) == 5


SETTINGS = [f"num_chunks={NUM_CHUNKS}", "memory={sink: 1, slow: 2, fast: 4}", "openings=2"]


def test_the_stage_trains_on_a_set(tiny, encoded, tmp_path):
    run_stage(
        "pretrain", "smoke", [*SETTINGS, f"data={encoded}", "steps=2", "sample_every=1", f"out={tmp_path}"], False
    )
    card = StudentSource(tmp_path / "student.safetensors").open().card
    assert "3 clips or prompts of pans" in card.data and card.stage == "pretrain"
    metrics = metrics_of(tmp_path)
    assert all(0 < metrics[step]["all"] and 0 < metrics[step]["blind"] for step in (0, 1))


@pytest.mark.parametrize("data", ["demo", "set"])
def test_clips_in_several_passes_give_the_same_update(tiny, encoded, data):
    """The gradients of two clips, together and one after the other."""
    norms = []
    for each in (0, 1):
        overrides = [f"data={encoded if data == 'set' else 'demo'}", f"clips_per_pass={each}"]
        stage = PretrainStage(load_config("pretrain", "smoke", [*SETTINGS, *overrides]), ALONE)
        metrics = stage.step(0)
        norms.append((metrics["loss"], metrics["grad_norm"], *stage.validate().values()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_sets_that_do_not_fit_are_refused(encoded):
    with pytest.raises(ValueError, match="18 are needed"):
        PretrainStage(load_config("pretrain", "smoke", [*SETTINGS, f"data={encoded}", "num_chunks=6"]), ALONE)
    with pytest.raises(ValueError, match="encoded by demo, preset wan2.1-1.3b cannot read it"):
        PretrainStage(load_config("pretrain", "wan2.1-1.3b", [f"data={encoded}"]), ALONE)


def test_wans_configuration_fits_a_gpu():
    config = load_config("pretrain", "wan2.1-1.3b")
    assert config.init == "wan2.1_t2v_1.3B.safetensors" and config.optim == OptimConfig(
        lr=1e-5, betas=(0.9, 0.999), clip=1.0, ema=0.999
    )
    assert plan(config, 1).total("bytes") < 80e9
    assert plan(dataclasses.replace(config, clips_per_pass=0), 1).total("bytes") > 139 * 2**30
