"""Run by ComfyUI's Python: our sampler on MODELs of ComfyUI's own loaders and patches, against the headless one.

    python native_model_check.py COMFYUI CHECKOUT PACK FOLDER

Prints JSON: {check: what was found}. Of latents, `difference` is the norm of the difference over that of the latents.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path

comfyui, checkout, pack, folder = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, comfyui)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingSD3  # noqa: E402
from pack import load_pack  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402

FOLDER = Path(folder)
SIZES = dict(dim=256, ffn_dim=320, num_heads=2, num_layers=2)
FP8 = torch.float8_e4m3fn
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Bench:
    """The pack, a random network, and its film as the headless sampler makes it."""

    def __init__(self):
        self.part = part = load_pack(checkout, pack)
        part("nodes")
        self.student = part("nodes.handle")
        self.settings = part("nodes.student_settings").ContextForcingStudentSettings.execute
        self.sampler = part("nodes.sampler").ContextForcingSampler.execute
        self.memory = part("nodes.memory").ContextForcingMemory.execute
        self.wan, self.config = part("model.wan"), part("model.config")
        self.state = self.network().state_dict()
        text = torch.randn((1, 512, 4096), generator=torch.Generator().manual_seed(3))
        text[:, 7:] = 0
        self.positive = [[text, {"pooled_output": None}]]
        for kind in ("diffusion_models", "loras"):
            folder_paths.add_model_folder_path(kind, str(FOLDER))

    def network(self):
        net = self.wan.WanModel(self.config.WanConfig(**SIZES))
        generator = torch.Generator().manual_seed(0)
        net.reset_parameters(generator)
        for name, parameter in net.named_parameters():
            if name.endswith(("bias", "modulation")):
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        for weight in (net.head.head.weight, net.time_projection[1].weight):
            weight.data.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        return net.eval().requires_grad_(False)

    def save(self, name, state, metadata=None):
        save_file({key: value.contiguous() for key, value in state.items()}, FOLDER / name, metadata)
        return name

    def load(self, state, metadata=None, weight_dtype="default", name="student.safetensors"):
        return nodes.UNETLoader().load_unet(self.save(name, state, metadata), weight_dtype)[0]

    def run(self, model, memory=None, chunks=3, positive=None, **options):
        """(latents, memory) of a segment by our nodes."""
        if memory is None:
            (memory,) = self.memory(model, 48, 32, "as trained", 1, 2, 4, -1.0).result
        memory, latent = self.sampler(model, positive or self.positive, memory, 0.75 * chunks, 5, **options).result
        return latent["samples"], memory

    def headless(self, state, dtype=torch.float32, shift=5.0):
        """The same by the headless sampler."""
        part = self.part
        net = self.network()
        net.load_state_dict({key: value.float() for key, value in state.items()})
        net = net.to(dtype)
        card = self.config.StudentCard(shift=shift)
        memory = part("video.pipeline").new_memory(part("memory.config").MemoryConfig(sink=1, slow=2, fast=4), 48, 32)
        made = part("model.sampler").CausalSampler
        sampler_of = lambda text: made(
            net=net, text=part("model.causal").embed_text(net, text.to(dtype)), device=torch.device("cpu"), dtype=dtype,
            student=part("model.fingerprint").fingerprint(net),
        )  # fmt: skip
        *_, memory = part("model.segment").generate_segment(
            sampler_of, memory, self.positive[0][0], prompt="", seed=5, num_chunks=3, sigmas=card.sigmas
        )
        return part("model.codecs.demo_vae").denormalise(torch.cat(memory.latent_chunks, dim=2)), memory


def difference(made, expected):
    return ((made - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def said():
    """What our log says meanwhile."""
    lines, log = [], logging.getLogger("context_forcing")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


@check
def files(bench):
    """Plain files in three precisions, with and without causal metadata; the loader's own conversions."""
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    found = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        stored = {key: value.to(dtype) for key, value in bench.state.items()}
        expected, memory = bench.headless(stored)
        for metadata in (None, causal):
            model = bench.load(stored, metadata)
            made, after = bench.run(model)
            found[f"{name} {type(model.model).__name__}"] = {
                "difference": difference(made, expected), "same student": after.memory.student == memory.student,
                "dtype": str(model.model.get_dtype()),
            }  # fmt: skip
    for weight_dtype, dtype in (("fp8_e4m3fn", FP8), ("fp8_e5m2", torch.float8_e5m2)):
        stored = {key: value if key.startswith("patch_emb") else value.to(dtype) for key, value in bench.state.items()}
        expected, memory = bench.headless(stored)
        model = bench.load(bench.state, weight_dtype=weight_dtype)
        made, after = bench.run(model)
        found[weight_dtype] = {
            "weight": str(model.model.diffusion_model.blocks[0].ffn[0].weight.dtype),
            "difference": difference(made, expected), "same student": after.memory.student == memory.student,
        }  # fmt: skip
    return found


