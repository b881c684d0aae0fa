"""What a sampler shows while it runs: a line of text and a picture per chunk, and the film so far."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import comfy.latent_formats
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy.taesd.taehv import TAEHV
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..memory.history import reach_frames
from ..memory.memory import Memory
from ..model.codecs.base import VAE, denormalise
from ..model.units import FRAMES_PER_LATENT, latent_seconds
from ..video.frames import to_pixels, to_uint8
from ..video.mp4 import default_scale, join_videos, write_video
from .page import Page
from .shared import log
from .video import decode_stream

PREVIEW_CRF = 23

Preview = Callable[[Sequence[Tensor], bool], list[Image.Image]]
"""The next frames of a film, normalised latents [1, C, 1, H, W] each -> pictures of all, or at least of the last."""


def preview_of(vae: VAE | None) -> Preview | None:
    """With a VAE the true pictures, without one ComfyUI's approximation; None if ComfyUI's previews are off."""
    if vae is not None:
        return _each(lambda latents: Image.fromarray(to_uint8(vae.decode(denormalise(latents)))[0]))
    previewer = latent_preview.get_previewer(torch.device("cpu"), comfy.latent_formats.Wan21())
    tiny = getattr(previewer, "taesd", None)
    if tiny is not None and isinstance(tiny.first_stage_model, TAEHV):
        return _streamed(tiny)
    return previewer and _each(lambda latents: previewer.decode_latent_to_preview_image("JPEG", latents)[1])


def _each(picture_of: Callable[[Tensor], Image.Image]) -> Preview:
    """Every frame is decoded alone, so those before the last one may be left out."""
    return lambda frames, only_last: [picture_of(frame) for frame in (frames[-1:] if only_last else frames)]


def _streamed(tiny: io.Vae.Type) -> Preview:
    """A tiny decoder (ComfyUI's preview method TAESD) carries its state from frame to frame, as in the saved video."""
    waiting: list[Tensor] = []

    def latents() -> Iterator[Tensor]:
        while True:
            yield waiting.pop()

    pixels = decode_stream(tiny, latents())

    def preview(frames: Sequence[Tensor], only_last: bool) -> list[Image.Image]:
        pictures = []
        for frame in frames:
            waiting.append(frame)
            pictures.append(Image.fromarray(to_uint8(next(pixels))[-1]))
        return pictures

    return preview


def describe_progress(done: float, total: float, speed: float, fps: float, reach: float) -> str:
    """Seconds of video that are done and wanted, frames per second of work, what is left, and the memory's reach."""
    left = (total - done) * fps / speed
    left_text = f"{left:.0f} s left, " if left < 90 else f"{left / 60:.0f} min left, "
    speed_text = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
    return (
        f"{done:.1f} s of {total:.1f} s, {speed_text} frames/s, {left_text if done < total else ''}"
        f"memory reaches back {reach:.1f} s"
    )


class SegmentProgress:
    """The progress of one segment, and its pictures: one per latent frame."""

    def __init__(self, before: Memory, num_chunks: int, fps: float, preview: Preview | None):
        self._page, self._preview, self._fps = Page.current(), preview, fps
        self._bar, self._num_chunks = comfy.utils.ProgressBar(num_chunks), num_chunks
        self._began, self._first = time.monotonic(), before.num_frames
        self._pictures: list[np.ndarray] = []
        after = self._page.seconds_after(self._page.node) if self._page else 0.0
        self._total = latent_seconds(before.num_frames + num_chunks * before.config.chunk, fps) + after
        self._viewers = self._page.save_nodes(self._page.node) if self._page else []
        self._is_last = not after

    def show(self, memory: Memory, finished: int) -> tuple[str, Image.Image, int] | None:
        """Show the latest chunk of a memory, the `finished`-th of the segment. Returns ProgressBar's preview of it."""
        picture, side = None, latent_preview.MAX_PREVIEW_RESOLUTION
        if self._preview is not None:
            pictures = self._preview(memory.latent_chunks[-1].split(1, dim=2), not self._viewers)
            picture, self._pictures = pictures[-1], [*self._pictures, *map(np.asarray, pictures)]
            zoom = max(1, side // max(picture.size))
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
        shown = picture and ("JPEG", picture, side)
        self._bar.update_absolute(finished, self._num_chunks, shown)
        if self._page is not None:
            done, reach = (latent_seconds(frames, self._fps) for frames in (memory.num_frames, reach_frames(memory)))
            frames = (memory.num_frames - self._first) * FRAMES_PER_LATENT
            speed = frames / max(1e-6, time.monotonic() - self._began)
            self._page.show_text(describe_progress(done, self._total, speed, self._fps, reach))
        return shown

    def show_film(self, clips: tuple[str, ...], is_finished: bool) -> tuple[str, ...]:
        """Show the film so far where it will be saved, and return its clips with this segment's at the end.

        `clips` are those of the segments before, files of the temporary folder. Nothing is written if nobody would see
        it: the last segment is shown by Save Long Video, unless it was interrupted. A failure is logged, not raised.
        """
        if self._page is None or not self._viewers or not self._pictures or (is_finished and self._is_last):
            return clips
        try:
            folder = folder_paths.get_temp_directory()
            os.makedirs(folder, exist_ok=True)
            clip = os.path.join(folder, f"context_forcing_clip_{uuid.uuid4().hex}.mp4")
            film = _film_to(clip)
            pixels = to_pixels(np.stack(self._pictures))
            scale = default_scale(*self._pictures[0].shape[1::-1])
            write_video(clip, [pixels], fps=self._fps / FRAMES_PER_LATENT, scale=scale, crf=PREVIEW_CRF)
            clips = (*clips, clip)
            join_videos([each for each in clips if os.path.isfile(each)], film)
        except (ValueError, OSError) as error:
            log.warning("preview of the film: %s", error)
            return clips
        for node in self._viewers:
            self._page.show_video(node, os.path.basename(film))
        for clip in clips[-2:-1]:
            with contextlib.suppress(OSError):  # a branch has deleted it, or it is in use
                os.unlink(_film_to(clip))  # all films of a long chain would need far more disk than the last
        return clips


def _film_to(clip: str) -> str:
    """The path of the film that ends with a clip."""
    folder, name = os.path.split(clip)
    return os.path.join(folder, name.replace("_clip_", "_film_"))
