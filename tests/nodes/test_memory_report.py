"""Memory Report without ComfyUI."""

from types import SimpleNamespace

import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.memory import empty_memory as new_memory
from context_forcing.model.attention_mass import attention_mass
from context_forcing.model.config import StudentCard
from context_forcing.model.segment import generate_segment


@pytest.fixture
def student(net, make_sampler, node_module, monkeypatch):
    network = make_sampler(net).network
    card = StudentCard(memory=MemoryConfig(sink=2, slow=2, fast=4, chunk=2, window=8))
    model = SimpleNamespace(model_options={"transformer_options": {}}, wrappers={}, backup={}, object_patches={})
    student = SimpleNamespace(model=model, commit=[], network=network, card=card, fingerprint="me")
    monkeypatch.setattr(node_module("memory").StudentModel, "of", lambda model: student)
    return student


def test_attention_needs_least_video_memory_and_is_that_of_every_layout(node_module, monkeypatch, student):
    """The report runs after samplers whose layout it does not know, without a fallback."""
    module, asked, drawn = node_module("memory"), [], []
    monkeypatch.setattr(node_module("sampler"), "make_room", lambda student, memory, layout, *_: asked.append(layout))
    monkeypatch.setattr(node_module("sampler"), "ignored_patches", lambda model: ())
    monkeypatch.setattr(node_module("sampler"), "attention_of", lambda *_: student.network.attention)
    sampler_of = node_module("sampler").prepare_sampler(student, None)
    *_, memory = generate_segment(
        sampler_of, new_memory(student.card.memory, (16, 4, 6)), torch.ones(1, 5, 32), prompt="", seed=1, num_chunks=3,
        sigmas=student.card.sigmas,
    )  # fmt: skip
    expected = attention_mass(sampler_of, memory, student.card.sigmas)
    monkeypatch.setattr(module, "thumbnails", lambda *_: None)
    monkeypatch.setattr(module, "draw_report", lambda memory, pictures, fps, mass: drawn.append(mass))
    monkeypatch.setattr(module, "picture_output", lambda *_: None)
    module.ContextForcingMemoryReport.execute(node_module("handle").MemoryHandle.of(memory), None, 16.0, "a model")
    assert asked == ["at once", "from RAM"] and drawn == [expected]
