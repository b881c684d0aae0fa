"""Headless generation: a story in, memories out, chunk by chunk; the film decoded as a stream."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..memory.config import MemoryConfig
from ..memory.layer_store import empty_memory
from ..memory.memory import Memory
from ..model.causal import Call, direct, embed_text
from ..model.checkpoints.locate import default_models_dir, find, locate
from ..model.checkpoints.student import load_student, open_student
from ..model.codecs.base import VAE, PrecomputedText, TextEncoder, denormalise, normalise
from ..model.codecs.demo_text import DemoTextEncoder
from ..model.codecs.demo_vae import load_demo_codec
from ..model.codecs.umt5 import load_umt5, why_no_umt5
from ..model.codecs.wan_vae import load_wan_vae, why_no_wan_vae
from ..model.config import VAE_STRIDE, StudentCard
from ..model.fingerprint import fingerprint
from ..model.offload import Offload
from ..model.sampler import CausalSampler, chunks_for
from ..model.segment import generate_segment
from ..model.units import check_size
from .mp4 import VideoError, check_video, read_runs, to_pixels, to_uint8
from .story import Story

log = logging.getLogger("context_forcing")


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """What turns prompts into what a student reads, and what it makes into pixels."""

    text_encoder: TextEncoder
    vae: VAE


def demo_codecs(device: torch.device) -> Codecs:
    """Those of the demo world."""
    return Codecs(text_encoder=DemoTextEncoder(), vae=load_demo_codec().to(device))


def load_codecs(
    student: str | Path | None,
    card: StudentCard,
    prompts: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_encoder: str | None = None,
    vae: str | None = None,
    models_dir: Path | None = None,
) -> Codecs:
    """The parts that a student needs: by path, by name in ComfyUI's models folder, or what is found there.

    Prompts are encoded here and the text encoder let go, so that it never shares a device with the student; without
    prompts none is needed. The VAE runs in `dtype` on CUDA, in float32 elsewhere. Raises ValueError, one line.
    """
    given = {"text-encoder": text_encoder, "vae": vae}
    if card.base == "demo":
        if taken := [kind for kind, name in given.items() if name is not None]:
            raise ValueError(f"--{taken[0]}: the student is of the demo world, which has its own; leave it out")
        return demo_codecs(device)
    models_dir, prompts = default_models_dir(models_dir), list(dict.fromkeys(prompts))
    why_not = {"text-encoder": why_no_umt5, "vae": why_no_wan_vae}
    paths = {}
    for kind in ["text-encoder", "vae"] if prompts else ["vae"]:
        if given[kind] is not None:
            paths[kind] = locate(kind, given[kind], models_dir)
        elif models_dir is not None:
            paths[kind] = find(kind, models_dir, why_not[kind])
            log.info("%s: %s", kind, paths[kind])
        else:
            raise ValueError(missing_codecs(student, card))
    text_encoder = PrecomputedText(name="none", rows={})
    if prompts:
        encoder = load_umt5(paths["text-encoder"], device)
        rows = dict(zip(prompts, (rows_LD[None] for rows_LD in encoder.encode(prompts))))
        text_encoder = PrecomputedText(name=encoder.name, rows=rows)
    vae = load_wan_vae(paths["vae"], dtype if device.type == "cuda" else torch.float32)
    return Codecs(text_encoder=text_encoder, vae=vae.to(device))


def missing_codecs(student: str | Path | None, card: StudentCard) -> str:
    """What to say where a student stands without its parts."""
    return (
        f"{student}: a {card.base} student needs its text encoder and VAE; `generate` takes --text-encoder and --vae,"
        " or --models-dir, ComfyUI's folder of models, and finds them there"
    )


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A student with its text encoder and codec, on a device."""

    net: nn.Module
    card: StudentCard
    text_encoder: TextEncoder
    vae: VAE
    device: torch.device
    dtype: torch.dtype
    call: Call = direct
    unmerged: Mapping[str, Tensor] = field(default_factory=dict)
    """The student's weights as they were before LoRAs were merged into them; empty where none were."""

    @classmethod
    def load(
        cls,
        student: str | Path | None,
        device: torch.device,
        dtype: torch.dtype,
        parts: Codecs | None = None,
        offload: bool = False,
        **reading,
    ) -> "Pipeline":
        """`student` is a file, or None for the built-in one; without `parts`, those of the demo world.

        `offload` keeps the student's blocks in CPU memory (offload.py); `reading` as for `checkpoint.open_student`.
        """
        net, card = load_student(student, dtype, **reading)
        if parts is None:
            if card.base != "demo":
                raise ValueError(missing_codecs(student, card))
            parts = demo_codecs(device)
        call = Offload(net, device) if offload else direct
        bare = {**reading, "loras": ()}
        unmerged = open_student(student, **bare).named.tensors if reading.get("loras") else {}
        return cls(
            net=net if offload else net.to(device), card=card, text_encoder=parts.text_encoder, vae=parts.vae, device=device,
            dtype=dtype, call=call, unmerged=unmerged,
        )  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, so that a memory is never continued by another student; by the same with another LoRA it may
        be."""
        return fingerprint(self.net, self.unmerged)

    @property
    def names(self) -> dict[str, str]:
        """What a video depends on beside its story: weights, and where and how they run."""
        return {
            "student": fingerprint(self.net), "text encoder": self.text_encoder.name, "codec": fingerprint(self.vae),
            "device": self.device.type, "dtype": str(self.dtype),
        }  # fmt: skip

    def empty_memory(self, size: tuple[int, int] | None = None, **settings) -> Memory:
        """A memory with the card's sizes; `settings` replace fields of its MemoryConfig, size is (width, height)."""
        width, height = size or self.card.size
        check_size(width, height)
        config = dataclasses.replace(self.card.memory, **settings)
        return new_memory(config, width, height)

    @torch.inference_mode()
    def sampler(self, text_BLC: Tensor, on_pass: Callable[[], None] = lambda: None) -> CausalSampler:
        """The student under a prompt's embeddings."""
        return CausalSampler(
            net=self.net,
            text=embed_text(self.net, text_BLC.to(self.device, self.dtype), call=self.call),
            device=self.device,
            dtype=self.dtype,
            solver=self.card.solver,
            first_sigmas=self.card.first_sigmas,
            on_pass=on_pass,
            call=self.call,
            student=self.fingerprint,
        )

    def generate(
        self, story: Story, memory: Memory, on_pass: Callable[[], None] = lambda: None, made: Iterable[Tensor] = ()
    ) -> Iterator[Memory]:
        """Continue a memory by a story; yields the memory after every chunk. `made` are chunks of an earlier run."""
        made = iter(made)
        sampler_of = lambda text: self.sampler(text, on_pass)
        for scene in story.segments:
            chunks = chunks_for(scene.seconds, story.fps or self.card.fps, memory.config.chunk)
            for memory in generate_segment(
                sampler_of, memory, self.text_encoder.encode(scene.prompt), prompt=scene.prompt,
                seed=story.seed if scene.seed is None else scene.seed, num_chunks=chunks, sigmas=self.card.sigmas,
                change=scene.change, blend=scene.blend, made=made,
            ):  # fmt: skip
                yield memory

    @torch.inference_mode()
    def encode_file(self, path: Path, memory: Memory, fps: float) -> Tensor:
        """A picture or video as latents for a memory to begin with, [1, 16, 1 + k, H/8, W/8], on the CPU.

        Of its frames 1 + 4k are taken. Raises ValueError for a file that is neither.
        """
        height, width = (side * VAE_STRIDE[1] for side in memory.latent_size[1:])
        try:
            check_video(path)
            runs = list(read_runs(path, 64, (width, height), fps))
            if not runs:
                raise VideoError(f"has no frame at {fps:g} frames a second")
            frames = np.concatenate(runs)
        except VideoError as error:
            raise ValueError(f"start: {path}: {error}") from None
        whole = len(frames) - (len(frames) - 1) % VAE_STRIDE[0]
        if whole < len(frames):
            log.info("start: %d of %d frames left out: 1 + 4k are taken", len(frames) - whole, len(frames))
        return normalise(self.vae.encode(to_pixels(frames[:whole]).to(self.device))).cpu()

    @torch.inference_mode()
    def decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive normalised latents -> consecutive pixels [1, 3, T, H, W]."""
        yield from self.vae.decode_stream(denormalise(chunk.to(self.device)) for chunk in chunks)

    @torch.inference_mode()
    def thumbnails(self, memory: Memory) -> np.ndarray:
        """The remembered frames as pictures, uint8 [M, H, W, 3], in the order of their positions."""
        latents = denormalise(memory.latents_of(memory.slots.all).to(self.device))
        pictures = [to_uint8(self.vae.decode(latent)) for latent in latents.split(1, dim=2) if latent.numel()]
        return np.concatenate(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)


def new_memory(config: MemoryConfig, width: int, height: int) -> Memory:
    """An empty memory for videos of width x height pixels; raises ValueError unless both are multiples of 16."""
    check_size(width, height)
    return empty_memory(config, (16, height // VAE_STRIDE[1], width // VAE_STRIDE[2]))
