"""Key layouts of published checkpoints -> Wan's own names (method.md 1.5, 2.2, 2.3), and what is no student at all.

A stem is a name without `.weight` or `.bias`. Shapes are the same in all layouts, nothing is transposed.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put anywhere into a name."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
GAN_EXTRAS = ("_cls_pred_branch", "_register_tokens", "_gan_ca_blocks")
"""Parts of a discriminator that some trainers save along; no part of the student."""

DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
DIFFUSERS_BLOCK = {
    "scale_shift_table": "modulation",
    **{f"attn1.to_{part}": f"self_attn.{part}" for part in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    **{f"attn1.norm_{part}": f"self_attn.norm_{part}" for part in "qk"},
    **{f"attn2.to_{part}": f"cross_attn.{part}" for part in "qkv"},
    "attn2.to_out.0": "cross_attn.o",
    **{f"attn2.norm_{part}": f"cross_attn.norm_{part}" for part in "qk"},
    "norm2": "norm3",  # the one with weights, before cross-attention; diffusers' norm3 has none
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
FASTVIDEO = {
    "patch_embedding.proj": "patch_embedding",
    "condition_embedder.text_embedder.fc_in": "text_embedding.0",
    "condition_embedder.text_embedder.fc_out": "text_embedding.2",
    "condition_embedder.time_embedder.mlp.fc_in": "time_embedding.0",
    "condition_embedder.time_embedder.mlp.fc_out": "time_embedding.2",
    "condition_embedder.time_modulation.linear": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
FASTVIDEO_BLOCK = {
    "scale_shift_table": "modulation",
    **{f"to_{part}": f"self_attn.{part}" for part in "qkv"},
    "to_out": "self_attn.o",
    **{f"norm_{part}": f"self_attn.norm_{part}" for part in "qk"},
    **{f"attn2.to_{part}": f"cross_attn.{part}" for part in "qkv"},
    "attn2.to_out": "cross_attn.o",
    **{f"attn2.norm_{part}": f"cross_attn.norm_{part}" for part in "qk"},
    "self_attn_residual_norm.norm": "norm3",
    "ffn.fc_in": "ffn.0",
    "ffn.fc_out": "ffn.2",
}
LAYOUTS = {"diffusers": (DIFFUSERS, DIFFUSERS_BLOCK), "FastVideo": (FASTVIDEO, FASTVIDEO_BLOCK)}

ONLY = "only text-to-video Wan 2.1 (16 channels) can be rolled out"
UNSUPPORTED = (
    ("quantized_weight", "quantised as LongLive-2's NVFP4 files are", f"{ONLY}, and not quantised like this"),
    ("vace_", "a VACE model", ONLY),
    *((part, "an image-to-video model", ONLY) for part in ("img_emb.", "k_img", "image_embedder.", "add_k_proj")),
    *((part, f"a Wan model with inputs of its own ({part.strip('._')})", ONLY) for part in (
        "control_adapter.", "audio_proj.", "casual_audio_encoder.", "face_adapter.", "ref_conv.",
        "patch_embedding_pose.", "patch_embedding_mask.", "patch_embedding_global.", "to_gate_compress.",
    )),
    *((part, "a LoRA", "give it beside the student it belongs to: --lora, or ComfyUI's Load LoRA (Model)")
      for part in ("lora_A.", "lora_B.", "lora_down.", "lora_up.")),
    *((part, "a text encoder", "give the student; encoders go into models/text_encoders")
      for part in ("encoder.block.", "shared.weight", "token_embedding.weight")),
    *((part, "a VAE", "give the student; VAEs go into models/vae")
      for part in ("decoder.conv1.", "decoder.conv_in.", "decoder.middle.")),
)  # fmt: skip
"""A part of a name that gives away what else a file is, what that is, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint's tensors under Wan's names, as stored."""

    layout: str
    removed: tuple[str, ...]
    """Prefixes and wrappers that were in the names."""
    tensors: dict[str, Tensor]
    scales: dict[str, Tensor]
    """What a float8 weight is multiplied by, by the weight's name."""


def plain_name(name: str) -> tuple[str, list[str]]:
    """A name without wrappers and prefixes, and those it had."""
    removed = [wrapper for wrapper in WRAPPERS if wrapper in name]
    for wrapper in removed:
        name = name.replace(wrapper, "")
    for prefixes in (("module.",), PREFIXES):
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        name, removed = name.removeprefix(prefix), removed + [prefix] * bool(prefix)
    return name, removed


def layout_of(names: Iterable[str]) -> str:
    """Whose names these are: Wan, diffusers or FastVideo."""
    names = list(names)
    if any(re.search(r"condition_embedder\.|(^|\.)attn[12]\.|patch_embedding\.proj\.", name) for name in names):
        fast = re.compile(r"patch_embedding\.proj\.|\.fc_(in|out)\.|blocks\.\d+\.to_[qkvo]")
        return "FastVideo" if any(fast.search(name) for name in names) else "diffusers"
    return "Wan"


