"""Pretraining data and its loss."""

import numpy as np
import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.model.codecs.demo_vae import load_demo_codec
from context_forcing.model.config import WanConfig
from context_forcing.model.wan import WanModel
from context_forcing.train.data.batches import make_batch
from context_forcing.train.data.clips import random_clip
from context_forcing.train.data.layouts import memory_layout
from context_forcing.train.optim import build_optimizers
from context_forcing.train.presets import load_config
from context_forcing.train.stages.forced_loss import LossNoise, column_weights, training_loss

from .helpers import network_of


@pytest.mark.parametrize(
    "config", [MemoryConfig(), MemoryConfig(sink=1, slow=4, fast=8), MemoryConfig(slow=0)], ids=str
)
def test_layouts_hold_what_a_memory_can(config):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        clip = random_clip(rng, 14, config.chunk, pacing=0.5)
        layout = memory_layout(rng, clip.views, config)
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
    make = lambda seed: make_batch(load_demo_codec(), MemoryConfig(), seed=seed, size=2, num_chunks=4, text_dropout=0.1)
    a, again, other = make((1, 1, 5)), make((1, 1, 5)), make((1, 1, 6))
    assert (
        torch.equal(a.latents, again.latents) and torch.equal(a.text, again.text) and torch.equal(a.slots, again.slots)
    )
    assert not torch.equal(a.latents, other.latents)
    assert a.latents.shape == (2, 16, 12, 8, 16) and a.text.shape[:2] == (2, 4) and a.slots.shape[:2] == (2, 4)
    assert a.slots.shape[2] == (a.slots >= 0).sum(-1).max(), "no wider than the fullest memory"


def test_steps_lower_the_loss():
    """The same batch and noise again and again: what the optimisers are for."""
    config = load_config("pretrain", "smoke", ["num_chunks=3"])
    net = WanModel(WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=1))
    net.reset_parameters(torch.Generator().manual_seed(0))
    batch = make_batch(load_demo_codec(), config.memory, seed=(1, 1), size=1, num_chunks=3, text_dropout=0.0)
    noise = LossNoise.draw(config, batch, torch.full(batch.slots.shape[:2], 0.7), torch.Generator().manual_seed(0))
    optimizers, losses = build_optimizers(net, config.optim), []
    for _ in range(12):
        loss = training_loss(network_of(net), config, batch, noise) / column_weights(config, batch).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad is None for parameter in net.parameters())
