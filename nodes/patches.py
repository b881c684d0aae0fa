"""What other nodes set on a MODEL: what has an effect in the sampler, and the names of what has none."""

import functools
import re
from collections.abc import Callable, Iterator

import comfy.model_sampling
from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS, optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS
from torch import Tensor

from ..memory.fields import quoted
from ..model.attention import BACKENDS, EIGHT_BITS, EXACT, Attention, load_attention, sdpa, tested
from ..model.causal import ModuleRunner, compiled, run_directly
from ..model.network import Network
from .shared import attention_names, log

OVERRIDE = "optimized_attention_override"

REPLACED = re.compile(
    r"diffusion_model\.(patch_embedding|text_embedding|time_embedding|time_projection|head\.(norm|head)"
    r"|blocks\.\d+\.(norm\d|ffn|(self|cross)_attn\.([qkvo]|norm_[qk])))(\.|$)"
)
"""Object patches that have an effect: on modules that the sampler's pass calls as a whole."""

SAMPLING = (
    "context_handler", "model_function_wrapper", "sampler_cfg_function", "sampler_pre_cfg_function",
    "sampler_post_cfg_function", "sampler_calc_cond_batch_function", "denoise_mask_function",
)  # fmt: skip
"""Model options that only ComfyUI's own samplers read."""


EXACT_HERE = ("pytorch", "sub_quad", "split", "xformers")
"""Of the attention functions that ComfyUI registers, those that do not quantise."""


def attention_of(model: io.Model.Type, name: str, network: Network) -> Attention:
    """An attention function by name, in layout [B, S, N, E], for the heads of a network.

    `sdpa` is exact. `comfyui` is the attention ComfyUI was started with, or the one another node set on the MODEL.
    Others are what ComfyUI registers, tested once. Raises ValueError for one that is missing or fails its test.
    """
    options = dict(model.model_options["transformer_options"])
    if name == "comfyui":
        attention = _in_our_layout(optimized_attention, options)
        if OVERRIDE not in options and optimized_attention in map(REGISTERED_ATTENTION_FUNCTIONS.get, EXACT_HERE):
            return attention
        # It is not tested. Some kernels write to their keys, and those of the memory must stay as they are.
        return lambda q, k, v, bias=None: attention(q, k.clone(), v.clone(), bias)
    if OVERRIDE in options:
        log.warning("model: the attention that a node set on it is used only if the sampler's attention is comfyui")
    heads = network.device, network.dtype, network.head_dim
    if name == "sdpa" or name in list(BACKENDS):
        # Not by ComfyUI's functions of these names: they go over to PyTorch's attention when a kernel fails.
        return load_attention(name, *heads)
    if name not in list(REGISTERED_ATTENTION_FUNCTIONS):
        raise ValueError(f"attention: {quoted(name)} is not one of {', '.join(attention_names())}; use sdpa")
    tolerance = EXACT if name in EXACT_HERE else EIGHT_BITS
    return tested(name, _registered(REGISTERED_ATTENTION_FUNCTIONS[name]), tolerance, *heads)


@functools.cache
def _registered(function: Callable[..., Tensor]) -> Attention:
    """A function that ComfyUI registers as an Attention. Calls with a bias, those of prompts, are exact."""
    without_bias = _in_our_layout(function, {})

    def attention(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        exact = bias is not None
        return sdpa(q_BSNE, k_BKNE, v_BKNE, bias) if exact else without_bias(q_BSNE, k_BKNE, v_BKNE)

    return attention


def _in_our_layout(function: Callable[..., Tensor], options: dict) -> Attention:
    def attention(q_BSNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, bias: Tensor | None = None) -> Tensor:
        out_BNSE = function(
            q_BSNE.transpose(1, 2), k_BKNE.transpose(1, 2), v_BKNE.transpose(1, 2), q_BSNE.shape[2],
            mask=bias, skip_reshape=True, skip_output_reshape=True, transformer_options=options,
        )  # fmt: skip
        return out_BNSE.transpose(1, 2)

    return attention


def runner_of(model: io.Model.Type) -> ModuleRunner:
    """How passes run modules: compiled if a torch.compile node is connected."""
    options = model.model_options.get(TORCH_COMPILE_KWARGS)
    if options is None:
        return run_directly
    # CUDA graphs write the keys of all blocks to the same memory; remembered keys would be overwritten.
    graphs = (options["options"] or {}).get("triton.cudagraphs") or options["backend"] == "cudagraphs"
    if graphs or options["mode"] in ("reduce-overhead", "max-autotune"):
        log.warning("model: torch.compile with CUDA graphs overwrites remembered keys; blocks run without compilation")
        return run_directly
    return compiled(**options)


def ignored_patches(model: io.Model.Type) -> Iterator[str]:
    """Names of what is set on a MODEL and has no effect in the sampler."""
    options = model.model_options["transformer_options"]
    yield from (f"{name} patch" for name, patches in options.get("patches", {}).items() if patches)
    for blocks in options.get("patches_replace", {}).values():
        yield from (f"{'_'.join(map(str, block))} replacement" for block in list(blocks)[:1])
    if "rope_options" in options:
        yield "rope_options"
    for wrappers in (model.wrappers, options.get("wrappers", {})):
        for kind, by_key in wrappers.items():
            for key, functions in by_key.items():
                if functions and (kind, key) != (WrappersMP.APPLY_MODEL, COMPILE_KEY):
                    yield f"{kind} wrapper {key or functions[0].__name__}"
    yield from (name for name in SAMPLING if model.model_options.get(name))
    for name, patch in model.object_patches.items():
        is_shift = name == "model_sampling" and isinstance(patch, comfy.model_sampling.ModelSamplingDiscreteFlow)
        if name != "manual_cast_dtype" and not is_shift and not REPLACED.match(name):
            yield f"object patch {name}"
