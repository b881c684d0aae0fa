"""Key layouts of published checkpoints -> Wan's own names (docs/method.md, Checkpoints); other models are refused.

A stem is a name without `.weight` or `.bias`. Shapes are the same in all layouts; nothing is transposed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .float8 import split_scales

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile insert anywhere in a name."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
DISCRIMINATOR = ("_cls_pred_branch", "_register_tokens", "_gan_ca_blocks")
"""Parts of a GAN discriminator that some trainers save with the student."""

COMMIT = "memory_"
"""Begins the last part of a block's name, or the whole name outside the blocks, where SGF+ has weights for the commit
pass beside those of denoising."""

STEMS = {
    # Wan: (diffusers, FastVideo)
    "patch_embedding": ("patch_embedding", "patch_embedding.proj"),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.fc_in"),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", "condition_embedder.text_embedder.fc_out"),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.mlp.fc_in"),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2", "condition_embedder.time_embedder.mlp.fc_out"),
    "time_projection.1": ("condition_embedder.time_proj", "condition_embedder.time_modulation.linear"),
    "head.head": ("proj_out", "proj_out"),
    "head.modulation": ("scale_shift_table", "scale_shift_table"),
}
BLOCK_STEMS = {
    "modulation": ("scale_shift_table", "scale_shift_table"),
    **{f"self_attn.{part}": (f"attn1.to_{part}", f"to_{part}") for part in "qkv"},
    "self_attn.o": ("attn1.to_out.0", "to_out"),
    **{f"self_attn.norm_{part}": (f"attn1.norm_{part}", f"norm_{part}") for part in "qk"},
    **{f"cross_attn.{part}": (f"attn2.to_{part}", f"attn2.to_{part}") for part in "qkv"},
    "cross_attn.o": ("attn2.to_out.0", "attn2.to_out"),
    **{f"cross_attn.norm_{part}": (f"attn2.norm_{part}", f"attn2.norm_{part}") for part in "qk"},
    # The affine norm before cross-attention; diffusers' norm3 has no weights.
    "norm3": ("norm2", "self_attn_residual_norm.norm"),
    "ffn.0": ("ffn.net.0.proj", "ffn.fc_in"),
    "ffn.2": ("ffn.net.2", "ffn.fc_out"),
}
LAYOUTS = {
    layout: ({names[i]: wan for wan, names in STEMS.items()}, {names[i]: wan for wan, names in BLOCK_STEMS.items()})
    for i, layout in enumerate(("diffusers", "FastVideo"))
}
"""Stems outside and inside the blocks -> Wan's, by layout."""

SUPPORTED = "only text-to-video Wan 2.1 (16 channels) is supported"
OTHER_MODELS = {
    ("quantized_weight",): ("quantised like LongLive-2's NVFP4 files", f"{SUPPORTED}, without this quantisation"),
    ("vace_",): ("a VACE model", SUPPORTED),
    ("img_emb.", "k_img", "image_embedder.", "add_k_proj"): ("an image-to-video model", SUPPORTED),
    (
        "control_adapter.", "audio_proj.", "casual_audio_encoder.", "face_adapter.", "ref_conv.", "to_gate_compress.",
        "patch_embedding_pose.", "patch_embedding_mask.", "patch_embedding_global.",
    ): ("a Wan model with other inputs than text", SUPPORTED),
    ("lora_A.", "lora_B.", "lora_down.", "lora_up."): (
        "a LoRA", "give its student, and this file as --lora or to ComfyUI's Load LoRA (Model)"),
    ("encoder.block.", "shared.weight", "token_embedding.weight"): (
        "a text encoder", "give the student; text encoders belong in models/text_encoders"),
    ("decoder.conv1.", "decoder.conv_in.", "decoder.middle."): (
        "a VAE", "give the student; VAEs belong in models/vae"),
}  # fmt: skip
"""Parts of names that only another model has: what it is, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint's tensors under Wan's names, as stored."""

    layout: str
    removed: tuple[str, ...]
    """Prefixes and wrappers that were removed from the names."""
    tensors: dict[str, Tensor]
    scales: dict[str, Tensor]
    """Factors of float8 weights, by the weight's name."""
    commit: dict[str, Tensor]
    """The network of the commit pass under Wan's names, as stored; empty if `tensors` is used for it too."""


