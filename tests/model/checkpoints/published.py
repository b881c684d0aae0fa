"""Published files at small width: the rows of docs/students.md, Published files, and other layouts."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.model.checkpoints.student import StudentSource

SIZES = dict(dim=16, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8)

TO_DIFFUSERS = [
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.o\.", ".attn1.to_out.0."),
    (r"\.self_attn\.([qkv])\.", r".attn1.to_\1."),
    (r"\.self_attn\.norm_", ".attn1.norm_"),
    (r"\.cross_attn\.o\.", ".attn2.to_out.0."),
    (r"\.cross_attn\.([qkv])\.", r".attn2.to_\1."),
    (r"\.cross_attn\.norm_", ".attn2.norm_"),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]
TO_FASTVIDEO = [
    (r"^patch_embedding\.", "patch_embedding.proj."),
    (r"linear_1\.", "fc_in."),
    (r"linear_2\.", "fc_out."),
    (r"time_embedder\.", "time_embedder.mlp."),
    (r"time_proj\.", "time_modulation.linear."),
    (r"\.attn1\.to_out\.0\.", ".to_out."),
    (r"\.attn1\.", "."),
    (r"\.attn2\.to_out\.0\.", ".attn2.to_out."),
    (r"\.norm2\.", ".self_attn_residual_norm.norm."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.fc_in."),
    (r"\.ffn\.net\.2\.", ".ffn.fc_out."),
]


def refused(path, **reading):
    """The message for a file that cannot be used."""
    with pytest.raises(ValueError) as caught:
        StudentSource(path, **reading).open()
    says = str(caught.value)
    assert "\n" not in says and len(says) < 700
    return says


def renamed(state, rules):
    out = {}
    for name, tensor in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        out[name] = tensor
    return out


def diffusers(state):
    return renamed(state, TO_DIFFUSERS)


def fastvideo(state):
    return renamed(diffusers(state), TO_FASTVIDEO)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def fsdp(state):
    """Names as FSDP's `named_parameters` gives them, wrapped at the root and around every block."""
    wrapped = lambda name: re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    return {f"model._fsdp_wrapped_module.{wrapped(name)}": tensor for name, tensor in state.items()}


def with_second_set(state, second):
    """A student whose commit pass has weights of its own, as SGF+ names them."""
    inside = lambda name: re.sub(r"([a-z]+)$", r"memory_\1", name)
    return state | {inside(name) if name.startswith("blocks") else f"memory_{name}": second[name] for name in second}


def cast(state, dtype):
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def other(state):
    """Another network of the same size: what must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


def quantise(state, spelling):
    """Linear weights of blocks as ComfyUI's scaled float8, and what they stand for."""
    stored, meant = {}, dict(state)
    for name, tensor in state.items():
        if not (name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight")):
            stored[name] = tensor.to(torch.bfloat16)
            continue
        stem, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        meant[name] = stored[name].float() * scale
        if spelling == "old":
            stored |= {f"{stem}.scale_weight": scale, f"{stem}.scale_input": torch.tensor(1.0)}
        else:
            about = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            stored |= {f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": about}
    return stored | ({"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if spelling == "old" else {}), meant


def parts(folder, state, stem="diffusion_pytorch_model", count=3):
    """Shards with their index."""
    names = list(state)
    part_of = lambda i: f"{stem}-{i * count // len(names) + 1:05d}-of-{count:05d}.safetensors"
    listed = {name: part_of(i) for i, name in enumerate(names)}
    folder.mkdir(parents=True, exist_ok=True)
    for part in set(listed.values()):
        save_file({name: state[name].contiguous() for name in names if listed[name] == part}, folder / part)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index


def diffusers_folder(root, state, architecture, scheduler):
    parts(root / "transformer", diffusers(state))
    heads = {"_class_name": architecture, "num_attention_heads": SIZES["num_heads"]}
    (root / "transformer" / "config.json").write_text(json.dumps(heads))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler}))
    return root


@dataclass(frozen=True)
class Row:
    """A published file: how it is made from a state dict, and how it has to be read."""

    name: str
    make: object
    """(folder, state) -> the path to give."""
    dtype: torch.dtype = torch.float32
    reading: tuple = ()
    card: str = "self-forcing"
    """The name of the card it gets."""


def flat(folder, state, name="model.safetensors", prefix=""):
    save_file(prefixed(state, prefix), folder / name)
    return folder / name


def comfyui_causal(folder, state):
    """As repackaged for ComfyUI's ar_video sampler: fp32 under Wan's names, marked as causal."""
    path = folder / "causal_forcing-framewise.safetensors"
    save_file(state, path, {"config": json.dumps({"transformer": {"causal_ar": True}})})
    return path


def pickled(folder, tree, name="model.pt"):
    torch.save(tree, folder / name)
    return folder / name


def official_folder(folder, state):
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": SIZES["num_heads"]}))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04 another file")
    flat(folder, state, "diffusion_pytorch_model.safetensors")
    return folder


