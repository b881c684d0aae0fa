"""What several nodes declare: the log, the category, inputs and outputs."""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS
from comfy_api.latest import io, ui
from PIL import Image

from ..memory.fields import one_line
from ..memory.packed import KV_DTYPES
from ..memory.stores import KV_PLACEMENTS

log = logging.getLogger("context_forcing")

CATEGORY = "Context Forcing"
PLACES = ("RAM", "GPU", "compact")
UNCHANGED = -1
"""Value of an input for a number of latent frames that leaves the card's number."""
ADVANCED = {"optional": True, "advanced": True}
"""Of an input that a beginner does not need. Required ones have `advanced` alone: as optional ones they would move
to the end, and saved graphs depend on the order."""


def frames_input(name: str, tooltip: str, unchanged: str) -> io.Input:
    """A number of latent frames."""
    tooltip = f"{tooltip} In latent frames, 4 video frames each. -1: {unchanged}."
    return io.Int.Input(name, default=UNCHANGED, min=UNCHANGED, max=1024, tooltip=tooltip, advanced=True)


def seed_input(tooltip: str) -> io.Input:
    fixed = io.ControlAfterGenerate.fixed
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=fixed, tooltip=tooltip)


def attention_names() -> list[str]:
    """The choices of a sampler's attention: ours, then what ComfyUI registers on this machine."""
    return ["sdpa", "comfyui", *REGISTERED_ATTENTION_FUNCTIONS]


def attention_input() -> io.Input:
    tooltip = (
        "sdpa: PyTorch's exact attention. comfyui: the attention that ComfyUI was started with (sage, flash, xformers),"
        " or that another node set on the MODEL. Others: what is installed here by name, tested once against sdpa; one"
        " that fails is an error. Quantised attention (sage, sage3, int8) drifts in long videos."
    )
    return io.Combo.Input("attention", options=attention_names(), default="sdpa", tooltip=tooltip, **ADVANCED)


def storage_inputs() -> list[io.Input]:
    """Where a memory is between nodes, in files, and during sampling."""
    return [
        io.Combo.Input("keep_in", options=list(PLACES), default="RAM", **ADVANCED,
            tooltip="Where the memory is kept until the next node. RAM: exact. GPU: exact, without copies, uses video"
            " memory. compact: no keys and values, smallest; the next sampler computes them again, not bit for bit."),
        io.Boolean.Input("autosave", default=False, **ADVANCED,
            tooltip="Also write the memory to output/context_forcing after every segment, and after an interrupt. Load"
            " Memory continues from the file. Files are compact; with policy released they cannot be (about 5 GB), and"
            " the file of the segment before is deleted."),
        io.Combo.Input("layout", options=list(KV_PLACEMENTS), default="at once", **ADVANCED,
            tooltip="Where keys and values are during sampling; the video is the same. at once: fastest, twice the"
            " memory's size in video memory. by layer: once its size, slower. from RAM: least, slow."),
    ]  # fmt: skip


def kv_dtype_input() -> io.Input:
    """Apart from storage_inputs, because it is newer: inputs are only appended."""
    tooltip = (
        "How keys and values of sink and slow frames are stored. auto: as computed. int8, fp8: one byte a number, a"
        " smaller memory and another video; not with policy released."
    )
    return io.Combo.Input("kv_dtype", options=list(KV_DTYPES), default="auto", tooltip=tooltip, **ADVANCED)


@contextlib.contextmanager
def named_as(field: str, path: str, name: str) -> Iterator[None]:
    """ValueErrors of the block say `field` and the `name` that the user knows, not a path of the server."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace(path, name)
        raise ValueError(one_line(text if text.startswith(f"{field}: ") else f"{field}: {text}")) from None


def picture_output(picture: Image.Image, text: str, node: type[io.ComfyNode]) -> io.NodeOutput:
    """A picture as IMAGE, [1, H, W, 3] in 0..1, and a text; the node shows the picture."""
    image = torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255
    return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=node))
