"""What other nodes put on a MODEL: used where our pass can, told of where it cannot."""

import dataclasses
import logging
import re
from collections.abc import Iterator

import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from ..model.attention import Attention, sdpa
from ..model.causal import ModuleRunner, compiled, run_directly
from ..model.config import StudentCard

log = logging.getLogger("context_forcing")

ATTENTIONS = ("sdpa", "comfyui")
OVERRIDE = "optimized_attention_override"

REPLACED = re.compile(
    r"diffusion_model\.(patch_embedding|text_embedding|time_embedding|time_projection|head\.(norm|head)"
    r"|blocks\.\d+\.(norm\d|ffn|(self|cross)_attn\.([qkvo]|norm_[qk])))(\.|$)"
)
"""Object patches that take effect: on modules our pass calls as a whole."""

SAMPLING = (
    "context_handler", "model_function_wrapper", "sampler_cfg_function", "sampler_pre_cfg_function",
    "sampler_post_cfg_function", "sampler_calc_cond_batch_function", "denoise_mask_function",
)  # fmt: skip
"""Model options that act in ComfyUI's own samplers, by their names there."""


def attention_of(model, name: str) -> Attention:
    """`sdpa`: exact. `comfyui`: the attention ComfyUI was started with (sage, flash, xformers, ...), or the one another
    node put on the MODEL. In our layout, [B, S, N, E]."""
    options = dict(model.model_options["transformer_options"])
    if name == "sdpa":
        if OVERRIDE in options:
            log.warning("model: it brings an attention of its own; the sampler's attention must be comfyui to use it")
        return sdpa

    def attention(q, k, v, bias=None):
        out = optimized_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[2],
            mask=bias, skip_reshape=True, skip_output_reshape=True, transformer_options=options,
        )  # fmt: skip
        return out.transpose(1, 2)

    return attention


def runner_of(model) -> ModuleRunner:
    """How passes enter blocks: compiled where a torch.compile node says so."""
    options = model.model_options.get(TORCH_COMPILE_KWARGS)
    if options is None:
        return run_directly
    # Graphs of CUDA write every block's keys to one place; those that are remembered must stay.
    graphs = (options["options"] or {}).get("triton.cudagraphs") or options["backend"] == "cudagraphs"
    if graphs or options["mode"] in ("reduce-overhead", "max-autotune"):
        log.warning("model: torch.compile with CUDA graphs overwrites what is remembered; blocks run uncompiled")
        return run_directly
    return compiled(**options)


def compute_dtype(model) -> torch.dtype:
    """What the network runs in, whatever its weights are stored in."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def shifted(card: StudentCard, model) -> StudentCard:
    """The card with the shift of a ModelSamplingSD3 node, where there is one behind the loader."""
    sampling = model.object_patches.get("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) or sampling.shift == card.shift:
        return card
    log.warning("model: shift %g of its ModelSampling node instead of %g as trained", sampling.shift, card.shift)
    return dataclasses.replace(card, shift=float(sampling.shift))


def warn_of_ignored(model) -> None:
    """Say in one line which patches of a MODEL have no effect here."""
    names = sorted(set(ignored_patches(model)))
    if names:
        log.warning(
            "model: these patches have no effect in this sampler, which has no guidance and calls the network's layers"
            " itself: %s", ", ".join(names),
        )  # fmt: skip


def ignored_patches(model) -> Iterator[str]:
    """Names of what is on a MODEL and has no effect."""
    options = model.model_options["transformer_options"]
    yield from (f"{name} patch" for name, patches in options.get("patches", {}).items() if patches)
    for blocks in options.get("patches_replace", {}).values():
        yield from (f"{'_'.join(map(str, where))} replacement" for where in list(blocks)[:1])
    if "rope_options" in options:
        yield "rope_options"
    for wrappers in (model.wrappers, options.get("wrappers", {})):
        for kind, by_key in wrappers.items():
            for key, functions in by_key.items():
                if functions and (kind, key) != (WrappersMP.APPLY_MODEL, COMPILE_KEY):
                    yield f"{kind} wrapper {key or functions[0].__name__}"
    yield from (name for name in SAMPLING if model.model_options.get(name))
    for name, patch in model.object_patches.items():
        flow = isinstance(patch, comfy.model_sampling.ModelSamplingDiscreteFlow)
        if name != "manual_cast_dtype" and not (name == "model_sampling" and flow) and not REPLACED.match(name):
            yield f"object patch {name}"
