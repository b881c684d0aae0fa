"""What a video begins with: a start image, or a clip to continue."""

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..memory.memory import Memory
from ..model.units import pixel_size
from ..video.frames import num_start_frames
from .handle import MemoryHandle, MemoryType
from .shared import CATEGORY


def encode_images(vae: io.Vae.Type, images: io.Image.Type, memory: Memory) -> Tensor:
    """Frames of a video, [T, H, W, 3] in 0..1, as latents of the VAE, resized and cropped to the size of a memory."""
    pixels = images[..., :3].movedim(-1, 1)
    pixels = comfy.utils.common_upscale(pixels, *pixel_size(memory.latent_size), "lanczos", "center")
    mm.throw_exception_if_processing_interrupted()
    return vae.encode(pixels.movedim(1, -1))


def clean_latents(raw: Tensor) -> Tensor:
    """Latents of a VAE as the network has them, float32, on the CPU. Raises ValueError if they are not of a video."""
    # The latent of an image has four axes, and would be broadcast.
    if raw.ndim != 5:
        raise ValueError(f"latent: shape {list(raw.shape)}; a video's is [1, 16, T, H/8, W/8]")
    return comfy.latent_formats.Wan21().process_in(raw.float().cpu())


class ContextForcingRemember(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingRemember", display_name="Start Image or Clip", category=CATEGORY,
            description="Begins the video of an empty memory with one image, the frames of a clip, or latents. They are"
            " part of the video; the first sampler continues from them under its prompt.",
            search_aliases=["context forcing", "i2v", "image to video", "first frame", "continue video", "v2v"],
            inputs=[
                MemoryType.Input("memory", tooltip="An empty memory. It sets the size of the video."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes images: the demo codec, or a Wan 2.1 VAE."),
                io.Image.Input("images", optional=True,
                    tooltip="One image, or the frames of a clip at the video's frame rate. They are resized and cropped"
                    " to the memory's size. 1 + 4k frames are used; up to three at the end are left out."),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Latents in place of images, for example a sampler's."),
            ],
            outputs=[MemoryType.Output("memory", tooltip="For the first sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, memory: MemoryHandle, vae: io.Vae.Type | None = None, images: io.Image.Type | None = None,
        latent: io.Latent.Type | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        before = memory.memory
        if images is None and latent is not None:
            raw = latent["samples"]
        elif images is None or latent is not None:
            raise ValueError("images: connect either images, with a vae, or latent")
        elif vae is None:
            raise ValueError("vae: images must be encoded; connect a VAE")
        else:
            raw = encode_images(vae, images[: num_start_frames(len(images))], before)
        return io.NodeOutput(MemoryHandle.of(before.with_start_latents(clean_latents(raw)), before))
