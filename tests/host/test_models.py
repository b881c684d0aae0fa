"""What a MODEL and a CONDITIONING may be: settings of a MODEL without a card, relatives of Wan, rows of a prompt."""

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from bench import ROUNDING, SIZES, difference

from context_forcing.nodes.model_access import StudentModel
from context_forcing.nodes.student_settings import ContextForcingStudentSettings

AS_IS = {"steps": "", "shift": 0.0, "solver": "as is", "fps": 0}
AS_IS |= dict.fromkeys(("chunk", "window", "sink", "slow", "fast"), -1)


def with_settings(model, **settings):
    return ContextForcingStudentSettings.execute(model, **AS_IS | settings).result[0]


def test_settings_of_a_model_without_a_card(bench):
    model = bench.load()
    settings = dict(steps="1000, 500", shift=3.0, solver="euler", fps=8, window=12, sink=3, slow=0, fast=9)
    card = StudentModel.of(with_settings(model, **settings)).card
    memory = card.memory
    assert (card.steps, card.shift, card.solver, card.fps) == ((1000, 500), 3, "euler", 8)
    assert (memory.window, memory.slow, memory.chunk) == (12, 0, 3)
    assert model.get_attachment("context_forcing_card") is None, "the node's input does not change"


def test_settings_of_a_published_student(bench):
    card = StudentModel.of(with_settings(bench.load(), steps="1000, 500", card="longlive")).card
    assert (card.name, card.steps, card.memory.window, card.memory.slow) == ("longlive", (1000, 500), 12, 0)


@pytest.mark.parametrize(
    "settings, message",
    [({"steps": "1000, abc"}, "steps: '1000, abc'"), ({"window": 3}, "window: sink 3 + slow 12 + fast 6")],
)
def test_wrong_settings_are_named(bench, settings, message):
    with pytest.raises(ValueError, match="^" + message.replace("+", r"\+")):
        with_settings(bench.load(), **settings)


MORE = {
    "i2v": {"in_dim": 36}, "vace": {"vace_layers": 1, "vace_in_dim": 96}, "camera": {"in_dim": 32},
    "camera_2.2": {"in_dim": 36}, "humo": {"in_dim": 36}, "animate": {"in_dim": 36}, "scail": {"in_dim": 20},
    "scail2": {"in_dim": 20}, "wandancer": {"in_dim": 36}, "animate2": {"in_dim": 36},
}  # fmt: skip
"""Sizes that ComfyUI reads from the files of Wan's relatives, by model type."""


def relatives():
    """Every relative of Wan 2.1 text-to-video that this ComfyUI has."""
    plain = comfy.supported_models.WAN21_T2V
    for config in comfy.supported_models.models:
        if issubclass(config, plain):
            yield config.__name__, config, MORE.get(config.unet_config["model_type"], {})
    # Wan 2.2's picture-to-video has no picture embeddings: by its layers it is text-to-video with more channels.
    yield "Wan 2.2 I2V", plain, {"in_dim": 36}


RELATIVES = {name: (config, sizes) for name, config, sizes in relatives()}


def of_kind(name):
    config, sizes = RELATIVES[name]
    config = config({**SIZES, "in_dim": 16, "out_dim": 16, **config.unet_config, **sizes})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device="meta"), cpu, cpu)


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_refused_by_name(bench, name):
    model = of_kind(name)
    if name in ("WAN21_T2V", "WAN21_CausalAR_T2V"):
        assert bench.empty_memory(model).memory.num_frames == 0
        return
    with pytest.raises(ValueError) as refusal:
        bench.empty_memory(model)
    message = str(refusal.value)
    assert message.startswith("model: WAN") and "Wan 2.1 text-to-video student" in message
    words = {"WAN21_Vace": "WAN21_Vace is not", "WAN22_T2V": "WAN22 is not"}
    words |= dict.fromkeys(("WAN21_I2V", "Wan 2.2 I2V"), "36 input channels")
    assert words.get(name, "") in message


def test_there_are_relatives():
    assert len(RELATIVES) >= 17 and {"WAN21_Vace", "WAN22_T2V", "WAN21_I2V"} <= set(RELATIVES)


def test_rows_of_a_prompt(bench):
    """Zero rows behind a prompt count."""
    model, text = bench.load(), bench.positive[0][0]
    first = bench.plain[:, :, :3]
    short, _ = bench.run(model, chunks=1, positive=[[text[:, :7], {}]])
    other, _ = bench.run(model, chunks=1, positive=[[text[:, :6], {}]])
    assert difference(short, first) < ROUNDING < difference(other, first)


def test_too_many_rows_are_refused(bench):
    with pytest.raises(ValueError, match="^text: 513 rows; it must be 512 at most"):
        bench.run(bench.load(), chunks=1, positive=[[torch.ones(1, 513, 4096), {}]])
