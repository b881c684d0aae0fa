"""What the page shows of a finished segment: a thumbnail, and which frames are remembered after it."""

import base64
import io
from typing import Any

import comfy.latent_formats
import latent_preview
from PIL import Image

from ..memory.history import REFERENCE, reach_frames, remembered_parts
from ..memory.memory import Memory
from ..model.units import latent_seconds

KEY = "context_forcing_segment"
"""Under this name the page finds a segment in a sampler's `executed` event. ComfyUI draws nothing for it."""
THUMBNAIL = (192, 192)
"""Width and height at most, in pixels."""


def data_url(picture: Image.Image) -> str:
    """A small JPEG of the picture that a page can show without a file."""
    small = picture.convert("RGB")
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def segment_ui(
    memory: Memory, num_chunks: int, fps: float, shown: tuple[str, Image.Image, int] | None
) -> dict[str, list[dict[str, Any]]]:
    """The ui output of a sampler whose last `num_chunks` chunks are the segment. Times are in latent frames.

    `shown` is the last preview. Without one, the thumbnail is an approximate picture of the last latent frame.
    """
    if shown is None:
        space = comfy.latent_formats.Wan21()
        previewer = latent_preview.Latent2RGBPreviewer(space.latent_rgb_factors, space.latent_rgb_factors_bias)
        picture = previewer.decode_latent_to_preview(memory.latent_chunks[-1][:, :, -1:])
    else:
        picture = shown[1]
    segment = {
        "thumbnail": data_url(picture),
        "begins": memory.num_frames - num_chunks * memory.config.chunk,
        "ends": memory.num_frames,
        "fps": fps,
        "chunk": memory.config.chunk,
        "frame_seconds": latent_seconds(1, fps),
        "reach": reach_frames(memory),
        "remembered": {part: list(frames) for part, frames in remembered_parts(memory).items() if part != REFERENCE},
    }
    return {KEY: [segment]}
