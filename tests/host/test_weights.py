"""Weights as ComfyUI's loaders keep them: every precision, quantised, packed, cast as they are used."""

import contextlib
import json

import comfy.model_management as mm
import pytest
import torch
from bench import FP8, ROUNDING, difference
from test_lora import STRENGTH, Lora, with_lora

CAUSAL = {"config": json.dumps({"transformer": {"causal_ar": True}})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stock_loader_in_every_precision(bench, dtype):
    stored = {key: value.to(dtype) for key, value in bench.state.items()}
    expected, memory = bench.headless(stored)
    for metadata, name in ((None, "WAN21"), (CAUSAL, "WAN21_CausalAR")):
        model = bench.load(stored, metadata)
        assert type(model.model).__name__ == name
        latents, after = bench.run(model)
        assert difference(latents, expected) < ROUNDING and after.memory.student == memory.student


@pytest.mark.parametrize("weight_dtype, dtype", [("fp8_e4m3fn", FP8), ("fp8_e5m2", torch.float8_e5m2)])
def test_the_stock_loader_converts_to_float8(bench, weight_dtype, dtype):
    stored = {key: value if key.startswith("patch_emb") else value.to(dtype) for key, value in bench.state.items()}
    expected, memory = bench.headless(stored)
    model = bench.load(weight_dtype=weight_dtype)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == dtype
    latents, after = bench.run(model)
    assert difference(latents, expected) < ROUNDING and after.memory.student == memory.student


@contextlib.contextmanager
def room_for(num_bytes):
    """ComfyUI loads models as where so many bytes of weights fit: the others are cast as they are used."""

    def load(models, memory_required=0):
        for model in models:
            model.patch_model(model.load_device, lowvram_model_memory=num_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "load_models_gpu", load)
        yield


@pytest.mark.parametrize("share", [0, 0.5])
def test_weights_are_cast_as_they_are_used(bench, share):
    lora = Lora(bench, 1)
    expected, _ = bench.headless(lora.merged(bench.state, STRENGTH))
    model = with_lora(bench, bench.load(), lora.in_layout("diffusion_model.", "lora_A", "lora_B"))
    with room_for(share * sum(value.nbytes for value in bench.state.values()) or 0.1):
        latents, after = bench.run(model)
    assert difference(latents, expected) < ROUNDING and after.memory.student == bench.student
    cast = sum(bool(getattr(module, "weight_function", ())) for module in model.model.modules())
    assert (cast, len(model.backup)) == (6, 0) if not share else cast and model.backup, "some of both"
    model.detach()


def test_a_float8_patch_embedding(bench):
    """Some loaders keep a file's own tensors, whatever dtype ComfyUI gave the layer."""
    model = bench.load(weight_dtype="fp8_e4m3fn")
    patch = model.model.diffusion_model.patch_embedding
    patch.weight = torch.nn.Parameter(patch.weight.to(FP8), requires_grad=False)
    with room_for(0.1):
        latents, _ = bench.run(model)
    kept = {"patch_embedding.bias": bench.state["patch_embedding.bias"]}
    expected, _ = bench.headless({key: value.to(FP8) for key, value in bench.state.items()} | kept)
    assert difference(latents, expected) < ROUNDING


def linear_layers(bench):
    return [
        key.removesuffix(".weight")
        for key, value in bench.state.items()
        if key.startswith("blocks") and value.ndim == 2
    ]


def quantise(bench, largest, pack):
    """(scale, packed weights) of every linear layer, and the state dict that they stand for."""
    weights = {layer: bench.state[f"{layer}.weight"] for layer in linear_layers(bench)}
    scale = {layer: weight.abs().max() / largest for layer, weight in weights.items()}
    packed = {layer: pack(weight / scale[layer]) for layer, weight in weights.items()}
    real = {f"{layer}.weight": packed[layer].float() * scale[layer] for layer in weights}
    return scale, {f"{layer}.weight": value for layer, value in packed.items()}, bench.state | real


def quantization_metadata(layers, form):
    return {"_quantization_metadata": json.dumps({"layers": {layer: {"format": form} for layer in layers}})}


@pytest.mark.parametrize("layout", ["scaled_fp8", "weight_scale"])
def test_scaled_float8(bench, layout):
    scale, weights, real = quantise(bench, 448, lambda weight: weight.to(FP8))
    expected, memory = bench.headless(real)
    if layout == "scaled_fp8":
        extra = {f"{layer}.scale_weight": scale[layer] for layer in scale} | {"scaled_fp8": torch.zeros(2, dtype=FP8)}
        metadata = None
    else:
        extra = {f"{layer}.weight_scale": scale[layer] for layer in scale}
        extra |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in scale}
        metadata = quantization_metadata(scale, "float8_e4m3fn")
    model = bench.load(bench.state | weights | extra, metadata)
    latents, after = bench.run(model)
    assert type(model.model.diffusion_model.blocks[0].ffn[0].weight).__name__ == "QuantizedTensor"
    assert difference(latents, expected) < ROUNDING and after.memory.student == memory.student
    lora = Lora(bench, 1).in_layout("diffusion_model.", "lora_A", "lora_B")
    changed, after = bench.run(with_lora(bench, model, lora), after, chunks=1)
    assert after.memory.student == memory.student and changed.isfinite().all()


