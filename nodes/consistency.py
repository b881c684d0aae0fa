"""How far a video stays what it was, over time, beside its motion."""

from collections.abc import Iterator, Sequence

import comfy.model_management as mm
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui

from ..model.units import pixel_frames
from ..video.consistency import FeatureExtractor, describe, draw_consistency, measure_consistency, palette
from ..video.frames import to_uint8
from .handle import CATEGORY, MemoryType, as_image
from .video import decode_stream


def frames_of(memory, vae, images) -> Iterator[np.ndarray]:
    """Frames one by one, uint8 [H, W, 3]: of the film, decoded as a stream, or of an IMAGE batch."""
    if images is None:
        for run in decode_stream(vae, memory.memory.latent_chunks):
            yield from to_uint8(run)
    else:
        for image in images:
            mm.throw_exception_if_processing_interrupted()
            yield to_uint8(image[None, None, :, :, :3].movedim(-1, 1) * 2 - 1)[0]


def clip_extractor(clip_vision) -> FeatureExtractor:
    """What a CLIP_VISION makes of pictures: its image embeddings, of unit length."""

    def look(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        batch = torch.from_numpy(np.stack(pictures)).float() / 255
        return F.normalize(clip_vision.encode_image(batch).image_embeds.float(), dim=-1).cpu()

    return look


class ContextForcingConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingConsistency",
            display_name="Consistency over Time",
            category=CATEGORY,
            description="How alike the video stays to its first frame, second by second, always beside how much it"
            " moves: a still picture is perfectly consistent. A long video is decoded as a stream.",
            search_aliases=["context forcing", "drift", "clip similarity", "metrics", "motion"],
            is_output_node=True,
            inputs=[
                MemoryType.Input("memory", optional=True, tooltip="The end of any sampler: its whole video; with a vae."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the memory's video; the same as for Save Long Video."),
                io.Image.Input("images", optional=True, tooltip="Instead of a memory: the frames of any video."),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="Also compare by these image features (Load CLIP Vision): they see what is shown. Without it"
                    " only the palette is compared: which colours, not where.",
                ),
                io.Float.Input(
                    "every", default=1.0, min=0.01, max=60.0, step=0.05,
                    tooltip="Seconds between the frames that are compared; motion is taken from all frames.",
                ),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, tooltip="Frames per second of the video."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="Similarity and motion over time, as a picture."),
                io.String.Output("text", tooltip="The same in figures: mean, least and when, the end, motion."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, every, fps, memory=None, vae=None, images=None, clip_vision=None) -> io.NodeOutput:
        if (memory is None) == (images is None):
            raise ValueError("memory: connect either a memory, with a vae, or images")
        if memory is not None and vae is None:
            raise ValueError("vae: the memory's video must be decoded; connect a VAE")
        extractors = {"palette": palette} | ({"CLIP": clip_extractor(clip_vision)} if clip_vision is not None else {})
        total = pixel_frames(memory.memory.num_frames) if images is None else len(images)
        progress = comfy.utils.ProgressBar(max(1, total))

        def counted():
            for frame in frames_of(memory, vae, images):
                yield frame
                progress.update(1)

        curve = measure_consistency(counted(), fps, extractors, every)
        image = as_image(draw_consistency({"video": curve}))
        return io.NodeOutput(image, describe(curve), ui=ui.PreviewImage(image, cls=cls))
