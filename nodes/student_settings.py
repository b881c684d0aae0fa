"""Settings of a student whose file has no card."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..memory.fields import quoted
from ..model.checkpoints.published import PUBLISHED, published_student
from ..model.config import StudentCard
from ..model.flow import SOLVERS
from .model_access import CARD, wan_network
from .shared import CATEGORY, UNCHANGED, frames_input

AS_IS = "as is"


def with_settings(
    card: StudentCard, steps: str, shift: float, solver: str, fps: int, sizes: Mapping[str, int]
) -> StudentCard:
    """The card with the settings that are not left as is. Raises ValueError if steps are not numbers with commas."""
    memory = dataclasses.replace(card.memory, **{name: size for name, size in sizes.items() if size != UNCHANGED})
    settings: dict[str, Any] = {"shift": shift, "fps": fps, "solver": solver}
    settings = {name: value for name, value in settings.items() if value not in (0, AS_IS)}
    if steps.strip():
        try:
            settings["steps"] = tuple(float(part) for part in steps.split(","))
        except ValueError:
            raise ValueError(f"steps: {quoted(steps)} is not a list of numbers such as 1000, 750, 500, 250") from None
        settings["first_steps"] = ()  # the same steps for all chunks
    return dataclasses.replace(card, memory=memory, **settings)


class ContextForcingStudentSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingStudentSettings", display_name="Student Settings", category=CATEGORY,
            description="Sets the card of a student whose file has none: a model from Load Diffusion Model, a GGUF"
            " loader or another pack. Connect it to the loader. Other nodes take their defaults from the card.",
            search_aliases=["context forcing", "student card", "steps", "shift", "timesteps", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 text-to-video student, from any loader."),
                io.String.Input("steps", default="",
                    tooltip="Denoising steps from 1000 down, before the shift, separated by commas: 1000, 750, 500, 250"
                    " for most distilled students. Empty: as is."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Moves the steps towards noise; 5 for most students. A ModelSamplingSD3 node replaces it."
                    " 0: as is."),
                io.Combo.Input("solver", options=[AS_IS, *SOLVERS], default=AS_IS, advanced=True,
                    tooltip="renoise: new noise in every step, for distilled students. euler: one noise, for models"
                    " trained by flow matching only."),
                io.Int.Input("fps", default=0, min=0, max=240, advanced=True,
                    tooltip="Frames per second; 16 for Wan 2.1. 0: as is."),
                frames_input("chunk", "Frames generated together: 3, or 1 for framewise students.", AS_IS),
                frames_input("window", "Most frames seen at once in training, remembered and new: 21.", AS_IS),
                frames_input("sink", "The first frames of the video, in the window; 0: none.", AS_IS),
                frames_input("slow", "Keyframes, in the window; 0: no slow memory.", AS_IS),
                frames_input("fast", "The latest frames, with the chunk being generated.", AS_IS),
                io.Combo.Input("card", options=[AS_IS, *PUBLISHED], default=AS_IS, optional=True,
                    tooltip="A published student whose settings are used. The inputs above replace single settings."),
            ],
            outputs=[io.Model.Output("model", tooltip="The same model with these settings.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, steps: str, shift: float, solver: str, fps: int, card: str = AS_IS, **sizes: int
    ) -> io.NodeOutput:
        """`sizes` are chunk, window, sink, slow and fast."""
        wan_network(model)
        base = published_student(card).card if card != AS_IS else model.get_attachment(CARD) or StudentCard()
        model = model.clone()
        model.set_attachments(CARD, with_settings(base, steps, shift, solver, fps, sizes))
        return io.NodeOutput(model)