LAYERS = ("self_attn.q", "cross_attn.k", "ffn.0")
STRENGTHS = (0.8, -0.5)


class Lora:
    """A random low-rank change of some layers."""

    def __init__(self, bench, seed):
        generator = torch.Generator().manual_seed(seed)
        self.parts = {}
        for layer in (f"blocks.{block}.{name}" for block in range(SIZES["num_layers"]) for name in LAYERS):
            rows, columns = bench.state[f"{layer}.weight"].shape
            make = lambda *size: torch.randn(size, generator=generator) * 0.02
            self.parts[layer] = (make(4, columns), make(rows, 4))

    def spelled(self, prefix, down, up, alpha=None, dots="."):
        out = {}
        for layer, (a, b) in self.parts.items():
            name = prefix + layer.replace(".", dots)
            out |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
            if alpha is not None:
                out[f"{name}.alpha"] = torch.tensor(alpha)
        return out

    def merged(self, state, scale):
        change = {f"{layer}.weight": scale * b @ a for layer, (a, b) in self.parts.items()}
        return {key: value + change.get(key, 0) for key, value in state.items()}


def with_lora(bench, model, lora, strength, node=nodes.LoraLoaderModelOnly, name="lora.safetensors"):
    return node().load_lora_model_only(model, bench.save(name, lora), strength)[0]


@check
def loras(bench):
    """LoRAs in every spelling that ComfyUI reads, two at once, and one that it does not read."""
    lora, model, found = Lora(bench, 1), bench.load(bench.state), {}
    plain, _ = bench.headless(bench.state)
    expected, _ = bench.headless(lora.merged(bench.state, STRENGTHS[0]))
    spellings = {
        "peft": lora.spelled("diffusion_model.", "lora_A", "lora_B"),
        "kohya": lora.spelled("lora_unet_", "lora_down", "lora_up", 4.0, "_"),
        "wan fun": lora.spelled("lora_unet__", "lora_down", "lora_up", 4.0, "_"),
    }
    for name, spelled in spellings.items():
        made, after = bench.run(with_lora(bench, model, spelled, STRENGTHS[0], name=f"{name}.safetensors"))
        found[name] = {"difference": difference(made, expected), "student": after.memory.student}
    made, _ = bench.run(with_lora(bench, model, spellings["peft"], STRENGTHS[0], LoraLoaderBypassModelOnly))
    found["bypass"] = {"difference": difference(made, expected)}
    unread = lora.spelled("base_model.model.", "lora_A", "lora_B")
    made, after = bench.run(with_lora(bench, model, unread, STRENGTHS[0], name="unread.safetensors"))
    found["not read"] = {"difference": difference(made, plain), "student": after.memory.student}
    both = with_lora(bench, model, spellings["peft"], STRENGTHS[0], name="one.safetensors")
    second = Lora(bench, 2)
    spelled = second.spelled("diffusion_model.", "lora_A", "lora_B")
    both = with_lora(bench, both, spelled, STRENGTHS[1], name="two.safetensors")
    expected, _ = bench.headless(second.merged(lora.merged(bench.state, STRENGTHS[0]), STRENGTHS[1]))
    made, after = bench.run(both)
    found["two"] = {"difference": difference(made, expected), "student": after.memory.student}
    # Each continues the other's memory; the plain network comes last, so that nothing of a LoRA may be left in it.
    made, after = bench.run(both, after, chunks=1)
    _, after = bench.run(model, after, chunks=1)
    found["changed on the way"] = {"frames": after.memory.num_frames, "student": after.memory.student}
    made, after = bench.run(model)
    found["none again"] = {"difference": difference(made, plain), "student": after.memory.student}
    found["effect"] = difference(expected, plain)
    return found


@contextlib.contextmanager
def room(amount):
    """ComfyUI as it loads models when `amount` bytes of their weights fit: the others are cast as they are used."""
    usual = mm.load_models_gpu

    def load(models, memory_required=0):
        for model in models:
            model.patch_model(model.load_device, lowvram_model_memory=amount)

    mm.load_models_gpu = load
    try:
        yield
    finally:
        mm.load_models_gpu = usual


