"""Videos with captions, or prompts -> an encoded set (shards.py).

Shapes: C latent channels, T latent frames, F pixel frames, H W pixels, h w latents, L text tokens.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...memory.fields import quoted
from ...model.codecs.backbone import DEMO, WAN, backbone_of
from ...model.codecs.base import VAE, normalise
from ...model.codecs.demo_text import canonical_words, encode_demo_text
from ...model.codecs.demo_vae import DEMO_CODEC, load_demo_codec
from ...model.codecs.umt5 import load_umt5
from ...model.codecs.wan_vae import load_wan_vae
from ...model.device import dtype_named, pick_device
from ...model.fingerprint import fingerprint
from ...model.units import FRAMES_PER_LATENT, check_size, pixel_frames
from ...video.frames import to_pixels
from ...video.reading import VideoError, check_video, read_runs
from ..config import check_choice, check_range
from .manifest import Header, Manifest
from .parts import Parts
from .shards import ShardWriter
from .sources import Source, list_sources

WAN_FOLDERS = ("vae", "text_encoder", "tokenizer")
WAN_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How a source is encoded. Raises ValueError for a value out of range."""

    model: str = "demo"
    """`demo`, or a folder in diffusers' layout with Wan 2.1's VAE, UMT5 and its tokenizer."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, multiples of 16; None is the model's default."""
    fps: int = 16
    frames: int = 42
    """Latent frames of a clip, 1 + 4 (frames - 1) pixel frames."""
    max_clips: int | None = None
    """Stop when the set has this many clips."""
    dtype: str = "fp16"
    shard_mb: int = 256
    """Megabytes of a shard."""
    device: str = "auto"
    retry: bool = False
    """Try skipped sources again."""
    negative_prompt: str | None = None
    """Its text is stored beside the set, for guidance; None is the model's own, empty none."""

    @property
    def own_negative_prompt(self) -> str:
        """The negative prompt, also where it is the model's own."""
        own = backbone_of(self.model).negative_prompt
        return own if self.negative_prompt is None else self.negative_prompt

    def __post_init__(self):
        check_range(self, "fps", "frames", "shard_mb", least=1)
        if self.max_clips is not None:
            check_range(self, "max_clips", least=1)
        check_choice(self, "dtype", ("fp16", "bf16"))
        if self.size is not None:
            check_size(*self.size)


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match:
        raise ValueError(f"size: {quoted(text)} is not WIDTHxHEIGHT, for example 832x480")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Encoder:
    """A text encoder and, for videos, a VAE."""

    device: torch.device
    size: tuple[int, int]
    """Default width and height in pixels."""
    text: Callable[[str], Tensor]
    """Prompt -> float32 rows [L, 4096], without padding."""
    text_name: str
    """Fingerprint of the text encoder."""
    vae: VAE | None
    vae_name: str | None

    def latents(self, pixels_FHWC: np.ndarray) -> Tensor:
        """uint8 pixels, F = 1 + 4 (T - 1) -> normalised float32 latents [C, T, h, w]."""
        assert self.vae is not None
        return normalise(self.vae.encode(to_pixels(pixels_FHWC).to(self.device)))[0]


def load_encoder(settings: EncodeSettings, with_vae: bool) -> Encoder:
    """The encoder of `settings.model`. Nothing is downloaded; Wan's VAE runs in float32.

    Raises ValueError, one line, for missing or wrong files and missing libraries.
    """
    device, _ = pick_device(settings.device)
    if backbone_of(settings.model) is DEMO:
        rows = lambda prompt: encode_demo_text(prompt)[0, : len(set(canonical_words(prompt)))]
        vae_name = hashlib.sha256(DEMO_CODEC.read_bytes()).hexdigest()[:16]
        return Encoder(device, DEMO.size, rows, "demo", load_demo_codec().to(device), vae_name)
    folder = Path(settings.model)
    for name in WAN_FOLDERS[0 if with_vae else 1 :]:
        if not (folder / name).is_dir():
            raise ValueError(
                f"model: {folder} has no folder {name}; give `demo`, or a folder in diffusers' layout such as a"
                f" copy of {WAN_EXAMPLE} with {', '.join(WAN_FOLDERS)}"
            )
    vae = load_wan_vae(folder / "vae").to(device) if with_vae else None
    umt5 = load_umt5(folder / "text_encoder", device, folder / "tokenizer", resident=True)
    rows = lambda prompt: umt5.encode([prompt])[0]
    return Encoder(device, WAN.size, rows, umt5.name, vae, fingerprint(vae) if vae else None)


Load = Callable[[EncodeSettings, bool], Encoder]
"""As load_encoder."""


