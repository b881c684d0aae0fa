"""The video of a memory: decoded as a stream, and written to a file."""

import json
from collections.abc import Iterable, Iterator, Mapping

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.ldm.wan.vae import count_cache_layers
from comfy.taesd.taehv import TAEHV, MemBlock, TGrow
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..model.codecs.base import denormalise
from ..model.codecs.demo_vae import DemoCodec
from ..model.codecs.tiny import decode_tiny_stream
from ..model.codecs.wan_vae import decode_wan_stream
from ..model.units import LATENT_CHANNELS, pixel_frames, pixel_size
from ..video.mp4 import MAX_SCALE, default_scale, hold_output, write_video
from .handle import MemoryHandle, MemoryType
from .output_files import PREFIX_TOOLTIP, Prompt, new_file, validate_prefix
from .shared import ADVANCED, CATEGORY, named_as


def decode_stream(vae: io.Vae.Type, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Consecutive normalised latents -> consecutive pixels [1, 3, T, H, W] in [-1, 1].

    ComfyUI frees device memory before every chunk. Raises ValueError unless it is the demo codec, a Wan 2.1 VAE or its
    tiny decoder.
    """
    net = vae.first_stage_model

    def raw_latents() -> Iterator[Tensor]:
        for chunk in chunks:
            mm.throw_exception_if_processing_interrupted()
            mm.load_models_gpu([vae.patcher], memory_required=vae.memory_used_decode(chunk.shape, vae.vae_dtype))
            yield denormalise(chunk.to(vae.device, torch.float32)).to(vae.vae_dtype)

    if isinstance(net, DemoCodec):
        return net.decode_stream(raw_latents())
    if isinstance(net, TAEHV):
        check_tiny(net)
        return decode_tiny_stream(net.decoder, raw_latents(), MemBlock, TGrow)
    is_wan = hasattr(net, "decoder") and hasattr(net, "conv2") and vae.latent_dim == 3
    if not is_wan or vae.latent_channels != LATENT_CHANNELS:
        raise ValueError(f"vae: {type(net).__name__} is no Wan 2.1 VAE; load wan_2.1_vae, lighttaew2_1 or the demo's")
    return decode_wan_stream(net, raw_latents(), count_cache_layers(net.decoder))


def check_tiny(net: TAEHV) -> None:
    """Raises ValueError unless it is a tiny decoder that takes the latents of a Wan 2.1 VAE, as lighttaew2_1 does."""
    if net.latent_channels != LATENT_CHANNELS:
        raise ValueError(
            f"vae: a tiny decoder of {net.latent_channels} latent channels; load lighttaew2_1, for Wan 2.1"
        )
    if net.latent_format is not None:
        # ComfyUI cannot tell the two apart, and gives both the latents of HunyuanVideo.
        raise ValueError(
            "vae: ComfyUI takes a tiny decoder in float16 (taehv, taew2_1) for HunyuanVideo's; load lighttaew2_1"
        )


def graph_tags(prompt: Prompt | None, extra_pnginfo: Mapping[str, object] | None) -> dict[str, str]:
    """The workflow and the prompt as tags of a video, under the names that ComfyUI's page reads."""
    if args.disable_metadata:
        return {}
    tags = {**(extra_pnginfo or {}), "prompt": prompt}
    return {name: json.dumps(value) for name, value in tags.items() if value is not None}


class ContextForcingSaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingSaveVideo", display_name="Save Long Video", category=CATEGORY, is_output_node=True,
            description="Writes the video of a memory to an mp4 in the output folder, chunk by chunk. Memory use does"
            " not grow with the length of the video.",
            search_aliases=["context forcing", "mp4", "stream"],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                MemoryType.Input("memory", tooltip="The memory after the last sampler."),
                io.Vae.Input("vae", tooltip="The demo codec, a Wan 2.1 VAE, or its tiny decoder lighttaew2_1."),
                io.String.Input("filename_prefix", default="video/context_forcing", tooltip=PREFIX_TOOLTIP),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, step=1.0, tooltip="Frames per second."),
                io.Int.Input("scale", default=0, min=0, max=MAX_SCALE, advanced=True,
                    tooltip="Nearest-neighbour enlargement for pixel art. 0: until the shorter side has 360 pixels."),
                io.Int.Input("crf", default=16, min=0, max=51, **ADVANCED,
                    tooltip="H.264 quality. 0: lossless. 16: visually lossless. 28: a small file."),
            ],
            outputs=[io.Video.Output("video", tooltip="The file.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        return validate_prefix(filename_prefix)

    @classmethod
    def execute(
        cls, memory: MemoryHandle, vae: io.Vae.Type, filename_prefix: str, fps: float, scale: int, crf: int = 16
    ) -> io.NodeOutput:
        chunks, size = memory.memory.latent_chunks, pixel_size(memory.memory.latent_size)
        if not chunks:
            raise ValueError("memory: it has no video yet; connect the memory of a sampler")
        file = new_file(filename_prefix, ".mp4", cls.hidden.prompt, size)
        progress = comfy.utils.ProgressBar(max(1, pixel_frames(memory.memory.num_frames)))
        # No preview: ComfyUI's Vue nodes would take the picture for the video and fail to play it.
        count = lambda frames: progress.update(len(frames))
        with named_as("output", file.path, file.relative), hold_output(file.path):
            write_video(
                file.path, decode_stream(vae, chunks), fps=fps, scale=scale or default_scale(*size), crf=crf,
                on_frames=count, metadata=graph_tags(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            )  # fmt: skip
        return io.NodeOutput(InputImpl.VideoFromFile(file.path), ui=ui.PreviewVideo([file.shown]))
