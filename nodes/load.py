"""Loaders: the built-in set, and students of our own export."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..model.checkpoint import DEMO_STUDENT, load_demo_codec, read_card
from .demo import DemoCLIP, DemoVAE
from .types import CARD, CATEGORY


def load_model(path):
    """A student file -> ComfyUI MODEL with its card."""
    card = read_card(path)
    model = comfy.sd.load_diffusion_model(str(path))
    model.set_attachments(CARD, card)
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
            description="A student written by `context-forcing train`: a Wan network whose file says how to use it.",
            search_aliases=["context forcing", "causal wan", "self forcing"],
            inputs=[
                io.Combo.Input(
                    "student",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A .safetensors file in models/diffusion_models with a student card in its metadata.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The student with its card: steps, chunk and memory sizes.")],
        )

    @classmethod
    def execute(cls, student: str) -> io.NodeOutput:
        return io.NodeOutput(load_model(folder_paths.get_full_path_or_raise("diffusion_models", student)))
