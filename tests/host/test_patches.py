"""What other nodes put on a MODEL: used, or named in one line of the log."""

import comfy.model_management as mm
import pytest
import torch
from bench import ROUNDING, difference
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingSD3
from comfy_extras.nodes_rope import ScaleROPE
from torch._dynamo.testing import CompileCounterWithBackend

from context_forcing.memory.packed import Packed
from context_forcing.model.network import Network
from context_forcing.nodes.memory import ContextForcingMemory
from context_forcing.nodes.sampler import ContextForcingSampler


def messages(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_blocks_compile_once(bench, caplog):
    counter = CompileCounterWithBackend("aot_eager")
    model = bench.load().clone()
    set_torch_compile_wrapper(model=model, backend=counter)
    latents, _ = bench.run(model)
    assert difference(latents, bench.plain) < ROUNDING
    assert counter.frame_count == 4, "for all blocks, chunks and lengths of the memory"
    bench.run(model, chunks=1)
    assert counter.frame_count == 4
    assert not messages(caplog, "no effect")


def test_cuda_graphs_are_refused(bench, caplog):
    model = bench.load().clone()
    set_torch_compile_wrapper(model=model, backend="cudagraphs")
    bench.run(model, chunks=1)
    assert len(messages(caplog, "CUDA graphs")) == 1 and not messages(caplog, "no effect")


def test_attention_of_other_nodes(bench, caplog):
    model, calls = bench.load().clone(), []

    def attention(function, *args, **options):
        calls.append(options["transformer_options"])
        out = function(*args, **options)
        args[1].add_(1)  # as SageAttention 1.0.6, which subtracts the mean of the keys
        return out

    latents, _ = bench.run(model, attention="comfyui")
    assert difference(latents, bench.plain) < ROUNDING, "the attention that ComfyUI was started with"
    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    latents, _ = bench.run(model, attention="comfyui")
    assert difference(latents, bench.plain) < ROUNDING
    per_chunk = 4 * 2 * 2 + 2
    assert len(calls) == 3 * per_chunk, "self and cross: of two blocks in four passes, of one in the commit pass"
    calls.clear()
    assert not messages(caplog, "attention")
    bench.run(model, chunks=1)
    assert not calls and len(messages(caplog, "attention")) == 1


def test_every_attention_that_comfyui_registers(bench):
    model, names = bench.load(), list(ContextForcingSampler.define_schema().inputs[5].options)
    assert names[:2] == ["sdpa", "comfyui"] and {"pytorch", "sub_quad", "split"} <= {*names}
    for name in names:
        latents, _ = bench.run(model, attention=name)
        assert difference(latents, bench.plain) < ROUNDING, name


def test_attention_that_is_not_installed_is_refused_with_its_remedy(bench):
    with pytest.raises(
        ValueError, match="^attention: sage3 needs the package sageattn3 .*; install it by .*, or use sdpa"
    ):
        bench.run(bench.load(), chunks=1, attention="sage3")


def test_the_shift_of_model_sampling(bench, caplog):
    (model,) = ModelSamplingSD3().patch(bench.load(), 8.0)
    expected, _ = bench.headless(bench.state, shift=8.0)
    latents, _ = bench.run(model)
    assert difference(latents, expected) < ROUNDING and messages(caplog, "shift 8")


def test_the_compute_dtype(bench):
    (model,) = ModelComputeDtype().patch(bench.load(), "bf16")
    expected, memory = bench.headless(bench.state, dtype=torch.bfloat16)
    latents, after = bench.run(model)
    # The patch embedding stays float32 in ComfyUI.
    assert difference(latents, expected) < 0.02 and after.memory.student == memory.student


def test_patches_without_effect_are_named(bench, caplog):
    model = bench.load()
    model = EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0]
    model = WanContextWindowsManualNode.execute(model, 81, 30, "standard_static", 1, False, "pyramid", False).result[0]
    model = ScaleROPE.execute(model, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0).result[0]
    model = CFGZeroStar.execute(model).result[0].clone()
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    model.set_model_attn1_patch(lambda *args: args)
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", lambda *args: args)
    model.add_object_patch("diffusion_model.blocks.0.self_attn.norm_q.forward", lambda x: 2 * x)
    latents, _ = bench.run(model, chunks=1)
    (line,) = messages(caplog, "no effect")
    for name in (
        "attn1_patch", "calc_cond_batch wrapper easycache", "diffusion_model wrapper easycache", "context_handler",
        "double_block_1 replacement", "object patch diffusion_model.blocks.0.cross_attn.forward", "rope_options",
        "sampler_post_cfg_function",
    ):  # fmt: skip
        assert name in line
    assert "norm_q" not in line and difference(latents, bench.plain[:, :, :3]) > 1e-3