LIVEWAN_OPTIONS = dict(out="checkpoints", fsdp=True, world=9, world_choices="3,6,9", rope_gap_max=240, lr_gen=2e-6)
"""Some of the training options that LiveWan's trainer writes beside the weights."""
BF16, FP16 = torch.bfloat16, torch.float16
ASKED = lambda card: (("card", card),)
ROWS = [
    Row("Wan 1.3B, a file", flat),
    Row("Wan 1.3B, its folder", official_folder, reading=ASKED("wan2.1-base"), card="wan2.1-base"),
    Row("Wan 14B, parts", lambda f, s: parts(f, s)),
    Row("Wan 14B, folder of parts", lambda f, s: parts(f, s).parent),
    Row("Wan 14B, one of the parts", lambda f, s: parts(f, s, "model").parent / "model-00002-of-00003.safetensors"),
    Row("ComfyUI fp16", lambda f, s: flat(f, cast(s, FP16)), FP16),
    Row("ComfyUI bf16", lambda f, s: flat(f, cast(s, BF16), prefix="diffusion_model."), BF16),
    Row("ComfyUI checkpoint", lambda f, s: flat(f, s, prefix="model.diffusion_model.")),
    Row("Wan Diffusers", lambda f, s: diffusers_folder(f, s, "WanTransformer3DModel", "UniPCMultistepScheduler"),
        reading=ASKED("wan2.1-base"), card="wan2.1-base"),
    Row("Self-Forcing", lambda f, s: pickled(f, {"generator_ema": prefixed(s, "model.")}, "self_forcing_dmd.pt")),
    Row("Self-Forcing, trainer's", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "critic": prefixed(other(s), "model."), "generator_ema": fsdp(s)})),
    Row("Self-Forcing, ode_init", lambda f, s: pickled(f, {"generator": prefixed(s, "model.")}, "ode_init.pt")),
    Row("Causal-Forcing", lambda f, s: pickled(f, {
        "generator": prefixed(s, "model."), "generator_ema": fsdp(other(s))}, "causal_forcing.pt"),
        reading=ASKED("causal-forcing"), card="causal-forcing"),
    Row("Causal-Forcing, framewise", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "generator_ema": fsdp(s)}),
        reading=ASKED("causal-forcing-framewise"), card="causal-forcing-framewise"),
    *(Row(f"Causal-Forcing++, {n} steps", lambda f, s: pickled(f, {"generator_ema": fsdp(s)}),
          reading=ASKED(f"causal-forcing-{n}step"), card=f"causal-forcing-{n}step") for n in (1, 2)),
    Row("Causal-Forcing, causal_ode", lambda f, s: pickled(f, {"generator": prefixed(s, "model.")}, "causal_ode.pt")),
    Row("Causal-Forcing, longvideo", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "generator_ema": prefixed(s, "model.")}, "longvideo.pt")),
    Row("Causal-Forcing, framewise, repackaged", comfyui_causal, card="causal-forcing-framewise"),
    Row("Self Gradient Forcing", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "critic": prefixed(other(s), "model."), "generator_ema": fsdp(s)}),
        reading=ASKED("self-gradient-forcing"), card="self-gradient-forcing"),
    Row("Self Gradient Forcing, framewise", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "generator_ema": prefixed(s, "model.")}),
        reading=ASKED("self-gradient-forcing-framewise"), card="self-gradient-forcing-framewise"),
    Row("Self Gradient Forcing Plus", lambda f, s: pickled(f, {
        "generator": prefixed(with_second_set(other(s), s), "model."),
        "generator_ema": prefixed(with_second_set(s, other(s)), "model._fsdp_wrapped_module.")}),
        card="self-gradient-forcing"),
    Row("Self Gradient Forcing Plus, framewise", lambda f, s: pickled(f, {
        "generator_ema": prefixed(with_second_set(s, other(s)), "model.")}),
        reading=ASKED("self-gradient-forcing-framewise"), card="self-gradient-forcing-framewise"),
    Row("LiveWan", lambda f, s: pickled(f, {
        "model": s, "ema": other(s), "step": 3000, "args": LIVEWAN_OPTIONS}, "latest.pt"), card="livewan"),
    Row("LiveWan, without average", lambda f, s: pickled(f, {
        "model": s, "step": 2250, "args": LIVEWAN_OPTIONS, "note": "no average"}, "step002250_noema.pt"),
        card="livewan"),
    Row("LongLive", lambda f, s: pickled(f, {
        "generator": prefixed(s, "model."), "generator_ema": fsdp(other(s))}, "longlive_base.pt"),
        reading=ASKED("longlive"), card="longlive"),
    Row("LongLive, under model", lambda f, s: pickled(f, {"model": prefixed(s, "model."), "step": 3000}),
        reading=ASKED("longlive"), card="longlive"),
    Row("Infinite-Forcing", lambda f, s: pickled(f, prefixed(s, "model."), "ema_model.pt"),
        reading=ASKED("infinite-forcing"), card="infinite-forcing"),
    Row("Reward-Forcing", lambda f, s: pickled(f, s, "rewardforcing.pt"),
        reading=ASKED("reward-forcing"), card="reward-forcing"),
    Row("MemFlow", lambda f, s: pickled(f, {"generator": prefixed(s, "model.")}, "base.pt"),
        reading=ASKED("memflow"), card="memflow"),
    Row("Krea 14B", lambda f, s: flat(f, cast(s, BF16), "krea-realtime-video-14b.safetensors"), BF16,
        reading=ASKED("krea-14b"), card="krea-14b"),
    Row("Self-Forcing, diffusers", lambda f, s: diffusers_folder(
        f, s, "WanTransformer3DModel", "SelfForcingFlowMatchScheduler")),
    Row("Context Forcing", lambda f, s: pickled(f, {
        "generator": prefixed(other(s), "model."), "generator_ema": prefixed(s, "model.")}),
        reading=ASKED("context-forcing"), card="context-forcing"),
    Row("asked for: generator", lambda f, s: pickled(f, {
        "generator": prefixed(s, "model."), "generator_ema": prefixed(other(s), "model.")}),
        reading=(("weights", "generator"),)),
    Row("FastVideo", lambda f, s: flat(f, fastvideo(s))),
    Row("state_dict, module, compiled", lambda f, s: pickled(f, {
        "state_dict": prefixed(s, "module.model._orig_mod.")}, "last.ckpt")),
    Row("with a GAN's extras", lambda f, s: pickled(f, {"generator": prefixed(
        s | {"_cls_pred_branch.0.weight": torch.zeros(3), "_gan_ca_blocks.0.q.weight": torch.zeros(3)}, "model.")})),
    Row("before torch 1.6", lambda f, s: (torch.save(
        {"generator": s}, f / "old.bin", _use_new_zipfile_serialization=False), f / "old.bin")[1]),
    Row("safetensors by another name", lambda f, s: flat(f, s, "student.bin")),
]  # fmt: skip
