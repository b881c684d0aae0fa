"""Loaders of students: the built-in one, and files of any published layout."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..model.checkpoints.published import CARDS
from ..model.checkpoints.student import DEMO_STUDENT, WEIGHTS, StudentSource, student_metadata
from ..model.codecs.demo_vae import load_demo_codec
from .demo import DemoCLIP, DemoVAE
from .model_access import CARD, COMMIT
from .shared import ADVANCED, CATEGORY, log, named_as


def load_model(path: str, weights: str = "auto", card: str = "auto", disable_dynamic: bool = False) -> io.Model.Type:
    """A student file of any published layout as a MODEL with its card. Raises ValueError, one line."""
    student = StudentSource(path, weights=weights, card=card).open()
    if student.note:
        log.warning("%s", student.note)
    options = {"disable_dynamic": True} if disable_dynamic else {}
    if student.is_plain:
        # ComfyUI's loader keeps scaled float8 weights as they are.
        model = comfy.sd.load_diffusion_model(str(path), **options)
    else:
        state = {name: student.tensor(name).to(student.dtype_of(name)) for name in student.named.tensors}
        metadata = student_metadata(student.config.num_heads, student.card)
        model = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, **options)
        # ComfyUI calls this to load the weights again, for a second GPU.
        model.cached_patcher_init = (load_model, (path, weights, card))
        if student.named.commit:
            commit = comfy.sd.load_diffusion_model_state_dict(dict(student.named.commit), metadata=metadata, **options)
            commit.cached_patcher_init = (load_commit, (path, weights, card))
            model.set_additional_models(COMMIT, [commit])
    model.set_attachments(CARD, student.card)
    return model


def load_commit(path: str, weights: str, card: str, disable_dynamic: bool = False) -> io.Model.Type:
    """The MODEL of a student's commit pass."""
    return load_model(path, weights, card, disable_dynamic).get_additional_models_with_key(COMMIT)[0]


class ContextForcingLoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingLoadDemo",
            display_name="Load Demo Student",
            category=CATEGORY,
            description="The built-in student of a small pixel-art world, with text encoder and codec. No download.",
            search_aliases=["context forcing", "demo", "long video"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The demo student, a small Wan network with its card."),
                io.Clip.Output("clip", tooltip="The demo text encoder. The help page of this node lists its words."),
                io.Vae.Output("vae", tooltip="The demo codec: 16 channels, 1/8 in space, 1/4 in time, like Wan's VAE."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(str(DEMO_STUDENT)), DemoCLIP(), DemoVAE(load_demo_codec()))


class ContextForcingLoadStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingLoadStudent", display_name="Load Student", category=CATEGORY,
            description="Loads a causal Wan 2.1 student from a published file: Self-Forcing, LongLive, Context Forcing,"
            " or your own. Its card has the settings of sampler and memory.",
            search_aliases=["context forcing", "causal wan", "self forcing", "longlive", "checkpoint", "pt", "pth"],
            inputs=[
                io.Combo.Input("student", options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A .safetensors, .pt, .pth, .ckpt or .bin file in models/diffusion_models, in any published"
                    " layout. Of a model in several files, any one."),
                io.Combo.Input("weights", options=list(WEIGHTS), default="auto", **ADVANCED,
                    tooltip="Which weights of a training checkpoint: generator, or its moving average generator_ema."
                    " auto: those that its authors use."),
                io.Combo.Input("card", options=list(CARDS), default="auto", optional=True,
                    tooltip="The published student, which sets steps, chunk and memory. auto: the card in the file, or"
                    " Self-Forcing's if there is none; the log names it."),
            ],
            outputs=[io.Model.Output("model", tooltip="The student with its card: steps, chunk and memory sizes.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, student: str, weights: str = "auto", card: str = "auto") -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", student)
        with named_as("student", path, student):
            return io.NodeOutput(load_model(path, weights, card))