@check
def offloaded(bench):
    """Weights that stay where they are and are cast as they are used, LoRA included; all of them, and about half."""
    lora, found = Lora(bench, 1), {}
    expected, _ = bench.headless(lora.merged(bench.state, STRENGTHS[0]))
    spelled = lora.spelled("diffusion_model.", "lora_A", "lora_B")
    size = sum(value.nbytes for value in bench.state.values())
    for name, amount in (("all", 0.1), ("half", size // 2)):
        model = with_lora(bench, bench.load(bench.state), spelled, STRENGTHS[0])
        with room(amount):
            made, after = bench.run(model)
        layers = [module for module in model.model.modules() if hasattr(module, "weight_function")]
        found[name] = {
            "difference": difference(made, expected), "student": after.memory.student,
            "cast": sum(bool(layer.weight_function) for layer in layers), "changed in place": len(model.backup),
        }  # fmt: skip
        model.detach()
    # As a loader leaves it that keeps the file's own tensors, whatever the layer was made for.
    model = bench.load(bench.state, weight_dtype="fp8_e4m3fn")
    patch = model.model.diffusion_model.patch_embedding
    patch.weight = torch.nn.Parameter(patch.weight.to(FP8), requires_grad=False)
    with room(0.1):
        made, _ = bench.run(model)
    kept = {"patch_embedding.bias": bench.state["patch_embedding.bias"]}
    expected, _ = bench.headless({key: value.to(FP8) for key, value in bench.state.items()} | kept)
    found["fp8 patch embedding"] = {"difference": difference(made, expected)}
    return found


@check
def quantised(bench):
    """Scaled fp8 as ComfyUI wrote it once, as it writes it now, and int8."""
    found = {}
    in_blocks = [key for key, value in bench.state.items() if key.startswith("blocks") and value.ndim == 2]
    linear = [key.removesuffix(".weight") for key in in_blocks]
    scale = {layer: bench.state[f"{layer}.weight"].abs().max() / 448 for layer in linear}
    packed = {layer: (bench.state[f"{layer}.weight"] / scale[layer]).to(FP8) for layer in linear}
    weights = {f"{layer}.weight": packed[layer] for layer in linear}
    real = {f"{layer}.weight": packed[layer].float() * scale[layer] for layer in linear}
    expected, memory = bench.headless(bench.state | real)
    old = {f"{layer}.scale_weight": scale[layer] for layer in linear} | {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    new = {f"{layer}.weight_scale": scale[layer] for layer in linear}
    new |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in linear}
    told = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in linear}})}
    lora = Lora(bench, 1)
    for name, extra, metadata in (("old", old, None), ("new", new, told)):
        model = bench.load(bench.state | weights | extra, metadata)
        made, after = bench.run(model)
        found[name] = {"difference": difference(made, expected), "same student": after.memory.student == memory.student}
        found[name]["weight"] = type(model.model.diffusion_model.blocks[0].ffn[0].weight).__name__
        spelled = lora.spelled("diffusion_model.", "lora_A", "lora_B")
        changed, after = bench.run(with_lora(bench, model, spelled, STRENGTHS[0]), after, chunks=1)
        found[name]["with a LoRA"] = after.memory.student == memory.student and bool(changed.isfinite().all())
    scale = {layer: bench.state[f"{layer}.weight"].abs().max() / 127 for layer in linear}
    packed = {layer: (bench.state[f"{layer}.weight"] / scale[layer]).round().to(torch.int8) for layer in linear}
    weights = {f"{layer}.weight": packed[layer] for layer in linear}
    scales = {f"{layer}.weight_scale": scale[layer] for layer in linear}
    expected, memory = bench.headless(
        bench.state | {f"{layer}.weight": packed[layer].float() * scale[layer] for layer in linear}
    )
    formats = {layer: {"format": "int8_tensorwise"} for layer in linear}
    told = {"_quantization_metadata": json.dumps({"layers": formats})}
    made, after = bench.run(bench.load(bench.state | weights | scales, told))
    found["int8"] = {"difference": difference(made, expected), "same student": after.memory.student == memory.student}
    return found


@check
def compiled(bench):
    """A torch.compile node: blocks compile once, whatever the memory's length; CUDA graphs are refused."""
    from torch._dynamo.testing import CompileCounterWithBackend

    expected, _ = bench.headless(bench.state)
    counter = CompileCounterWithBackend("aot_eager")
    model = bench.load(bench.state).clone()
    set_torch_compile_wrapper(model=model, backend=counter)
    made, _ = bench.run(model)
    after_one = counter.frame_count
    bench.run(model, chunks=1)
    graphs = bench.load(bench.state).clone()
    set_torch_compile_wrapper(model=graphs, backend="cudagraphs")
    with said() as lines:
        refused, _ = bench.run(graphs, chunks=1)
    return {
        "difference": difference(made, expected), "compiled": after_one,
        "compiled again": counter.frame_count - after_one,
        "graphs": [line for line in lines if "CUDA graphs" in line],
        "ignored": [line for line in lines if "no effect" in line],
    }  # fmt: skip


