"""Similarity of a video's frames to its first frame over time, and its motion."""

from collections.abc import Iterator, Sequence

import comfy.model_management as mm
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..model.units import pixel_frames
from ..video.consistency import FeatureExtractor, describe, draw_consistency, measure_consistency, palette
from ..video.frames import to_uint8
from .handle import MemoryHandle, MemoryType
from .shared import CATEGORY, picture_output
from .video import decode_stream


def frames_of(pixels: Iterator[torch.Tensor], total: int) -> Iterator[np.ndarray]:
    """Pixels [1, 3, T, H, W] in [-1, 1] -> frames, uint8 [H, W, 3]. Reports progress and honours interrupts."""
    progress = comfy.utils.ProgressBar(max(1, total))
    for part in pixels:
        mm.throw_exception_if_processing_interrupted()
        yield from to_uint8(part)
        progress.update(part.shape[2])


def clip_extractor(clip_vision: io.ClipVision.Type) -> FeatureExtractor:
    """Image embeddings of a CLIP_VISION, of unit length."""

    def embed(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        batch = torch.from_numpy(np.stack(pictures)).float() / 255
        return F.normalize(clip_vision.encode_image(batch).image_embeds.float(), dim=-1).cpu()

    return embed


class ContextForcingConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingConsistency", display_name="Consistency over Time", category=CATEGORY,
            description="Measures the similarity of a video's frames to its first frame over time, and the motion of"
            " the video. A still video is perfectly consistent. A long video is decoded as a stream.",
            search_aliases=["context forcing", "drift", "clip similarity", "metrics", "motion"], is_output_node=True,
            inputs=[
                MemoryType.Input("memory", optional=True, tooltip="The memory after any sampler. It needs a vae."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the memory's video, as for Save Long Video."),
                io.Image.Input("images", optional=True, tooltip="The frames of any video, in place of a memory."),
                io.ClipVision.Input("clip_vision", optional=True,
                    tooltip="Also compares image embeddings, which depend on what is shown (Load CLIP Vision). Without"
                    " it only the palette is compared: which colours, not where."),
                io.Float.Input("every", default=1.0, min=0.01, max=60.0, step=0.05,
                    tooltip="Seconds between the frames that are compared. Motion is measured over all frames."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, advanced=True,
                    tooltip="Frames per second of the video."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Plot of similarity and motion over time."),
                io.String.Output("text", tooltip="Similarity: mean, lowest with its time, at the end. Motion."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, every: float, fps: float, memory: MemoryHandle | None = None, vae: io.Vae.Type | None = None,
        images: io.Image.Type | None = None, clip_vision: io.ClipVision.Type | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if memory is None and images is not None:
            pixels, total = (image[None, None, :, :, :3].movedim(-1, 1) * 2 - 1 for image in images), len(images)
        elif memory is None or images is not None:
            raise ValueError("memory: connect either a memory, with a vae, or images")
        elif vae is None:
            raise ValueError("vae: the memory's video must be decoded; connect a VAE")
        else:
            video = memory.memory
            pixels, total = decode_stream(vae, video.latent_chunks), pixel_frames(video.num_frames)
        extractors = {"palette": palette} | ({"CLIP": clip_extractor(clip_vision)} if clip_vision else {})
        curve = measure_consistency(frames_of(pixels, total), fps, extractors, every)
        return picture_output(draw_consistency({"video": curve}), describe(curve), cls)