class SetEncoder:
    """Encodes a source into a set, or continues a set. Raises ValueError, one line, for a mistake of the user."""

    def __init__(
        self,
        path: str | Path,
        output: str | Path,
        settings: EncodeSettings,
        load: Load = load_encoder,
        sources: Sequence[Source] | None = None,
        clips_before: Mapping[str, int] | None = None,
        shard_bytes: int | None = None,
    ):
        """`sources` are all of `path` by default, `shard_bytes` those of `settings`.

        `clips_before` are the first clips of sources that are not to be encoded, because another set has them.
        """
        self.clips_before = clips_before or {}
        self.settings, self.sources = settings, sources or list_sources(Path(path))
        self.dtype = dtype_named(settings.dtype)
        of_videos = self.sources[0].video is not None
        self.encoder = load(settings, of_videos)
        self.size = settings.size or self.encoder.size
        header = Header(
            source=str(Path(path).resolve()),
            model="demo" if backbone_of(settings.model) is DEMO else Path(settings.model).resolve().name,
            vae=self.encoder.vae_name if of_videos else None,
            text_encoder=self.encoder.text_name,
            dtype=settings.dtype,
            fps=settings.fps if of_videos else None,
            size=self.size if of_videos else None,
            frames=settings.frames if of_videos else None,
        )
        self.writer = ShardWriter(output, header, shard_bytes or settings.shard_mb * 2**20)
        self.finished, self.skipped = self.writer.manifest.finished, self.writer.manifest.skipped
        """Number of clips of every finished source; reason of every skipped source."""
        self._num_before = self.num_clips

    def run(self, on_clip: Callable[[int], None] = lambda num_sources: None) -> None:
        """Encode what is missing. `on_clip` gets the number of processed sources after every clip and source."""
        self.add_texts()
        self.add_clips(on_clip)

    @torch.inference_mode()
    def add_texts(self) -> None:
        """The texts beside the clips, if the set does not have them."""
        negative = self.settings.own_negative_prompt
        self.writer.write_empty_text(lambda: self.encoder.text("").to(self.dtype))
        if negative:
            self.writer.write_negative_text(negative, lambda: self.encoder.text(negative).to(self.dtype))

    def add_clips(self, on_clip: Callable[[int], None] = lambda num_sources: None) -> None:
        """The clips that the set does not have."""
        self.parts = Parts(self.writer, self.sources, self.is_missing)
        self.add_sources(on_clip)
        self.parts.delete()

    @torch.inference_mode()
    def add_sources(self, on_clip: Callable[[int], None]) -> None:
        """The missing clips of all sources, into shards; after an interrupt or an error, those that are made."""
        try:
            for number, source in enumerate(self.sources):
                on_clip(number)
                if self.num_left == 0:
                    break
                if not self.is_missing(source):
                    continue
                try:
                    for _ in self.encode(source):
                        on_clip(number)
                except VideoError as error:
                    self.writer.skip(source.name, str(error))
                self.parts.end(source)
        finally:
            self.writer.flush()
        on_clip(len(self.sources))

    @property
    def num_clips(self) -> int:
        """Clips of the set, with those that are not written yet."""
        return self.writer.num_clips

    @property
    def new_clips(self) -> int:
        """Clips that this run added."""
        return self.num_clips - self._num_before

    @property
    def num_left(self) -> int | None:
        """Clips that the set can still take; None: any number."""
        most = self.settings.max_clips
        return None if most is None else max(0, most - self.writer.num_clips)

    def is_missing(self, source: Source) -> bool:
        """Whether a source is still to be encoded."""
        return source.name not in self.finished and (source.name not in self.skipped or self.settings.retry)

    def encode(self, source: Source) -> Iterator[None]:
        """Add the missing clips of a source; yields after every clip. Raises VideoError for a bad source."""
        if source.problem:
            raise VideoError(source.problem)
        count = self.clips_before.get(source.name, 0) + self.writer.clips_of(source.name)
        if left := self.parts.of[source.name].left:
            for _ in self.take(source, left):
                count += 1
                yield
            if source.name in self.finished:
                return
        text = self._stored(self.encoder.text(source.caption), "text")
        if source.video is None:
            if not count:
                self.writer.add(source.name, None, source.caption, {"text": text})
            self.writer.finish(source.name, 1)
            return
        check_video(source.video, source.start, source.end)
        fps, clip_frames, rest = self.settings.fps, pixel_frames(self.settings.frames), 0
        runs = read_runs(source.video, clip_frames, self.size, fps, start=source.start, end=source.end, skip=count)
        for pixels in runs:
            if len(pixels) < clip_frames:
                rest = len(pixels)
                break
            if self.num_left == 0:
                return
            latents = self._stored(self.encoder.latents(pixels), "latents")
            start = round(source.start + count * clip_frames / fps, 6)
            self.writer.add(source.name, start, source.caption, {"latents": latents, "text": text})
            count += 1
            yield
        if not count:
            seconds, most = clip_frames / fps, 1 + (rest - 1) // FRAMES_PER_LATENT
            remedy = f"; --frames {most} takes {pixel_frames(most)}" if rest else ""
            raise VideoError(
                f"too short: {rest} frames at {fps} frames/s, a clip takes {clip_frames} ({seconds:.2f} s){remedy}"
            )
        self.writer.finish(source.name, count)

    def take(self, source: Source, made: Manifest) -> Iterator[None]:
        """Add the missing clips of a source that a worker has made; yields after every clip.

        Raises VideoError if it skipped the source.
        """
        for entry in self.parts.missing(source, made):
            if self.num_left == 0:
                return
            self.writer.add(source.name, entry.start, entry.caption, self.parts.tensors(entry))
            yield
        if source.name in made.skipped:
            raise VideoError(made.skipped[source.name])
        if source.name in made.finished:
            self.writer.finish(source.name, made.finished[source.name])

    def _stored(self, tensor: Tensor, name: str) -> Tensor:
        stored = tensor.to(self.dtype).cpu()
        if not stored.isfinite().all():
            raise VideoError(f"its {name} are not finite in {self.settings.dtype}; bf16 has the range of float32")
        return stored
