"""The film of a memory as a video file, decoded and encoded as a stream."""

import os
from collections.abc import Iterable, Iterator

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy.ldm.wan.vae import count_cache_layers
from comfy_api.latest import InputImpl, io, ui

from ..model.codecs.base import denormalise
from ..model.codecs.demo_vae import DemoCodec
from ..model.codecs.wan_vae import decode_wan_stream
from ..model.units import pixel_frames
from ..video.mp4 import default_scale, hold_output, write_video
from .handle import CATEGORY, MemoryType


def decode_stream(vae, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Consecutive normalised latents -> consecutive pixels [1, 3, T, H, W] in [-1, 1].

    Through the demo codec or any Wan 2.1 VAE; ComfyUI's memory management makes room. Raises ValueError for others.
    """
    net = vae.first_stage_model

    def raw() -> Iterator[torch.Tensor]:
        for chunk in chunks:
            mm.throw_exception_if_processing_interrupted()
            mm.load_models_gpu([vae.patcher], memory_required=vae.memory_used_decode(chunk.shape, vae.vae_dtype))
            yield denormalise(chunk.to(vae.device, torch.float32)).to(vae.vae_dtype)

    if isinstance(net, DemoCodec):
        return net.decode_stream(raw())
    if not hasattr(net, "decoder") or not hasattr(net, "conv2") or vae.latent_channels != 16 or vae.latent_dim != 3:
        raise ValueError(f"vae: {type(net).__name__} is not a Wan 2.1 VAE; load wan_2.1_vae or the demo's")
    return decode_wan_stream(net, raw(), count_cache_layers(net.decoder))


class ContextForcingSaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingSaveVideo",
            display_name="Save Long Video",
            category=CATEGORY,
            description="Writes the whole video of a memory to an mp4 in the output folder, chunk by chunk: memory use"
            " does not grow with length.",
            search_aliases=["context forcing", "mp4", "stream"],
            is_output_node=True,
            inputs=[
                MemoryType.Input("memory", tooltip="The end of the chain."),
                io.Vae.Input("vae", tooltip="The demo codec, or a Wan 2.1 VAE."),
                io.String.Input(
                    "filename_prefix", default="video/context_forcing",
                    tooltip="Name of the file, with folders under ComfyUI's output folder.",
                ),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, step=1.0, tooltip="Frames a second; Wan: 16."),
                io.Int.Input(
                    "scale", default=0, min=0, max=64,
                    tooltip="Nearest-neighbour enlargement for pixel art. 0: as much as brings the shorter side to 360"
                    " pixels, 1 from there up.",
                ),
                io.Int.Input(
                    "crf", default=16, min=0, max=51, optional=True, advanced=True,
                    tooltip="H.264 quality: 0 lossless, 16 visually so, 28 small.",
                ),
            ],
            outputs=[io.Video.Output("video", tooltip="The written file.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, memory, vae, filename_prefix, fps, scale, crf=16) -> io.NodeOutput:
        memory = memory.memory
        height, width = (side * 8 for side in memory.latent_size[1:])
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        file = f"{name}_{counter:05}_.mp4"
        progress = comfy.utils.ProgressBar(max(1, pixel_frames(memory.num_frames)))
        written = 0

        def count(frames):
            # Without a preview: the page's Vue nodes would take it for the video and fail to play it.
            nonlocal written
            written += len(frames)
            progress.update_absolute(written)

        path = os.path.join(folder, file)
        scale = scale or default_scale(width, height)
        with hold_output(path):
            write_video(path, decode_stream(vae, memory.latent_chunks), fps=fps, scale=scale, crf=crf, on_frames=count)
        return io.NodeOutput(
            InputImpl.VideoFromFile(path), ui=ui.PreviewVideo([ui.SavedResult(file, subfolder, io.FolderType.output)])
        )
