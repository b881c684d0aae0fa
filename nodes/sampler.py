"""One segment: continue a memory under a prompt."""

from collections.abc import Callable

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import io
from PIL import Image

from ..model.attention import sdpa
from ..model.causal import embed_text
from ..model.codec import denormalise
from ..model.config import VAE_STRIDE
from ..model.sampler import COMMIT_ATTENDS, CausalSampler, chunks_for, seeded_noise, working_bytes
from ..model.video import to_uint8
from .demo import preview_codec
from .types import CATEGORY, MemoryType, card_of, log, wan_network

PREVIEW_SIDE = 512


def comfy_attention(q, k, v, bias=None):
    """The attention ComfyUI was started with (sage, flash, xformers, ...) in our layout, [B, S, N, E]."""
    out = optimized_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[2],
        mask=bias, skip_reshape=True, skip_output_reshape=True,
    )  # fmt: skip
    return out.transpose(1, 2)


ATTENTION = {"sdpa": sdpa, "comfyui": comfy_attention}


def text_of(positive) -> torch.Tensor:
    """The one prompt of a CONDITIONING, [1, L, 4096]. Raises ValueError for several."""
    prompts = sum(conditioning.shape[0] for conditioning, _ in positive)
    if prompts != 1:
        raise ValueError(f"positive: {prompts} prompts; a segment has one, chain another sampler for the next")
    return positive[0][0]


def previewer_of(demo: bool) -> Callable[[torch.Tensor], tuple | None]:
    """Latents of a chunk [1, C, T, H, W] -> its last frame as ProgressBar's preview, or None where previews are off."""
    if demo:
        codec = preview_codec()

        def preview(chunk: torch.Tensor) -> tuple:
            picture = Image.fromarray(to_uint8(codec.decode(denormalise(chunk[:, :, -1:])))[0])
            return ("JPEG", picture.resize((picture.width * 4, picture.height * 4), Image.NEAREST), PREVIEW_SIDE)

        return preview
    previewer = latent_preview.get_previewer(torch.device("cpu"), comfy.latent_formats.Wan21())
    if previewer is None:
        return lambda chunk: None
    return lambda chunk: previewer.decode_latent_to_preview_image("JPEG", chunk[:, :, -1:])


class ContextForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingSampler",
            display_name="Context Forcing Sampler",
            category=CATEGORY,
            description="Continues the video by one segment under one prompt. Chain several: each takes the memory of"
            " the one before. Splitting a segment in two changes nothing, as long as prompt and seed stay.",
            search_aliases=["rollout", "long video", "causal", "self forcing", "chain"],
            inputs=[
                io.Model.Input("model", tooltip="The student."),
                io.Conditioning.Input("positive", tooltip="The prompt of this segment."),
                MemoryType.Input("memory", tooltip="An empty memory, or the end of the segment before."),
                io.Float.Input(
                    "seconds", default=3.0, min=0.05, max=3600.0, step=0.05,
                    tooltip="Length of this segment, rounded up to whole chunks (0.75 s at 16 frames per second).",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Noise is a function of the seed and the frame's place in the whole video: keep one seed"
                    " through the chain.",
                ),
                io.Combo.Input(
                    "attention", options=list(ATTENTION), default="sdpa", optional=True, advanced=True,
                    tooltip="sdpa: PyTorch's exact attention. comfyui: what ComfyUI was started with (sage, flash,"
                    " xformers); quantised ones drift in long videos.",
                ),
                io.Combo.Input(
                    "commit_attends", options=list(COMMIT_ATTENDS), default="all", optional=True, advanced=True,
                    tooltip="What a finished chunk sees of the memory while it is written into it.",
                ),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="The video so far and what it remembers."),
                io.Latent.Output("latent", tooltip="This segment alone, for other nodes."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, memory, seconds, seed, attention="sdpa", commit_attends="all") -> io.NodeOutput:
        net, card, text = wan_network(model), card_of(model), text_of(positive)
        chunk = memory.config.chunk
        num_chunks = chunks_for(seconds, card.fps, chunk)
        made = num_chunks * chunk * VAE_STRIDE[0] / card.fps
        if abs(made - seconds) > 1e-6:
            log.info("segment of %g s rounded up to %g s: whole chunks", seconds, made)

        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        mm.load_models_gpu([model], memory_required=working_bytes(net, memory, dtype))
        device = model.load_device
        sampler = CausalSampler(
            net=net,
            text=embed_text(net, text.to(device, dtype)),
            device=device,
            dtype=dtype,
            solver=card.solver,
            attention=ATTENTION[attention],
            commit_attends=commit_attends,
            on_pass=mm.throw_exception_if_processing_interrupted,
        )
        progress = comfy.utils.ProgressBar(num_chunks)
        first_chunk = len(memory.film)
        preview = previewer_of(card.base == "demo")
        before, memory = memory, memory.begin("", seed)
        noise = seeded_noise(seed, memory.latent_size)
        for done, memory in enumerate(sampler.rollout(memory, num_chunks, sigmas=card.sigmas, noise=noise), 1):
            progress.update_absolute(done, num_chunks, preview(memory.film[-1]))
        latents = torch.cat(memory.film[first_chunk:], dim=2)
        samples = model.model.process_latent_out(latents).to(mm.intermediate_device())
        return io.NodeOutput(memory.to(mm.intermediate_device(), before=before), {"samples": samples})
