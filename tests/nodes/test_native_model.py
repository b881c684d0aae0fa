"""Our sampler on whatever ComfyUI MODEL holds Wan 2.1 text-to-video, against the headless one on the same weights."""

import json
import subprocess
from pathlib import Path

import pytest

from .host import CHECKOUT

pytestmark = [pytest.mark.host, pytest.mark.slow]

ROUNDING = 1e-5
"""Float32 sums in another order, over three chunks of four steps. A LoRA of these tests moves latents by 6e-3."""


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory) -> dict:
    """What native_model_check.py saw, in one process of ComfyUI's Python."""
    script = Path(__file__).with_name("native_model_check.py")
    done = subprocess.run(
        [comfyui.python, script, comfyui.path, CHECKOUT, "My-Pack v1.0", tmp_path_factory.mktemp("models")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_loader_in_every_precision(found):
    files = found["files"]
    plain = {f"{dtype} {model}" for dtype in ("fp32", "fp16", "bf16") for model in ("WAN21", "WAN21_CausalAR")}
    assert set(files) == plain | {"fp8_e4m3fn", "fp8_e5m2"}
    for name, case in files.items():
        assert case["difference"] < ROUNDING and case["same student"], name
    assert files["fp8_e4m3fn"]["weight"] == "torch.float8_e4m3fn" and files["fp8_e5m2"]["weight"] == "torch.float8_e5m2"


def test_loras_in_every_spelling_equal_merged_weights(found):
    loras = found["loras"]
    assert loras["effect"] > 1e-3
    for name in ("peft", "kohya", "wan fun", "bypass", "two", "none again"):
        assert loras[name]["difference"] < ROUNDING, name


def test_a_memory_goes_on_with_another_lora(found):
    students = {case["student"] for case in found["loras"].values() if isinstance(case, dict) and "student" in case}
    assert len(students) == 1
    assert found["loras"]["changed on the way"]["frames"] == 15


def test_the_spelling_that_comfyui_does_not_read_is_as_the_help_page_says(found):
    assert found["loras"]["not read"]["difference"] == 0
    page = (CHECKOUT / "web" / "docs" / "ContextForcingStudentSettings.md").read_text()
    assert "`base_model.model.`" in page and "convert --lora" in page


def test_weights_cast_as_they_are_used(found):
    offloaded, student = found["offloaded"], found["loras"]["peft"]["student"]
    assert offloaded["all"]["cast"] == 6 and offloaded["all"]["changed in place"] == 0
    assert offloaded["half"]["cast"] and offloaded["half"]["changed in place"], "some of both"
    for name in ("all", "half"):
        assert offloaded[name]["difference"] < ROUNDING and offloaded[name]["student"] == student, name
    assert offloaded["fp8 patch embedding"]["difference"] < ROUNDING


def test_scaled_weights(found):
    for name in ("old", "new"):
        case = found["quantised"][name]
        assert case["weight"] == "QuantizedTensor"
        assert case["difference"] < ROUNDING and case["same student"] and case["with a LoRA"], name
    # ComfyUI rounds what goes into these layers to int8 as well.
    assert found["quantised"]["int8"]["difference"] < 0.02 and found["quantised"]["int8"]["same student"]


def test_packed_weights(found):
    packed = found["packed"]
    assert packed["weight"] == "Packed" and packed["classes"] == ["Tensor"]
    assert packed["difference"] < ROUNDING and packed["same student"]


def test_blocks_compile_once(found):
    compiled = found["compiled"]
    assert compiled["difference"] < ROUNDING
    assert compiled["compiled"] == 3, "three parts of a block, for all blocks, chunks and lengths of the memory"
    assert compiled["compiled again"] == 0
    assert compiled["ignored"] == [] and len(compiled["graphs"]) == 1


def test_attention_of_other_nodes(found):
    attention = found["attention"]
    assert attention["difference"] < ROUNDING and attention["as started"] < ROUNDING
    assert attention["calls"] == 2 * 2 * 3 * 5, "self and cross, of two blocks, in three chunks of five passes"
    assert attention["calls of sdpa"] == 0 and len(attention["says"]) == 1


def test_settings_of_a_model_without_a_card(found):
    settings = found["settings"]
    assert settings["card"] == [[1000, 500], 3, "euler", 8, 12, 0, 3]
    assert settings["named"] == ["longlive", [1000, 500], 12, 0], "a published student's, steps replaced"
    assert settings["loader's own"], "the model that came in is as it was"
    assert settings["wrong steps"].startswith("steps: '1000, abc'")
    assert settings["wrong window"].startswith("window: sink 3 + slow 12 + fast 6")


def test_shift_and_dtype_of_other_nodes(found):
    settings = found["settings"]
    assert settings["shift"]["difference"] < ROUNDING and settings["shift"]["says"]
    # The patch embedding stays float32 in ComfyUI.
    assert settings["bf16"]["difference"] < 0.02 and settings["bf16"]["same student"]


def test_patches_without_effect_are_named(found):
    ignored = found["ignored"]
    for name in (
        "attn1_patch", "calc_cond_batch wrapper easycache", "diffusion_model wrapper easycache", "context_handler",
        "double_block_1 replacement", "object patch diffusion_model.blocks.0.cross_attn.forward", "rope_options",
        "sampler_post_cfg_function",
    ):  # fmt: skip
        assert name in ignored["says"]
    assert "norm_q" not in ignored["says"] and ignored["taken"] > 1e-3
    assert ignored["of a bare one"] == []


def test_relatives_are_refused_by_name(found):
    refused = dict(found["refused"])
    assert refused.pop("WAN21_T2V") == refused.pop("WAN21_CausalAR_T2V") == "taken"
    assert len(refused) >= 15
    for name, says in refused.items():
        assert says.startswith("model: WAN") and "Wan 2.1 text-to-video student" in says, name
    assert "WAN21_Vace is not" in refused["WAN21_Vace"] and "WAN22 is not" in refused["WAN22_T2V"]
    for name in ("WAN21_I2V", "Wan 2.2 I2V"):
        assert "36 input channels" in refused[name], name


def test_rows_of_a_prompt(found):
    prompts = found["prompts"]
    assert prompts["padding"] < ROUNDING < prompts["a row less"]
    assert prompts["refused"].startswith("text: 513 rows, the model takes 512 at most")
    assert prompts["says"] == ["positive: hooks of the conditioning has no effect in this sampler"]


def test_layouts_make_the_same_video(found):
    layouts = found["layouts"]
    assert layouts["by layer"] and layouts["from RAM"]
    assert len(layouts["says"]) == 1 and "from RAM" in layouts["says"][0]
