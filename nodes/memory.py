"""An empty memory, and a report of what a memory holds."""

import dataclasses

from comfy_api.latest import io

from ..memory.config import MEMORY_PRESETS, POLICIES, named_memory
from ..memory.memory import empty_memory
from ..model.attention_mass import attention_mass
from ..model.units import latent_size
from ..video.frames import thumbnails
from ..video.report import draw_report, summary
from .handle import MemoryHandle, MemoryType
from .model_access import StudentModel
from .sampler import prepare_sampler
from .shared import ADVANCED, CATEGORY, UNCHANGED, frames_input, log, picture_output
from .video import decode_stream

AS_TRAINED = "as trained"


class ContextForcingMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingMemory", display_name="Slow-Fast Memory", category=CATEGORY,
            description="An empty memory, for the first sampler of a chain. It sets the size of the video and which"
            " frames are remembered.",
            search_aliases=["context forcing", "kv cache", "attention sink", "long video"],
            inputs=[
                io.Model.Input("model", tooltip="Student model. Its card has the values of inputs left as trained."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16,
                    tooltip="Width of the video in pixels, a multiple of 16. 0: as trained."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16,
                    tooltip="Height of the video in pixels, a multiple of 16. 0: as trained."),
                io.Combo.Input("policy", options=[AS_TRAINED, *POLICIES], default=AS_TRAINED, advanced=True,
                    tooltip="Which frames slow memory keeps. novel: frames unlike all remembered frames. cover:"
                    " the same, spread over all that was seen. recall: chosen from the whole video before every chunk."
                    " clean: frames unlike the frame before (the paper's rule). fifo: the latest. uniform: every sixth."
                    " released: the rule of the released Context Forcing weights, only for them; every layer keeps"
                    " first frames of chunks, with keys of noisy passes."),
                frames_input("sink", "The first frames of the video, which are never forgotten; 0: none.", AS_TRAINED),
                frames_input("slow", "Keyframes; 0: no slow memory.", AS_TRAINED),
                frames_input("fast", "The latest frames, with the chunk being generated.", AS_TRAINED),
                io.Float.Input("threshold", default=-1.0, min=-1.0, max=1.0, step=0.01, advanced=True,
                    tooltip="For policies novel, cover and clean: a frame is kept if its similarity is below this. 0.95"
                    " is usual; a higher value keeps more frames. -1: as trained."),
                io.Combo.Input("preset", options=[AS_TRAINED, *MEMORY_PRESETS], default=AS_TRAINED, **ADVANCED,
                    tooltip="Values by name; the inputs above replace single values. slow-fast: this pack's."
                    " context-forcing: the paper's. released: of the released weights. longlive, infinity-rope: the"
                    " sliding windows of these students, without slow memory."),
            ],
            outputs=[MemoryType.Output("memory", tooltip="Connect it to the first sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, width: int, height: int, policy: str, sink: int, slow: int, fast: int,
        threshold: float, preset: str = AS_TRAINED,
    ) -> io.NodeOutput:  # fmt: skip
        card = StudentModel.of(model).card
        trained = card.memory if preset == AS_TRAINED else named_memory(preset, card.memory)
        sizes = {"sink": sink, "slow": slow, "fast": fast, "slow_similarity_threshold": threshold}
        settings = {name: value for name, value in sizes.items() if value != UNCHANGED}
        if policy != AS_TRAINED:
            settings["policy"] = policy
        size = latent_size(width or card.size[0], height or card.size[1])
        return io.NodeOutput(MemoryHandle.of(empty_memory(dataclasses.replace(trained, **settings), size)))


class ContextForcingMemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingMemoryReport", display_name="Memory Report", category=CATEGORY, is_output_node=True,
            description="Shows which frames are remembered, since when, and which were forgotten and why.",
            search_aliases=["context forcing", "inspect memory", "attention map"],
            inputs=[
                MemoryType.Input("memory", tooltip="The memory after any sampler."),
                io.Vae.Input("vae", tooltip="Decodes the remembered frames."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, advanced=True,
                    tooltip="Frames per second of the video."),
                io.Model.Input("model", optional=True,
                    tooltip="The student. Connected, the report also shows how the next chunk's attention is divided"
                    " between sink, slow, fast and the chunk. This takes slightly longer than generating the chunk."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The report as a picture."),
                io.String.Output("text", tooltip="Number of frames, reach in seconds, policy."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, memory: MemoryHandle, vae: io.Vae.Type, fps: float, model: io.Model.Type | None = None
    ) -> io.NodeOutput:
        value, mass = memory.memory, None
        if model is not None and not value.supports("attention report"):
            log.warning("memory report: attention is not shown for policy released, whose layers remember other frames")
        elif model is not None:
            student = StudentModel.of(model)
            # The layout with the least video memory: these are the passes of one chunk, with no fallback.
            sampler_of = prepare_sampler(student, value, layout="from RAM")
            mass = attention_mass(sampler_of, value, student.card.sigmas)
        pictures = thumbnails(value, lambda chunks: decode_stream(vae, chunks))
        return picture_output(draw_report(value, pictures, fps, mass), summary(value, fps, mass), cls)