def test_int8(bench):
    scale, weights, real = quantise(bench, 127, lambda weight: weight.round().to(torch.int8))
    expected, memory = bench.headless(real)
    scales = {f"{layer}.weight_scale": scale[layer] for layer in scale}
    model = bench.load(bench.state | weights | scales, quantization_metadata(scale, "int8_tensorwise"))
    latents, after = bench.run(model)
    # ComfyUI rounds the inputs of these layers to int8 as well.
    assert difference(latents, expected) < 0.02 and after.memory.student == memory.student


class Packed(torch.Tensor):
    """A weight as ComfyUI-GGUF keeps it: bytes with the unpacked shape; results of operations have its class."""

    @classmethod
    def of(cls, tensor, shape=None):
        packed = tensor.as_subclass(cls)
        packed.unpacked = shape or tensor.shape
        return packed

    @property
    def shape(self):
        return self.__dict__.get("unpacked", self.size())

    def to(self, *args, **kwargs):
        return Packed.of(super().to(*args, **kwargs), self.shape)

    def detach(self):
        return self


class PackedLinear(torch.nn.Module):
    """A layer that unpacks its weight when it is used."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.abs().max() / 127
        packed = ((linear.weight / self.scale).round() + 128).to(torch.uint8).flatten()
        self.weight = torch.nn.Parameter(Packed.of(packed, linear.weight.shape), requires_grad=False)

    def unpacked(self):
        return (self.weight.as_subclass(torch.Tensor).float() - 128).view(self.weight.shape) * self.scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.unpacked(), self.bias).as_subclass(torch.Tensor)


def test_packed_weights(bench):
    """As ComfyUI-GGUF keeps them; the pack itself was tried by hand with Q8_0, Q5_1, Q4_0 and BF16 files."""
    model = bench.load()
    net, real = model.model.diffusion_model, dict(bench.state)
    for layer in linear_layers(bench):
        parent, _, name = layer.rpartition(".")
        packed = PackedLinear(net.get_submodule(layer))
        setattr(net.get_submodule(parent), name, packed)
        real[f"{layer}.weight"] = packed.unpacked()
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if "norm" in type(module).__name__.lower() or name == "modulation":
                module.register_parameter(name, torch.nn.Parameter(Packed.of(parameter.data), requires_grad=False))
    assert type(net.blocks[0].ffn[0].weight) is Packed
    expected, _ = bench.headless(real)
    latents, first = bench.run(model)
    _, second = bench.run(model, first, chunks=1)
    assert difference(latents, expected) < ROUNDING and first.memory.student == second.memory.student
    assert {type(tensor) for tensor in (*first.memory.tensors(), latents)} == {torch.Tensor}
