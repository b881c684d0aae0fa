"""A student with its text encoder and VAE: stories to memories chunk by chunk, latents to pixels as a stream."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..memory.memory import Memory, empty_memory
from ..memory.references import Reference
from ..model.checkpoints.student import StudentFile
from ..model.codecs.backbone import Codecs, backbone_of
from ..model.codecs.base import VAE, TextEncoder, denormalise, normalise
from ..model.config import StudentCard
from ..model.fallback import NO_FALLBACK, Fallback
from ..model.fingerprint import fingerprint
from ..model.network import Network, run_directly
from ..model.offload import Offload
from ..model.sampler import CausalSampler, SamplerOptions, make_sampler
from ..model.segment import generate_segment, used_rows
from ..model.text_cache import TextCache
from ..model.units import latent_size, pixel_size
from ..model.wan import WanModel
from .frames import num_start_frames, to_pixels
from .reading import VideoError, check_video, read_runs
from .story import ReferenceSpec, ResolvedStory

MAX_START_BYTES = 2**31
"""Pixels of a picture or clip that is encoded at once, uint8: 112 s at 832x480 and 16 fps."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A student with its text encoder and VAE, on a device."""

    network: Network
    card: StudentCard
    text_encoder: TextEncoder
    vae: VAE
    unmerged: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights that LoRAs changed, as they were before; empty without LoRAs."""

    @classmethod
    def load(
        cls,
        student: StudentFile,
        device: torch.device,
        dtype: torch.dtype,
        codecs: Codecs | None = None,
        offload: bool = False,
    ) -> "Pipeline":
        """A student on a device, with the built-in codecs by default. `offload` keeps its blocks in CPU memory."""
        net, card = student.load(dtype), student.card
        codecs = codecs or backbone_of(card.base).built_in_codecs(device)

        def network_of(net: WanModel, commit: Network | None = None) -> Network:
            run = Offload(net, device) if offload else run_directly
            return Network(net if offload else net.to(device), device, dtype, run=run, commit=commit, texts=TextCache())

        commit = student.load_commit(dtype)
        return cls(
            network=network_of(net, commit and network_of(commit)),
            card=card,
            text_encoder=codecs.text_encoder,
            vae=codecs.vae,
            unmerged=student.unmerged,
        )

    @property
    def device(self) -> torch.device:
        """The device of the student and the VAE."""
        return self.network.device

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights without LoRAs: a memory can be continued by the same student with another LoRA."""
        return self._fingerprint(self.unmerged)

    @property
    def merged_fingerprint(self) -> str:
        """Names the weights with LoRAs."""
        return self._fingerprint({})

    def _fingerprint(self, instead: Mapping[str, Tensor]) -> str:
        commit = self.network.commit
        return fingerprint(self.network.net, instead, commit.net if commit else None)

    def empty_memory(self, size: tuple[int, int] | None = None, **settings) -> Memory:
        """A memory as the card describes it. `size` is (width, height); `settings` replace fields of its config."""
        config = dataclasses.replace(self.card.memory, **settings)
        return empty_memory(config, latent_size(*(size or self.card.size)))

    @torch.inference_mode()
    def sampler(self, text_BLC: Tensor, options: SamplerOptions | None = None) -> CausalSampler:
        """The student under the text embeddings [1, L, C] of a prompt."""
        return make_sampler(self.network, self.card, text_BLC, options or SamplerOptions(), self.fingerprint)

    def generate(
        self,
        story: ResolvedStory,
        memory: Memory,
        options: SamplerOptions | None = None,
        finished: Iterable[Tensor] = (),
    ) -> Iterator[Memory]:
        """Continue a memory by a story; yields the memory after every chunk. `finished` are x0 of an earlier run.

        What the commit pass attends to is that of `options`, or else the story's.
        """
        options = options or SamplerOptions()
        options = dataclasses.replace(options, commit_attends=options.commit_attends or story.commit_attends)
        finished = iter(finished)
        # One of several processes cannot begin a chunk again by itself.
        fallback = Fallback(options.kv_placement) if self.network.processes is None else NO_FALLBACK
        for segment in story.segments:
            for memory in generate_segment(
                lambda text: self.sampler(text, options), memory, self.text_encoder.encode(segment.prompt),
                prompt=segment.prompt, seed=segment.seed, num_chunks=segment.num_chunks, sigmas=self.card.sigmas,
                change=segment.change, blend=segment.blend, finished=finished, fallback=fallback,
            ):  # fmt: skip
                yield memory

    @torch.inference_mode()
    def encode_file(self, path: Path, memory: Memory, fps: float) -> Tensor:
        """A picture or video as latents that a memory can begin with, [1, 16, 1 + k, H/8, W/8], on the CPU.

        Its first 1 + 4k frames are used. Raises ValueError for other files.
        """
        frames = _frames_of("start", path, memory, fps)
        return self._encode(frames[: num_start_frames(len(frames))])

    @torch.inference_mode()
    def encode_reference(self, spec: ReferenceSpec, memory: Memory, fps: float) -> Reference:
        """A picture and its prompt as a reference for a memory. Raises ValueError for other files."""
        frames = _frames_of("references", spec.image, memory, fps)
        if len(frames) > 1:
            raise ValueError(f"references: {spec.image}: is a video; give a picture")
        text = used_rows(self.text_encoder.encode(spec.prompt)) if spec.prompt else None
        return Reference(latents=self._encode(frames), prompt=spec.prompt, text=text)

    def _encode(self, frames_THWC: np.ndarray) -> Tensor:
        """uint8 frames [T, H, W, 3] -> latents [1, 16, t, H/8, W/8], on the CPU."""
        return normalise(self.vae.encode(to_pixels(frames_THWC).to(self.device))).cpu()

    @torch.inference_mode()
    def decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive normalised latents -> consecutive pixels [1, 3, T, H, W]."""
        yield from self.vae.decode_stream(denormalise(chunk.to(self.device)) for chunk in chunks)

    @contextlib.contextmanager
    def decoding(self, chunks: Iterable[Tensor]) -> Iterator[Iterator[Tensor]]:
        """`decode` for a second thread: on CUDA it has a stream of its own, beside that of the network."""
        with torch.cuda.stream(torch.cuda.Stream(self.device) if self.device.type == "cuda" else None):
            yield self.decode(chunks)


def _frames_of(name: str, path: str | Path, memory: Memory, fps: float) -> np.ndarray:
    """The frames of a picture or video in the size of a memory, uint8 [T, H, W, 3]. Raises ValueError about `name`."""
    runs, num_bytes, size = [], 0, pixel_size(memory.latent_size)
    try:
        check_video(path)
        for run in read_runs(path, 64, size, fps):
            runs.append(run)
            num_bytes += run.nbytes
            if num_bytes > MAX_START_BYTES:
                seconds = MAX_START_BYTES / (3 * math.prod(size) * fps)
                raise VideoError(f"is too long, {seconds:.3g} s of {size[0]}x{size[1]} are read at most; cut it")
        if not runs:
            raise VideoError("has no frame")
    except VideoError as error:
        raise ValueError(f"{name}: {path}: {error}") from None
    return np.concatenate(runs)
