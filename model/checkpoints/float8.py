"""ComfyUI's scaled float8: the scale of `X.weight` is stored beside it.

Older files have `scaled_fp8` once, `X.scale_weight` and `X.scale_input`; newer ones `X.comfy_quant` or the metadata key
`_quantization_metadata`, `X.weight_scale` and `X.input_scale`. Scales of inputs are not used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...memory.fields import json_object

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALES = ("scale_weight", "weight_scale")
MARKS = ("scaled_fp8", *SCALES, "scale_input", "input_scale", "weight_scale_2", "comfy_quant")
"""Last parts of the names of tensors that describe quantised weights."""


def split_scales(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], where: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the scales of float8 weights by the weight's name; no scales if nothing in the file is scaled.

    Raises ValueError, beginning with `where`, for another quantisation, a missing scale, and one that fits no weight.
    """
    weights = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in MARKS}
    marks = sorted(state.keys() - weights.keys() - {"scaled_fp8"})
    scales, formats = {}, {}
    layers = json_object(metadata.get("_quantization_metadata", "{}"), where).get("layers", {})
    for stem, layer in layers.items() if isinstance(layers, dict) else [("_quantization_metadata", layers)]:
        formats[stem] = layer.get("format") if isinstance(layer, dict) else layer
    for name in marks:
        stem, _, mark = name.rpartition(".")
        if mark == "comfy_quant":
            text = bytes(state[name].flatten().to(torch.uint8).tolist()).decode(errors="replace")
            formats[stem] = json_object(text, f"{where}: {name}").get("format")
        if f"{stem}.weight" not in weights:
            raise ValueError(f"{where}: {name} belongs to no weight; download the file again")
        if mark in SCALES:
            scales[f"{stem}.weight"] = state[name]
    for stem, name in formats.items():
        if name not in FORMATS:
            raise ValueError(
                f"{where}: {stem} is quantised as {name}, which only ComfyUI reads; give fp16, bf16 or fp8"
            )
    if len(weights) == len(state) and not formats:
        return weights, {}
    for name, tensor in weights.items():
        is_float8, dtype = tensor.dtype in FORMATS.values(), str(tensor.dtype).removeprefix("torch.")
        if is_float8 != (name in scales):
            problem = "has no scale" if is_float8 else f"is {dtype} and has a scale"
            raise ValueError(f"{where}: {name} {problem}; download the file again")
        if is_float8 and scales[name].numel() not in (1, len(tensor)):
            raise ValueError(f"{where}: {name} has {scales[name].numel()} scales; one, or one a row, are supported")
    return weights, scales


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight times its scale, in float32; the weight as it is without a scale."""
    if scale is None:
        return weight
    shape = [-1, *[1] * (weight.ndim - 1)] if scale.numel() > 1 else []
    return weight.float() * scale.to(weight.device).float().reshape(shape)
