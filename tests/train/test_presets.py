"""Named settings, YAML files and overrides."""

import pytest

from context_forcing.memory import MemoryConfig
from context_forcing.model.config import PRESETS, WanConfig
from context_forcing.train import run_stage
from context_forcing.train.presets import CONFIGS, load_config


def test_every_named_configuration_loads():
    for stage, names in CONFIGS.items():
        for name in names:
            assert load_config(stage, name) == CONFIGS[stage][name]


def test_the_negative_prompt_is_wan_s_for_wan_and_empty_elsewhere():
    for stage in ("local", "contextual"):
        assert load_config(stage, "wan2.1-1.3b").negative_prompt.count("\uff0c") == 27
        assert load_config(stage, "wan2.1-1.3b", ["negative_prompt="]).negative_prompt == ""
        assert load_config(stage, "demo").negative_prompt == load_config(stage, "smoke").negative_prompt == ""


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
    "stage, name, overrides, fragments",
    [
        ("polish", "demo", [], ["stage", "polish"]),
        ("vae", "huge", [], ["config", "huge"]),
        ("vae", "demo", ["steps"], ["steps", "key=value"]),
        ("vae", "demo", ["depth=3"], ["depth", "unknown"]),
        ("pretrain", "demo", ["memory.slots=3"], ["slots", "unknown"]),
        ("vae", "demo", ["steps=2.5"], ["steps", "2.5", "whole number"]),
        ("vae", "demo", ["steps=many"], ["steps", "many", "whole number"]),
        ("vae", "demo", ["steps=true"], ["steps", "True", "whole number"]),
        ("vae", "demo", ["out=5"], ["out", "5", "text"]),
        ("vae", "demo", ["steps="], ["steps", "whole number"]),
        ("pretrain", "demo", ["memory=3"], ["memory", "3"]),
        ("pretrain", "demo", ["memory.slow=100"], ["window", "100"]),
        ("pretrain", "demo", ["memory.policy=newest"], ["policy", "newest"]),
    ],
)
def test_bad_configurations(stage, name, overrides, fragments):
    with pytest.raises(ValueError) as caught:
        load_config(stage, name, overrides)
    assert all(fragment in str(caught.value) for fragment in fragments) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, fragments",
    [
        ("steps=[", ["steps"]),  # yaml.ParserError
        ("optim.lr=abc", ["lr", "abc"]),  # could not convert string to float
        ("steps.x=1", ["steps"]),  # TypeError of dataclasses.fields
        ("optim.lr=true", ["lr", "True"]),  # taken for 1.0
        ("optim.lr=nan", ["lr", "nan"]),
        ("preset=huge", ["preset", "huge"]),  # KeyError when the run starts
        ("steps=0", ["steps", "0"]),  # returns a file that does not exist
        ("batch=-1", ["batch", "-1"]),
        ("checkpoint_every=0", ["checkpoint_every", "0"]),  # ZeroDivisionError after the first step
    ],
)
def test_worse_configurations(override, fragments):
    with pytest.raises(ValueError) as caught:
        load_config("pretrain", "demo", [override])
    assert all(fragment in str(caught.value) for fragment in fragments) and "\n" not in str(caught.value)


def test_a_file_of_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("config: demo\nsteps: 7\nmemory:\n  slow: 6\nstudent_optim: {lr: 0.001, betas: [0.1, 0.9]}\n")
    config = load_config("contextual", str(path), ["batch=2"])
    assert (config.steps, config.memory.slow, config.batch, config.preset) == (7, 6, 2, "demo")
    assert (config.student_optim.lr, config.student_optim.betas) == (0.001, (0.1, 0.9))
    assert config.critic_optim == load_config("contextual", "demo").critic_optim
    path.write_text("config: demo\nmemory: longlive\n")
    assert load_config("contextual", str(path)).memory.window == 12


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("steps: 7", ["mapping", "config"]),
        ("[1, 2]", ["mapping"]),
        ("config: huge", ["config", "huge"]),
        ("config: demo\nstep: 7", ["mine.yaml", "step", "unknown"]),
        ("config: demo\nmemory: {slots: 7}", ["mine.yaml", "slots", "unknown"]),
        ("config: demo\nsteps: many", ["mine.yaml", "steps", "many", "whole number"]),
        ("config: {", ["cannot be read"]),
    ],
)
def test_a_bad_file_of_settings_is_refused_in_a_line(tmp_path, text, fragments):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        load_config("contextual", str(path))
    assert all(fragment in str(raised.value) for fragment in fragments) and "\n" not in str(raised.value)


def test_named_memories_are_settings_too():
    config = load_config("contextual", "demo", ["memory=infinity-rope", "memory.fast=4"])
    assert (config.memory.sink, config.memory.slow, config.memory.fast, config.memory.window) == (1, 0, 4, 6)
    with pytest.raises(ValueError, match="memory: 'longcat' is not"):
        load_config("contextual", "demo", ["memory=longcat"])
    assert isinstance(PRESETS["demo"], WanConfig)


@pytest.mark.parametrize(
    "stage, overrides, message",
    [
        ("contextual", ["precision=bf16"], "precision: one process on the CPU"),
        ("teacher", ["seed=-1"], "seed: -1"),
        ("teacher", ["memory=goldfish"], "memory: 'goldfish' is not one of slow-fast"),
        ("teacher", ["memory.slow=24"], "do not fit in the window"),
    ],
)
def test_a_stage_refuses_bad_settings(tiny, stage, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_stage(stage, "smoke", [*overrides, f"out={tmp_path}"], False)


def test_settings_are_checked_together():
    config = load_config(
        "contextual", "smoke", ["memory.slow=24", "memory.window=33", "target_from=9", "target_chunks=9"]
    )
    assert (config.memory.slow, config.memory.window, config.target_from) == (24, 33, 9)
