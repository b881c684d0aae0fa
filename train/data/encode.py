"""Videos with captions, or prompts, -> a set of shards (shards.py): what a trainer of real students reads.

Shapes: C latent channels, T latent frames, F pixel frames, H W pixels, h w latents, L text tokens.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...model.codecs.backbone import DEMO, WAN, backbone_of
from ...model.codecs.base import normalise
from ...model.codecs.demo_text import canonical_words, encode_demo_text
from ...model.codecs.demo_vae import DEMO_CODEC, load_demo_codec
from ...model.codecs.umt5 import load_umt5
from ...model.codecs.wan_vae import load_wan_vae
from ...model.device import pick_device
from ...model.fingerprint import fingerprint
from ...model.units import check_size, pixel_frames
from ...video.frames import to_pixels
from ...video.reading import VideoError, check_video, read_runs
from .shards import Header, ShardWriter
from .sources import Source, list_sources

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WAN_FOLDERS = ("vae", "text_encoder", "tokenizer")
WAN_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How a source is encoded. Raises ValueError for a value out of range."""

    model: str = "demo"
    """`demo`, or a folder in diffusers' layout with Wan 2.1's VAE, UMT5 and its tokenizer."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, multiples of 16; None is 128 x 64 for the demo codec, 832 x 480 for Wan's."""
    fps: int = 16
    frames: int = 42
    """Latent frames of a clip: 1 + 4 (frames - 1) pixel frames."""
    max_clips: int | None = None
    """Stop when the set holds so many."""
    dtype: str = "fp16"
    shard_mb: int = 256
    """A shard is closed when it holds so many megabytes."""
    device: str = "auto"
    retry: bool = False
    """Try skipped sources again."""

    def __post_init__(self):
        for name in ("fps", "frames", "shard_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be 1 or more")
        if self.max_clips is not None and self.max_clips < 1:
            raise ValueError(f"max_clips: {self.max_clips} must be 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.size is not None:
            check_size(*self.size)


@dataclass(kw_only=True)
class Summary:
    """What a run has made, and what the set holds with that of earlier runs."""

    clips: int = 0
    new_clips: int = 0
    through: int = 0
    """Sources that are through."""
    skipped: dict[str, str] = field(default_factory=dict)


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match:
        raise ValueError(f"size: {text!r} is not WIDTHxHEIGHT, for example 832x480")
    return int(match[1]), int(match[2])


class Encoder(Protocol):
    """A VAE and a text encoder. `vae` and `text_encoder` are their fingerprints; `size` is the default."""

    vae: str | None
    text_encoder: str
    size: tuple[int, int]

    def latents(self, pixels_FHWC: np.ndarray) -> Tensor:
        """uint8 pixels, F = 1 + 4 (T - 1) -> normalised float32 latents [C, T, h, w]."""

    def text(self, prompt: str) -> Tensor:
        """float32 rows [L, 4096], without padding."""


class DemoEncoder:
    """The demo student's codec and text encoder."""

    size = DEMO.size
    text_encoder = "demo"

    def __init__(self, device: torch.device):
        self.vae = hashlib.sha256(DEMO_CODEC.read_bytes()).hexdigest()[:16]
        self.device = device
        self._codec = load_demo_codec().to(device)

    def latents(self, pixels_FHWC: np.ndarray) -> Tensor:
        return normalise(self._codec.encode(to_pixels(pixels_FHWC).to(self.device)))[0]

    def text(self, prompt: str) -> Tensor:
        return encode_demo_text(prompt)[0, : len(set(canonical_words(prompt)))]


class WanEncoder:
    """Wan 2.1's VAE in float32 and UMT5, from a local folder; nothing is downloaded.

    Raises ValueError, one line, for a folder without them, weights of something else, or missing libraries.
    """

    size = WAN.size

    def __init__(self, folder: Path, device: torch.device, with_vae: bool):
        for name in WAN_FOLDERS[0 if with_vae else 1 :]:
            if not (folder / name).is_dir():
                raise ValueError(
                    f"model: {folder} has no folder {name}; give `demo`, or a folder in diffusers' layout such as a"
                    f" copy of {WAN_EXAMPLE} with {', '.join(WAN_FOLDERS)}"
                )
        self.device, self.vae = device, None
        if with_vae:
            self._vae = load_wan_vae(folder / "vae").to(device)
            self.vae = fingerprint(self._vae)
        self._umt5 = load_umt5(folder / "text_encoder", device, folder / "tokenizer", resident=True)
        self.text_encoder = self._umt5.name

    def latents(self, pixels_FHWC: np.ndarray) -> Tensor:
        return normalise(self._vae.encode(to_pixels(pixels_FHWC).to(self.device)))[0]

    def text(self, prompt: str) -> Tensor:
        return self._umt5.encode([prompt])[0]


def load_encoder(settings: EncodeSettings, with_vae: bool) -> Encoder:
    """What `settings.model` names. Raises ValueError where it is not there."""
    device, _ = pick_device(settings.device, "auto")
    if backbone_of(settings.model) is DEMO:
        return DemoEncoder(device)
    return WanEncoder(Path(settings.model), device, with_vae)


def make_header(path: Path, settings: EncodeSettings, encoder: Encoder, of_videos: bool) -> Header:
    """What the set of this source would be."""
    shared = dict(source=str(path.resolve()), text_encoder=encoder.text_encoder, dtype=settings.dtype)
    name = settings.model if backbone_of(settings.model) is DEMO else Path(settings.model).resolve().name
    if not of_videos:
        return Header(**shared, model=name, vae=None)
    return Header(
        **shared,
        model=name,
        vae=encoder.vae,
        fps=settings.fps,
        size=settings.size or encoder.size,
        frames=settings.frames,
    )


class SetEncoder:
    """One run over a source: what the set holds already is not done again."""

    def __init__(self, path: Path, output: Path, settings: EncodeSettings):
        self.settings = settings
        self.sources = list_sources(path)
        of_videos = self.sources[0].video is not None
        self.encoder = load_encoder(settings, of_videos)
        self.header = make_header(path, settings, self.encoder, of_videos)
        self.writer = ShardWriter(output, self.header, settings.shard_mb * 2**20)
        self.before = self.writer.num_clips

    @torch.inference_mode()
    def run(self, on_clip: Callable[[int, Summary], None] = lambda done, summary: None) -> Summary:
        """Encode what is missing; `on_clip` sees the number of sources looked at, after every clip and source."""
        if not self.writer.has_empty_text():
            self.writer.write_empty_text(self.encoder.text("").to(DTYPES[self.settings.dtype]))
        for done, source in enumerate(self.sources):
            on_clip(done, self.summary())
            if self._is_full():
                break
            skipped = source.name in self.writer.manifest.skipped and not self.settings.retry
            if skipped or source.name in self.writer.manifest.finished:
                continue
            try:
                for _ in self._encode(source):
                    on_clip(done, self.summary())
            except VideoError as error:
                self.writer.skip(source.name, str(error))
        self.writer.flush()
        summary = self.summary()
        on_clip(len(self.sources), summary)
        return summary

    def summary(self) -> Summary:
        manifest, clips = self.writer.manifest, self.writer.num_clips
        return Summary(
            clips=clips, new_clips=clips - self.before, through=len(manifest.finished), skipped=manifest.skipped
        )

    def _is_full(self) -> bool:
        return self.settings.max_clips is not None and self.writer.num_clips >= self.settings.max_clips

    def _encode(self, source: Source) -> Iterator[None]:
        """Add what is missing of one source; yields after every clip. Raises VideoError for one that cannot be used."""
        if source.problem:
            raise VideoError(source.problem)
        text = self._stored(self.encoder.text(source.caption), "text")
        if source.video is None:
            self.writer.add(source.name, None, source.caption, {"text": text})
            self.writer.finish(source.name, 1)
            return
        check_video(source.video, source.start, source.end)
        clip_frames, count, left = pixel_frames(self.settings.frames), self.writer.clips_of(source.name), 0
        runs = read_runs(
            source.video, clip_frames, self.header.size, self.header.fps, start=source.start, end=source.end, skip=count
        )
        for pixels in runs:
            if len(pixels) < clip_frames:
                left = len(pixels)
                break
            if self._is_full():
                runs.close()
                return
            latents = self._stored(self.encoder.latents(pixels), "latents")
            start = round(source.start + count * clip_frames / self.header.fps, 6)
            self.writer.add(source.name, start, source.caption, {"latents": latents, "text": text})
            count += 1
            yield
        if not count:
            raise VideoError(
                f"too short: {left} frames at {self.header.fps} frames/s, a clip takes {clip_frames}"
                f" ({clip_frames / self.header.fps:.2f} s)"
            )
        self.writer.finish(source.name, count)

    def _stored(self, tensor: Tensor, what: str) -> Tensor:
        stored = tensor.to(DTYPES[self.settings.dtype]).cpu()
        if not stored.isfinite().all():
            raise VideoError(f"its {what} are not finite in {self.settings.dtype}; bf16 has the range of float32")
        return stored


def encode(
    source: str | Path,
    output: str | Path,
    settings: EncodeSettings,
    on_clip: Callable[[int, Summary], None] = lambda done, summary: None,
) -> Summary:
    """Encode a source into a set, or go on with it. Raises ValueError, one line, for what a user can cause."""
    return SetEncoder(Path(source), Path(output), settings).run(on_clip)