def test_a_bare_model_has_none(bench, caplog):
    bench.run(bench.load(), chunks=1)
    assert not messages(caplog, "no effect")


@pytest.mark.parametrize("layout", ["by layer", "from RAM"])
def test_layouts_give_the_same_bits(bench, layout):
    model = bench.load()
    expected, memory = bench.run(model, chunks=4)
    latents, after = bench.run(model, chunks=4, layout=layout)
    assert torch.equal(latents, expected)
    assert all(map(torch.equal, memory.memory.tensors(), after.memory.tensors()))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_eight_bits_are_those_of_the_headless_sampler(bench, kv_dtype):
    """And `auto` leaves what is stored so as it is."""
    model = bench.load()
    expected, memory = bench.headless(bench.state, kv_dtype=kv_dtype)
    latents, after = bench.run(model, kv_dtype=kv_dtype)
    assert torch.equal(latents, expected) and not torch.equal(latents, bench.plain)
    assert all(map(torch.equal, memory.tensors(), after.memory.tensors()))
    packed = {frame for frame, kv in after.memory.store.frame_kvs() if isinstance(kv.keys, Packed)}
    assert packed == {*after.memory.slots.sink, *after.memory.slots.slow}
    _, later = bench.run(model, after, chunks=1)
    frames = later.memory.store.frames
    assert {frame for frame, kv in frames.items() if isinstance(kv.keys, Packed)} == packed & {*frames}


def test_eight_bits_are_refused_with_policy_released(bench):
    model = bench.load()
    memory = ContextForcingMemory.execute(model, 48, 32, "released", -1, -1, -1, -1.0).result[0]
    with pytest.raises(ValueError, match="^kv_dtype: with policy released .*; use auto, or another policy$"):
        bench.run(model, memory, chunks=1, kv_dtype="int8")


def test_out_of_memory_makes_room_for_the_next_layout(bench, caplog, monkeypatch):
    """ComfyUI frees its caches and loads the model again beside less memory; an interrupt goes to ComfyUI."""
    model, errors, asked = bench.load(), [], []
    expected, _ = bench.run(model, chunks=3)
    whole, load = Network.flow, mm.load_models_gpu

    def flow(*args):
        if errors:
            raise errors.pop()
        return whole(*args)

    def load_models_gpu(models, memory_required):
        asked.append(memory_required)
        return load(models, memory_required=memory_required)

    monkeypatch.setattr(Network, "flow", flow)
    monkeypatch.setattr(mm, "load_models_gpu", load_models_gpu)
    errors.append(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    latents, _ = bench.run(model, chunks=3)
    assert torch.equal(latents, expected) and len(asked) == 2 and asked[1] < asked[0]
    (line,) = messages(caplog, "out of memory")
    assert line.endswith("layout 'by layer' begins so")
    errors.append(mm.InterruptProcessingException())
    with pytest.raises(mm.InterruptProcessingException):
        bench.run(model, chunks=3)
    assert len(asked) == 3 and len(messages(caplog, "out of memory")) == 1


def test_too_little_memory_is_said(bench, caplog, monkeypatch):
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 1e5)
    bench.run(bench.load(), chunks=1, layout="by layer")
    (line,) = messages(caplog, "GB")
    assert line.startswith("memory") and "from RAM" in line
