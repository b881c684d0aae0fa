"""An empty memory, and what a memory holds."""

import dataclasses

import numpy as np
from comfy_api.latest import io, ui

from ..memory.config import MEMORY_PRESETS, POLICIES, RELEASED, named_memory
from ..model.attention_mass import attention_mass
from ..video.frames import to_uint8
from ..video.pipeline import new_memory
from ..video.report import draw_report, summary
from .handle import CATEGORY, MemoryHandle, MemoryType, as_image, card_of, log
from .sampler import sampler_for
from .video import decode_stream

AS_TRAINED = "as trained"


class ContextForcingMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        number = lambda name, tooltip: io.Int.Input(
            name, default=-1, min=-1, max=1024, tooltip=f"{tooltip} In latent frames (4 frames each); -1: as trained."
        )
        return io.Schema(
            node_id="ContextForcingMemory",
            display_name="Slow-Fast Memory",
            category=CATEGORY,
            description="An empty memory, where a chain of samplers begins. It decides the size of the video and what"
            " the video will remember.",
            search_aliases=["context forcing", "kv cache", "attention sink", "long video"],
            inputs=[
                io.Model.Input("model", tooltip="The student; its card gives what is left at -1 or 'as trained'."),
                io.Int.Input(
                    "width", default=0, min=0, max=8192, step=16,
                    tooltip="Width of the video in pixels, a multiple of 16; 0: as trained.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, step=16,
                    tooltip="Height of the video in pixels, a multiple of 16; 0: as trained.",
                ),
                io.Combo.Input(
                    "policy", options=[AS_TRAINED, *POLICIES], default=AS_TRAINED,
                    tooltip="Which frames slow memory keeps. novel: those unlike everything remembered, one of each"
                    " place. clean: those unlike the frame before (the paper's rule). fifo: the latest. uniform: every"
                    " sixth. released: for the released Context Forcing weights, what they were trained with; each layer"
                    " keeps first frames of chunks as they were while still noise.",
                ),
                number("sink", "The first frames of the video, never forgotten; 0: none."),
                number("slow", "Keyframes kept for long; 0: no slow memory."),
                number("fast", "The latest frames, the chunk being made included."),
                io.Float.Input(
                    "threshold", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="Policies novel and clean: a frame less similar than this is kept (0.95 is usual; higher"
                    " keeps more). -1: as trained.",
                ),
                io.Combo.Input(
                    "preset", options=[AS_TRAINED, *MEMORY_PRESETS], default=AS_TRAINED, optional=True, advanced=True,
                    tooltip="A memory by name; policy, sizes and threshold above change it where they are set."
                    " slow-fast: ours. context-forcing: the paper's. released: what the released"
                    " weights were trained with. longlive, infinity-rope: the sliding windows of"
                    " those students, without slow memory.",
                ),
            ],
            outputs=[MemoryType.Output("memory", tooltip="Nothing remembered yet; goes into the first sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, width, height, policy, sink, slow, fast, threshold, preset=AS_TRAINED) -> io.NodeOutput:
        card = card_of(model)
        trained = card.memory if preset == AS_TRAINED else named_memory(preset, card.memory)
        chosen = {"sink": sink, "slow": slow, "fast": fast, "slow_similarity_threshold": threshold}
        settings = {name: value for name, value in chosen.items() if value != -1}
        if policy != AS_TRAINED:
            settings["policy"] = policy
        config = dataclasses.replace(trained, **settings)
        return io.NodeOutput(MemoryHandle.of(new_memory(config, width or card.size[0], height or card.size[1])))


class ContextForcingMemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingMemoryReport",
            display_name="Memory Report",
            category=CATEGORY,
            description="What is remembered, since when, what was let go and why: a picture and a few lines of text.",
            search_aliases=["context forcing", "inspect memory", "attention map"],
            is_output_node=True,
            inputs=[
                MemoryType.Input("memory", tooltip="The end of any sampler in the chain."),
                io.Vae.Input("vae", tooltip="Draws the remembered frames."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, tooltip="Frames per second of the video."),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The student, to see also how much the next chunk would look at sink, slow, fast and itself:"
                    " takes as long as making that chunk, or somewhat longer. Not connected: left out.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The report as a picture."),
                io.String.Output("text", tooltip="The same in words: frames held, how far back, by which rule."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, memory, vae, fps, model=None) -> io.NodeOutput:
        memory, mass = memory.memory, None
        if model is not None and memory.config.policy == RELEASED:
            log.warning("memory report: layers of policy released look at frames of their own; attention is left out")
        elif model is not None:
            card = card_of(model)
            mass = attention_mass(sampler_for(model, card, memory), memory, card.sigmas)
        image = as_image(draw_report(memory, thumbnails(memory, vae), fps, mass))
        return io.NodeOutput(image, summary(memory, fps, mass), ui=ui.PreviewImage(image, cls=cls))


def thumbnails(memory, vae) -> np.ndarray:
    """The remembered frames as pictures, uint8 [M, H, W, 3]; each decoded by itself, as a still."""
    frames = [to_uint8(next(iter(decode_stream(vae, [memory.latents_of([frame])])))) for frame in memory.slots.all]
    return np.concatenate(frames) if frames else np.zeros((0, 1, 1, 3), np.uint8)
