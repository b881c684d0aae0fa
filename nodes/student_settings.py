"""How a student is used: for files that do not say it themselves."""

import dataclasses

from comfy_api.latest import io

from ..model.checkpoints.published import PUBLISHED, published_student
from ..model.config import StudentCard
from ..model.flow import SOLVERS
from .handle import CARD, CATEGORY, wan_network

AS_IS = "as is"


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas. Raises ValueError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"steps: {text!r} is not a list of numbers such as 1000, 750, 500, 250") from None


class ContextForcingStudentSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        frames = lambda name, tooltip: io.Int.Input(
            name, default=-1, min=-1, max=1024, tooltip=f"{tooltip} In latent frames (4 frames each); -1: as is."
        )
        return io.Schema(
            node_id="ContextForcingStudentSettings",
            display_name="Student Settings",
            category=CATEGORY,
            description="Says how a student was trained, where its file does not: for a model from Load Diffusion"
            " Model, a GGUF loader and the like. Put it right behind the loader; every other node takes its defaults from it.",
            search_aliases=["context forcing", "student card", "steps", "shift", "timesteps", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 text-to-video student, from any loader."),
                io.String.Input(
                    "steps", default="",
                    tooltip="Denoising steps from 1000 down, before the shift, with commas: 1000, 750, 500, 250 for"
                    " most distilled students. Empty: as is.",
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Moves the steps towards noise; 5 for most students. The shift of a ModelSamplingSD3"
                    " node is used instead, where there is one. 0: as is.",
                ),
                io.Combo.Input(
                    "solver", options=[AS_IS, *SOLVERS], default=AS_IS,
                    tooltip="renoise: fresh noise in every step, for distilled students. euler: one noise, for models"
                    " trained by flow matching alone.",
                ),
                io.Int.Input(
                    "fps", default=0, min=0, max=240,
                    tooltip="Frames per second of its videos; 16 for Wan 2.1. 0: as is.",
                ),
                frames("chunk", "How many frames it makes together: 3, or 1 for framewise students."),
                frames("window", "The most frames it was trained to see at once, remembered and new together: 21."),
                frames("sink", "Of these, the video's first frames; 0: none."),
                frames("slow", "Keyframes; 0: no slow memory."),
                frames("fast", "The latest frames, the chunk being made included."),
                io.Combo.Input(
                    "card", options=[AS_IS, *PUBLISHED], default=AS_IS, optional=True,
                    tooltip="A published student whose settings these are; what is set above replaces single ones.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The same model with these settings.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, steps, shift, solver, fps, chunk, window, sink, slow, fast, card=AS_IS) -> io.NodeOutput:
        wan_network(model)
        card = published_student(card).card if card != AS_IS else model.get_attachment(CARD) or StudentCard()
        sizes = {"chunk": chunk, "window": window, "sink": sink, "slow": slow, "fast": fast}
        memory = dataclasses.replace(card.memory, **{name: size for name, size in sizes.items() if size != -1})
        chosen = {"shift": shift, "fps": fps, "solver": "" if solver == AS_IS else solver}
        chosen["steps"] = numbers(steps) if steps.strip() else ()
        if chosen["steps"]:
            card = dataclasses.replace(card, first_steps=())  # one list for all chunks
        card = dataclasses.replace(card, memory=memory, **{name: value for name, value in chosen.items() if value})
        model = model.clone()
        model.set_attachments(CARD, card)
        return io.NodeOutput(model)
