"""What a video begins with: a start image, or a clip to continue."""

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io

from .handle import CATEGORY, MemoryHandle, MemoryType, log


class ContextForcingRemember(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingRemember",
            display_name="Start Image or Clip",
            category=CATEGORY,
            description="Gives an empty memory what the video begins with: one picture, the frames of a clip, or"
            " latents. They stay as they are in the video; the first sampler goes on from them under its prompt.",
            search_aliases=["context forcing", "i2v", "image to video", "first frame", "continue video", "v2v"],
            inputs=[
                MemoryType.Input("memory", tooltip="An empty memory: it decides the size of the video."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes images; the demo codec, or a Wan 2.1 VAE."),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="One picture, or the frames of a clip at the video's frame rate; resized and cropped to the"
                    " memory's size. 1 + 4k frames are taken, up to three at the end are left out.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="Latents instead of images, for example of a sampler: taken as they are, not decoded and"
                    " encoded again.",
                ),
            ],
            outputs=[MemoryType.Output("memory", tooltip="Goes into the first sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, memory, vae=None, images=None, latent=None) -> io.NodeOutput:
        if (images is None) == (latent is None):
            raise ValueError("images: connect either images, with a vae, or latent")
        if images is not None and vae is None:
            raise ValueError("vae: images must be encoded; connect a VAE")
        raw = encode(vae, images, memory.memory.latent_size) if latent is None else latent["samples"]
        # Before anything is spread over missing axes: a picture's latent has four.
        if raw.ndim != 5:
            raise ValueError(f"latent: shape {list(raw.shape)}; it must be a video's, [1, 16, T, H/8, W/8]")
        clean = comfy.latent_formats.Wan21().process_in(raw.float().cpu())
        return io.NodeOutput(MemoryHandle.of(memory.memory.with_start_latents(clean), memory.memory))


def encode(vae, images, latent_size):
    """Images [T, H, W, 3] in 0..1 -> raw latents [1, 16, 1 + k, h, w] of a memory's size."""
    whole = len(images) - (len(images) - 1) % 4
    if whole < len(images):
        log.info("%d of %d frames left out: 1 + 4k are taken", len(images) - whole, len(images))
    height, width = (side * 8 for side in latent_size[1:])
    pixels = comfy.utils.common_upscale(images[:whole, :, :, :3].movedim(-1, 1), width, height, "lanczos", "center")
    mm.throw_exception_if_processing_interrupted()
    return vae.encode(pixels.movedim(1, -1))