def wan_stem(stem: str, layout: str) -> str | None:
    """A stem under Wan's name, None for one that the layout does not have."""
    if layout == "Wan":
        return stem
    top, block = LAYOUTS[layout]
    if inside := re.fullmatch(r"(blocks\.\d+\.)(.+)", stem):
        return inside[1] + block[inside[2]] if inside[2] in block else None
    return top.get(stem)


def wan_name(name: str, layout: str) -> str | None:
    """A tensor's name as Wan has it, None for one that the layout does not have."""
    if (whole := wan_stem(name, layout)) is not None:
        return whole
    stem, _, leaf = name.rpartition(".")
    stem = wan_stem(stem, layout)
    return None if stem is None else f"{stem}.{leaf}"


def name_tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: object) -> Named:
    """Tensors of any known layout under Wan's names; scales of float8 weights apart from them.

    Raises ValueError, one line that begins with `where`, for what is not a Wan 2.1 text-to-video network.
    """
    plain, removed = {}, []
    for name, tensor in state.items():
        if any(extra in name for extra in GAN_EXTRAS):
            continue
        short, had = plain_name(name)
        if short in plain:
            raise ValueError(f"{where}: holds {short} twice, under different prefixes; give one network a file")
        plain[short] = tensor
        removed += [part for part in had if part not in removed]
    refuse_unsupported(plain, where)
    layout = layout_of(plain)
    tensors, quantised = {}, {}
    for name, tensor in plain.items():
        wan = name if name == "scaled_fp8" else wan_name(name, layout)
        if wan is None:
            raise ValueError(f"{where}: {name} has no place in the {layout} layout of a Wan 2.1 model; {ONLY}")
        kind = wan.rpartition(".")[2]
        (quantised if kind in QUANTISED else tensors)[wan] = tensor
    return Named(
        layout=layout, removed=tuple(removed), tensors=tensors, scales=_scales(tensors, quantised, metadata, where)
    )


QUANTISED = (
    "scaled_fp8", "scale_weight", "scale_input", "weight_scale", "input_scale", "weight_scale_2", "comfy_quant",
)  # fmt: skip
"""What ComfyUI keeps beside quantised weights, in its older (scale_weight) and its newer spelling."""
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def _scales(
    tensors: dict[str, Tensor], quantised: dict[str, Tensor], metadata: Mapping[str, str], where: object
) -> dict[str, Tensor]:
    """The scale of every float8 weight; none where nothing says that there are scales (method.md 7, 21)."""
    scales = {}
    for name, tensor in quantised.items():
        stem, _, kind = name.rpartition(".")
        if kind == "comfy_quant":
            _check_format(bytes(tensor.flatten().to(torch.uint8).tolist()), where, stem)
        if kind != "scaled_fp8" and f"{stem}.weight" not in tensors:
            raise ValueError(f"{where}: {name} belongs to no weight; the file is damaged, download it again")
        if kind in ("scale_weight", "weight_scale"):
            scales[f"{stem}.weight"] = tensor
    layers = _layers(metadata, where)
    for stem, about in layers.items():
        _check_format(json.dumps(about).encode(), where, stem)
    if not quantised and not layers:
        return {}
    for name, tensor in tensors.items():
        small = tensor.dtype in FLOAT8.values()
        if small != (name in scales):
            problem = "has no scale" if small else f"is {str(tensor.dtype).removeprefix('torch.')} and has a scale"
            raise ValueError(f"{where}: {name} {problem}; the file is damaged, download it again")
        if small and scales[name].numel() not in (1, tensor.shape[0]):
            raise ValueError(f"{where}: {name} has {scales[name].numel()} scales; one, or one a row, can be read")
    return scales


def _layers(metadata: Mapping[str, str], where: object) -> dict:
    try:
        return dict(json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {}))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{where}: its _quantization_metadata cannot be read; download it again") from None


def _check_format(text: bytes, where: object, stem: str) -> None:
    try:
        kind = json.loads(text).get("format")
    except (ValueError, AttributeError):
        kind = None
    if kind not in FLOAT8:
        raise ValueError(
            f"{where}: {stem} is quantised as {kind}, which only ComfyUI reads; use Load Diffusion Model, our sampler"
            " takes its MODEL"
        )


def refuse_unsupported(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises ValueError, one line that says what the file is, for other models than Wan 2.1 text-to-video."""
    for part, what, remedy in UNSUPPORTED:
        if found := next((name for name in tensors if part in name), None):
            raise ValueError(f"{where}: {what} ({found}); {remedy}")
    for name in ("patch_embedding.weight", "patch_embedding.proj.weight"):
        channels = tensors[name].shape[1] if name in tensors and tensors[name].ndim == 5 else 16
        what = {36: "an image-to-video model", 48: "a Wan 2.2 5B model, of another latent space,"}.get(channels)
        if channels != 16:
            raise ValueError(f"{where}: {what or 'a Wan model'} with {channels} input channels; {ONLY}")
