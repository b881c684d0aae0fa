"""Headless generation: a story in, memories out, chunk by chunk; the film decoded as a stream."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..memory.config import MemoryConfig
from ..memory.memory import Memory
from .causal import embed_text
from .checkpoint import fingerprint, load_demo_codec, load_student
from .codec import DemoCodec, denormalise, normalise
from .config import VAE_STRIDE, StudentCard
from .sampler import CausalSampler, chunks_for
from .segment import segment
from .story import Story, check_size
from .text import encode_demo_text, unknown_words
from .video import VideoError, check_video, read_runs, to_pixels, to_uint8

log = logging.getLogger("context_forcing")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`auto` is CUDA in bf16 where there is one, else the CPU in fp32. Raises ValueError for what is not there."""
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: {device!r} is not one of auto, cuda, cpu")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device: cuda was asked for and torch sees no CUDA device; use --device cpu")
    chosen = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" else "fp32"
    return chosen, DTYPES[dtype]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A student with its codec, on a device. The text encoder and the codec are the demo world's."""

    net: nn.Module
    card: StudentCard
    codec: DemoCodec
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, student: str | Path | None, device: torch.device, dtype: torch.dtype, **reading) -> "Pipeline":
        """`student` is a file, or None for the built-in one; `reading` as for `checkpoint.open_student`."""
        net, card = load_student(student, **reading)
        if card.base != "demo":
            raise ValueError(
                f"{student}: a {card.base} student; headless generation has the demo text encoder and codec only,"
                " load it in ComfyUI"
            )
        return cls(net=net.to(device, dtype), card=card, codec=load_demo_codec().to(device), device=device, dtype=dtype)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, so that a memory is never continued by another student."""
        return fingerprint(self.net)

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
            text=embed_text(self.net, text_BLC.to(self.device, self.dtype)),
            device=self.device,
            dtype=self.dtype,
            solver=self.card.solver,
            first_sigmas=self.card.first_sigmas,
            on_pass=on_pass,
            student=self.fingerprint,
        )

    def tell(
        self, story: Story, memory: Memory, on_pass: Callable[[], None] = lambda: None, made: Iterable[Tensor] = ()
    ) -> Iterator[Memory]:
        """Continue a memory by a story; yields the memory after every chunk. `made` are chunks of an earlier run."""
        made = iter(made)
        sampler_of = lambda text: self.sampler(text, on_pass)
        for scene in story.segments:
            if unknown := unknown_words(scene.prompt):
                log.warning("the demo student does not know these words, they have no effect: %s", ", ".join(unknown))
            chunks = chunks_for(scene.seconds, story.fps or self.card.fps, memory.config.chunk)
            for memory in segment(
                sampler_of, memory, encode_demo_text(scene.prompt), prompt=scene.prompt,
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
        return normalise(self.codec.encode(to_pixels(frames[:whole]).to(self.device))).cpu()

    @torch.inference_mode()
    def decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive normalised latents -> consecutive pixels [1, 3, T, H, W]."""
        yield from self.codec.decode_stream(denormalise(chunk.to(self.device)) for chunk in chunks)

    @torch.inference_mode()
    def thumbnails(self, memory: Memory) -> np.ndarray:
        """The remembered frames as pictures, uint8 [M, H, W, 3], in the order of their positions."""
        latents = memory.latents(memory.slots.all).to(self.device).movedim(2, 1).flatten(0, 1).unsqueeze(2)
        if not len(latents):
            return np.zeros((0, 1, 1, 3), np.uint8)
        return to_uint8(self.codec.decode(denormalise(latents)).transpose(0, 2))


def new_memory(config: MemoryConfig, width: int, height: int) -> Memory:
    """An empty memory for videos of width x height pixels; raises ValueError unless both are multiples of 16."""
    check_size(width, height)
    return Memory(config=config, latent_size=(16, height // VAE_STRIDE[1], width // VAE_STRIDE[2]))