def plain_name(name: str) -> tuple[str, list[str]]:
    """A name without wrappers and prefixes, and those removed."""
    removed = [wrapper for wrapper in WRAPPERS if wrapper in name]
    for wrapper in removed:
        name = name.replace(wrapper, "")
    for prefixes in (("module.",), PREFIXES):
        if prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
            removed.append(prefix)
    return name, removed


def layout_of(names: Iterable[str]) -> str:
    """The layout that names have: Wan, diffusers or FastVideo."""
    text = "\n".join(names)
    if not re.search(r"condition_embedder\.|(^|\.)attn[12]\.|patch_embedding\.proj\.", text, re.MULTILINE):
        return "Wan"
    is_fast = re.search(r"patch_embedding\.proj\.|\.fc_(in|out)\.|blocks\.\d+\.to_[qkvo]", text)
    return "FastVideo" if is_fast else "diffusers"


def wan_stem(stem: str, layout: str) -> str | None:
    """A stem under Wan's name; None if the layout has no such stem."""
    if layout == "Wan":
        return stem
    outer, inner = LAYOUTS[layout]
    if block := re.fullmatch(r"(blocks\.\d+\.)(.+)", stem):
        return block[1] + inner[block[2]] if block[2] in inner else None
    return outer.get(stem)


def wan_name(name: str, layout: str) -> str | None:
    """A tensor's name as Wan has it; None if the layout has no such name."""
    if (whole := wan_stem(name, layout)) or name == "scaled_fp8":
        return whole or name
    stem, _, leaf = name.rpartition(".")
    stem = wan_stem(stem, layout)
    return stem and f"{stem}.{leaf}"


def commit_name(name: str) -> str:
    """The name in a file of a weight of the commit pass: blocks.0.norm3.memory_bias, memory_head.head.bias."""
    stem, dot, leaf = name.rpartition(".") if name.startswith("blocks.") else ("", "", name)
    return f"{stem}{dot}{COMMIT}{leaf}"


def split_commit(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of denoising, and those of the commit pass without their mark (commit_name)."""
    marked = {name: re.sub(rf"(^|(?<=\.)){COMMIT}", "", name, count=1) for name in state}
    commit = {short: state[name] for name, short in marked.items() if short != name}
    return {name: state[name] for name, short in marked.items() if short == name}, commit


def name_tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: object) -> Named:
    """Tensors of any known layout under Wan's names; scales of float8 weights apart from them.

    Raises ValueError, one line that begins with `where`, for what is not a Wan 2.1 text-to-video network.
    """
    plain, removed = {}, {}
    for name, tensor in state.items():
        if not any(part in name for part in DISCRIMINATOR):
            short, parts = plain_name(name)
            if short in plain:
                raise ValueError(f"{where}: holds {short} twice, under different prefixes; give one network per file")
            plain[short] = tensor
            removed |= dict.fromkeys(parts)
    check_supported(plain, where)
    plain, commit = split_commit(plain)
    layout, named = layout_of(plain), {}
    for name, tensor in plain.items():
        if (wan := wan_name(name, layout)) is None:
            raise ValueError(f"{where}: {name} is not part of a Wan 2.1 model in {layout} layout; {SUPPORTED}")
        named[wan] = tensor
    tensors, scales = split_scales(named, metadata, where)
    return Named(layout=layout, removed=tuple(removed), tensors=tensors, scales=scales, commit=commit)


def check_supported(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises ValueError, one line with what the file is, for other models than Wan 2.1 text-to-video."""
    for parts, (model, remedy) in OTHER_MODELS.items():
        if name := next((name for name in tensors if any(part in name for part in parts)), None):
            raise ValueError(f"{where}: {model} ({name}); {remedy}")
    for name in ("patch_embedding.weight", "patch_embedding.proj.weight"):
        channels = tensors[name].shape[1] if name in tensors and tensors[name].ndim == 5 else 16
        if channels != 16:
            model = {36: "an image-to-video model", 48: "a Wan 2.2 5B model"}.get(channels, "a Wan model")
            raise ValueError(f"{where}: {model} with {channels} input channels; {SUPPORTED}")