@check
def attention(bench):
    """An attention that another node put on the MODEL, and what ComfyUI was started with."""
    expected, _ = bench.headless(bench.state)
    model, calls = bench.load(bench.state).clone(), []

    def mine(function, *args, **options):
        calls.append(options["transformer_options"])
        return function(*args, **options)

    started, _ = bench.run(model, attention="comfyui")
    model.model_options["transformer_options"]["optimized_attention_override"] = mine
    made, _ = bench.run(model, attention="comfyui")
    used = len(calls)
    with said() as lines:
        bench.run(model, chunks=1)
    return {
        "difference": difference(made, expected), "as started": difference(started, expected), "calls": used,
        "calls of sdpa": len(calls) - used, "says": [line for line in lines if "attention" in line],
    }  # fmt: skip


@check
def settings(bench):
    """Student Settings, ModelSamplingSD3 and ModelComputeDtype behind the stock loader."""
    found, model = {}, bench.load(bench.state)
    (told,) = bench.settings(model, "1000, 500", 3.0, "euler", 8, -1, 12, 3, 0, 9).result
    card = bench.student.card_of(told)
    memory = card.memory
    found["card"] = [card.steps, card.shift, card.solver, card.fps, memory.window, memory.slow, memory.chunk]
    (known,) = bench.settings(model, "1000, 500", 0.0, "as is", 0, -1, -1, -1, -1, -1, "longlive").result
    named = bench.student.card_of(known)
    found["named"] = [named.name, named.steps, named.memory.window, named.memory.slow]
    found["loader's own"] = model.get_attachment("context_forcing_card") is None
    (moved,) = ModelSamplingSD3().patch(model, 8.0)
    expected, _ = bench.headless(bench.state, shift=8.0)
    with said() as lines:
        made, _ = bench.run(moved)
    found["shift"] = {"difference": difference(made, expected), "says": any("shift 8" in line for line in lines)}
    (half,) = ModelComputeDtype().patch(model, "bf16")
    expected, memory = bench.headless(bench.state, dtype=torch.bfloat16)
    made, after = bench.run(half)
    found["bf16"] = {"difference": difference(made, expected), "same student": after.memory.student == memory.student}
    for name, value in {"steps": "1000, abc", "window": 3}.items():
        try:
            bench.settings(model, *(value if key == name else default for key, default in (
                ("steps", ""), ("shift", 0.0), ("solver", "as is"), ("fps", 0), ("chunk", -1), ("window", -1),
                ("sink", -1), ("slow", -1), ("fast", -1),
            )))  # fmt: skip
        except ValueError as error:
            found[f"wrong {name}"] = str(error)
    return found


@check
def ignored(bench):
    """Patches of ComfyUI's own nodes that cannot act here are named."""
    from comfy_extras.nodes_cfg import CFGZeroStar
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    from comfy_extras.nodes_easycache import EasyCacheNode
    from comfy_extras.nodes_rope import ScaleROPE

    model = bench.load(bench.state)
    model = EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0]
    model = WanContextWindowsManualNode.execute(model, 81, 30, "standard_static", 1, False, "pyramid", False).result[0]
    model = ScaleROPE.execute(model, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0).result[0]
    model = CFGZeroStar.execute(model).result[0].clone()
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    model.set_model_attn1_patch(lambda *args: args)
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", lambda *args: args)
    taken = lambda x: 2 * x
    model.add_object_patch("diffusion_model.blocks.0.self_attn.norm_q.forward", taken)
    with said() as lines:
        made, _ = bench.run(model, chunks=1)
    (line,) = [line for line in lines if "no effect" in line]
    bare, _ = bench.run(bench.load(bench.state), chunks=1)
    with said() as lines:
        bench.run(bench.load(bench.state), chunks=1)
    of_bare = [line for line in lines if "no effect" in line]
    return {"says": line, "of a bare one": of_bare, "taken": difference(made, bare)}


