"""LoRAs of ComfyUI's own loaders give the latents of merged weights, and a memory goes on with another LoRA."""

import pytest
import torch
from bench import ROUNDING, SIZES, difference
from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly
from conftest import CHECKOUT

import nodes

LAYERS = ("self_attn.q", "cross_attn.k", "ffn.0")
STRENGTH, SECOND = 0.8, -0.5


class Lora:
    """A random low-rank change of some layers."""

    def __init__(self, bench, seed):
        generator = torch.Generator().manual_seed(seed)
        make = lambda *size: torch.randn(size, generator=generator) * 0.02
        self.parts = {}
        for layer in (f"blocks.{block}.{name}" for block in range(SIZES["num_layers"]) for name in LAYERS):
            rows, columns = bench.state[f"{layer}.weight"].shape
            self.parts[layer] = (make(4, columns), make(rows, 4))

    def in_layout(self, prefix, down, up, alpha=None, dots="."):
        """The tensors of a file in one of the published layouts of names."""
        out = {}
        for layer, (a, b) in self.parts.items():
            name = prefix + layer.replace(".", dots)
            out |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
            if alpha is not None:
                out[f"{name}.alpha"] = torch.tensor(alpha)
        return out

    def merged(self, state, strength):
        change = {f"{layer}.weight": strength * b @ a for layer, (a, b) in self.parts.items()}
        return {key: value + change.get(key, 0) for key, value in state.items()}


def with_lora(bench, model, lora, strength=STRENGTH, node=nodes.LoraLoaderModelOnly, name="lora.safetensors"):
    return node().load_lora_model_only(model, bench.save(name, lora), strength)[0]


@pytest.fixture(scope="module")
def model(bench):
    return bench.load()


@pytest.fixture(scope="module")
def lora(bench):
    return Lora(bench, 1)


@pytest.fixture(scope="module")
def expected(bench, lora):
    latents, _ = bench.headless(lora.merged(bench.state, STRENGTH))
    assert difference(latents, bench.plain) > 1e-3
    return latents


@pytest.mark.parametrize(
    "layout",
    [
        ("diffusion_model.", "lora_A", "lora_B"),
        ("lora_unet_", "lora_down", "lora_up", 4.0, "_"),
        ("lora_unet__", "lora_down", "lora_up", 4.0, "_"),
    ],
    ids=["peft", "kohya", "wan fun"],
)
def test_every_layout_equals_merged_weights(bench, model, lora, expected, layout):
    latents, after = bench.run(with_lora(bench, model, lora.in_layout(*layout), name=f"{layout[0]}.safetensors"))
    assert difference(latents, expected) < ROUNDING and after.memory.student == bench.student


def test_the_bypass_loader_equals_merged_weights(bench, model, lora, expected):
    file = lora.in_layout("diffusion_model.", "lora_A", "lora_B")
    latents, _ = bench.run(with_lora(bench, model, file, node=LoraLoaderBypassModelOnly))
    assert difference(latents, expected) < ROUNDING


def test_the_layout_that_comfyui_does_not_read_is_as_the_help_page_says(bench, model, lora):
    file = lora.in_layout("base_model.model.", "lora_A", "lora_B")
    latents, after = bench.run(with_lora(bench, model, file))
    assert difference(latents, bench.plain) == 0 and after.memory.student == bench.student
    page = (CHECKOUT / "web" / "docs" / "ContextForcingStudentSettings.md").read_text()
    assert "`base_model.model.`" in page and "convert --lora" in page


def test_a_memory_goes_on_with_other_loras(bench, model, lora):
    """Two LoRAs at once, then none: nothing of a LoRA stays in the network."""
    second = Lora(bench, 2)
    peft = ("diffusion_model.", "lora_A", "lora_B")
    both = with_lora(bench, model, lora.in_layout(*peft), name="one.safetensors")
    both = with_lora(bench, both, second.in_layout(*peft), SECOND, name="two.safetensors")
    expected, _ = bench.headless(second.merged(lora.merged(bench.state, STRENGTH), SECOND))
    latents, after = bench.run(both)
    assert difference(latents, expected) < ROUNDING and after.memory.student == bench.student
    _, after = bench.run(both, after, chunks=1)
    _, after = bench.run(model, after, chunks=1)
    assert after.memory.num_frames == 15 and after.memory.student == bench.student
    latents, after = bench.run(model)
    assert difference(latents, bench.plain) < ROUNDING and after.memory.student == bench.student
