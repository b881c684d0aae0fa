"""Sizes are checked, and refusals name the field and its value."""

import dataclasses

import pytest

from context_forcing.memory import MemoryConfig
from context_forcing.memory.config import MEMORY_PRESETS, named_memory


@pytest.mark.parametrize(
    "settings, field, value",
    [
        (dict(sink=-1), "sink", "-1"),
        (dict(slow=-2), "slow", "-2"),
        (dict(chunk=0), "chunk", "0"),
        (dict(chunk=-3), "chunk", "-3"),
        (dict(uniform_stride=0), "uniform_stride", "0"),
        (dict(fast=2), "fast", "2"),
        (dict(fast=3), "fast", "3"),
        (dict(fast=2, slow=0), "fast", "2"),
        (dict(window=20), "window", "20"),
        (dict(window=0), "window", "0"),
        (dict(slow=13), "window", "21"),
        (dict(policy="newest"), "policy", "newest"),
        (dict(policy=""), "policy", "''"),
        (dict(eviction="random"), "eviction", "random"),
        (dict(slow_similarity_threshold=1.01), "slow_similarity_threshold", "1.01"),
        (dict(slow_similarity_threshold=-1.01), "slow_similarity_threshold", "-1.01"),
        (dict(slow_similarity_threshold=float("nan")), "slow_similarity_threshold", "nan"),
    ],
)
def test_bad_values_are_refused_by_name(settings, field, value):
    with pytest.raises(ValueError) as caught:
        MemoryConfig(**settings)
    message = str(caught.value)
    assert message.startswith(f"{field}:") and value in message and "\n" not in message


@pytest.mark.parametrize("value", ["3", 3.0, None], ids=repr)
def test_sizes_are_whole_numbers(value):
    for field in ("sink", "slow", "chunk", "uniform_stride"):
        with pytest.raises(ValueError, match=f"^{field}: "):
            MemoryConfig(**{field: value})


@pytest.mark.parametrize("value", ["0.95", None], ids=repr)
def test_the_threshold_is_a_number(value):
    with pytest.raises(ValueError, match="^slow_similarity_threshold: "):
        MemoryConfig(slow_similarity_threshold=value)


def test_extremes_are_accepted():
    assert MemoryConfig(sink=0, slow=0, fast=1, chunk=1, window=1).capacity == 0
    assert MemoryConfig(slow=0, fast=3).capacity == 3
    assert MemoryConfig(fast=4, slow=14).capacity == 18
    for threshold in (-1, 0, 1):
        MemoryConfig(slow_similarity_threshold=threshold)


def test_defaults_are_the_papers():
    config = MemoryConfig()
    assert (config.sink, config.slow, config.fast, config.chunk, config.window) == (3, 12, 6, 3, 21)
    assert config.slow_similarity_threshold == 0.95
    assert config.capacity == 18


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().slow = 3


def test_from_dict_round_trip_and_unknown_fields():
    config = MemoryConfig(sink=1, slow=2, policy="clean", eviction="redundant")
    assert MemoryConfig.from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="slots"):
        MemoryConfig.from_dict({"sink": 1, "slots": 5})


@pytest.mark.parametrize(
    "name, sees",
    [("slow-fast", (3, 12, 3)), ("context-forcing", (3, 12, 3)), ("longlive", (3, 0, 6)), ("infinity-rope", (1, 0, 2))],
)
def test_named_memories_show_a_chunk_what_their_students_saw(name, sees):
    """LongLive: 12 frames with a sink of 3; Infinity-RoPE: 6 with a sink of 1; the chunk included."""
    config = named_memory(name, MemoryConfig())
    assert (config.sink, config.slow, config.fast - config.chunk) == sees
    assert config.capacity + config.chunk == config.window
    assert MEMORY_PRESETS["context-forcing"].policy == "clean" and MEMORY_PRESETS["slow-fast"].policy == "novel"


def test_a_named_memory_keeps_the_student_s_chunk_and_window():
    assert named_memory("longlive", MemoryConfig(chunk=1)).chunk == 1
    with pytest.raises(ValueError, match="memory: 'none' is not one of slow-fast"):
        named_memory("none", MemoryConfig())
    with pytest.raises(ValueError, match="slow-fast needs a window of 21 frames, the student has 12"):
        named_memory("slow-fast", MEMORY_PRESETS["longlive"])
