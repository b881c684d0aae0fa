"""Loaders: the built-in set, and students of any published layout."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..model.checkpoints.published import CARDS
from ..model.checkpoints.student import DEMO_STUDENT, WEIGHTS, StudentSource, student_metadata
from ..model.codecs.demo_vae import load_demo_codec
from .demo import DemoCLIP, DemoVAE
from .handle import CARD, CATEGORY, log


def load_model(path, weights="auto", card="auto", disable_dynamic=False):
    """A student file of any layout -> ComfyUI MODEL with its card. Raises ValueError, one line."""
    student = StudentSource(path, weights=weights, card=card).open()
    if student.note:
        log.warning("%s", student.note)
    options = {"disable_dynamic": True} if disable_dynamic else {}
    if student.is_plain:
        # ComfyUI reads it as it is, and so scaled float8 stays float8.
        model = comfy.sd.load_diffusion_model(str(path), **options)
    else:
        state = {name: student.tensor(name).to(student.dtype_of(name)) for name in student.named.tensors}
        metadata = student_metadata(student.config.num_heads, student.card)
        model = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, **options)
        # What ComfyUI calls when it needs the weights once more, for a second GPU.
        model.cached_patcher_init = (load_model, (path, weights, card))
    model.set_attachments(CARD, student.card)
    return model


class ContextForcingLoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingLoadDemo",
            display_name="Load Demo Student",
            category=CATEGORY,
            description="The built-in student of a small pixel-art world, with text encoder and codec. No download.",
            search_aliases=["context forcing", "demo", "long video"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The demo student, a small Wan network with its card."),
                io.Clip.Output(
                    "clip", tooltip="Knows meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; stays, pans."
                ),
                io.Vae.Output("vae", tooltip="The demo codec: 16 channels, 1/8 in space, 1/4 in time, like Wan's VAE."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(DEMO_STUDENT), DemoCLIP(), DemoVAE(load_demo_codec()))


class ContextForcingLoadStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingLoadStudent",
            display_name="Load Student",
            category=CATEGORY,
            description="A causal Wan 2.1 student as it is published - Self-Forcing, LongLive, Context Forcing, one of"
            " your own - with a card that says how it is sampled.",
            search_aliases=["context forcing", "causal wan", "self forcing", "longlive", "checkpoint", "pt", "pth"],
            inputs=[
                io.Combo.Input(
                    "student",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A .safetensors, .pt, .pth, .ckpt or .bin file in models/diffusion_models, in any published"
                    " layout. Of a model in parts, any part.",
                ),
                io.Combo.Input(
                    "weights", options=list(WEIGHTS), default="auto", optional=True, advanced=True,
                    tooltip="Which set a training checkpoint gives: generator, or its running mean generator_ema. auto:"
                    " what its authors use.",
                ),
                io.Combo.Input(
                    "card", options=list(CARDS), default="auto", optional=True,
                    tooltip="Which published student it is: decides steps, chunk and memory. auto: what is in the file;"
                    " where it does not say, Self-Forcing's, and the log says so.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The student with its card: steps, chunk and memory sizes.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, student: str, weights="auto", card="auto") -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", student)
        return io.NodeOutput(load_model(path, weights, card))