@check
def refused(bench):
    """Every relative of Wan 2.1 text-to-video that this ComfyUI knows, and something else."""
    import comfy.model_patcher
    import comfy.supported_models

    more = {
        "i2v": {"in_dim": 36}, "vace": {"vace_layers": 1, "vace_in_dim": 96}, "camera": {"in_dim": 32},
        "camera_2.2": {"in_dim": 36}, "humo": {"in_dim": 36}, "animate": {"in_dim": 36}, "scail": {"in_dim": 20},
        "scail2": {"in_dim": 20}, "s2v": {}, "flow_rvs": {}, "wandancer": {"in_dim": 36}, "animate2": {"in_dim": 36},
    }  # fmt: skip
    plain = comfy.supported_models.WAN21_T2V
    relatives = [(config.__name__, config, {}) for config in comfy.supported_models.models if issubclass(config, plain)]
    # Wan 2.2's picture-to-video has no picture embeddings: by its layers it is text-to-video with more channels.
    relatives.append(("Wan 2.2 I2V", plain, {"in_dim": 36}))
    found, cpu = {}, torch.device("cpu")
    for name, config, channels in relatives:
        kind = config.unet_config["model_type"]
        made = config({**SIZES, "in_dim": 16, "out_dim": 16, **more.get(kind, {}), **config.unet_config, **channels})
        made.set_inference_dtype(torch.float32, None)
        model = comfy.model_patcher.ModelPatcher(made.get_model({}, "", device="meta"), cpu, cpu)
        try:
            bench.memory(model, 48, 32, "as trained", -1, -1, -1, -1.0)
            found[name] = "taken"
        except ValueError as error:
            found[name] = str(error)
    return found


class Packed(torch.Tensor):
    """A weight as ComfyUI-GGUF keeps it: bytes, whose shape is what they unpack to; its class rubs off on results."""

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


@check
def packed(bench):
    """Weights of ComfyUI-GGUF's kind. (The pack itself was tried by hand: Q8_0, Q5_1, Q4_0 and BF16 files.)"""
    model = bench.load(bench.state)
    net, real = model.model.diffusion_model, dict(bench.state)
    for index, block in enumerate(net.blocks):
        for part, names in ((block.self_attn, "qkvo"), (block.cross_attn, "qkvo"), (block.ffn, "02")):
            for name in names:
                layer = PackedLinear(part.get_submodule(name))
                setattr(part, name, layer)
                where = {block.self_attn: "self_attn", block.cross_attn: "cross_attn", block.ffn: "ffn"}[part]
                real[f"blocks.{index}.{where}.{name}.weight"] = layer.unpacked()
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if "norm" in type(module).__name__.lower() or name == "modulation":
                module.register_parameter(name, torch.nn.Parameter(Packed.of(parameter.data), requires_grad=False))
    expected, _ = bench.headless(real)
    made, first = bench.run(model)
    _, second = bench.run(model, first, chunks=1)
    held = first.memory.remembered[0]
    return {
        "difference": difference(made, expected), "same student": first.memory.student == second.memory.student,
        "classes": sorted({type(tensor).__name__ for tensor in (held.keys, held.values, first.memory.latent_chunks[0], made)}),
        "weight": type(net.blocks[0].ffn[0].weight).__name__,
    }  # fmt: skip


@check
def prompts(bench):
    """Rows of the text encoder: zero ones count, more than 512 are refused; what else is in a CONDITIONING is named."""
    model, text = bench.load(bench.state), bench.positive[0][0]
    padded, _ = bench.run(model, chunks=1)
    short, _ = bench.run(model, chunks=1, positive=[[text[:, :7], {}]])
    other, _ = bench.run(model, chunks=1, positive=[[text[:, :6], {}]])
    try:
        bench.run(model, chunks=1, positive=[[torch.ones(1, 513, 4096), {}]])
    except ValueError as error:
        refused = str(error)
    with said() as lines:
        bench.run(model, chunks=1, positive=[[text, {"pooled_output": None, "hooks": object()}]])
    return {
        "padding": difference(short, padded), "a row less": difference(other, padded), "refused": refused,
        "says": [line for line in lines if line.startswith("positive")],
    }  # fmt: skip


@check
def layouts(bench):
    """What is remembered laid out at once, by layer, or from RAM: the same latents and memory."""
    model, found = bench.load(bench.state), {}
    expected, memory = bench.run(model, chunks=4)
    for layout in ("by layer", "from RAM"):
        made, after = bench.run(model, chunks=4, layout=layout)
        same = all(map(torch.equal, memory.memory.tensors(), after.memory.tensors()))
        found[layout] = torch.equal(made, expected) and same
    usual, mm.get_total_memory = mm.get_total_memory, lambda device: 1e5
    with said() as lines:
        bench.run(model, chunks=1, layout="by layer")
    mm.get_total_memory = usual
    return found | {"says": [line for line in lines if line.startswith("memory")]}


def main() -> None:
    with torch.inference_mode():
        bench = Bench()
        print(json.dumps({function.__name__: function(bench) for function in CHECKS}))


main()
