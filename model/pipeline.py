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
from ..memory.memory import Memory
from ..memory.released import empty_memory
from .causal import Call, direct, embed_text
from .checkpoint import load_demo_codec, load_student, open_student
from .codec import Codec, denormalise, normalise
from .config import VAE_STRIDE, StudentCard
from .fingerprint import fingerprint
from .offload import Offload
from .parts import default_models_dir, find, locate
from .sampler import CausalSampler, chunks_for
from .segment import segment
from .story import Story, check_size
from .text import DemoTexts, EncodedTexts, Texts
from .umt5 import load_umt5, why_no_umt5
from .video import VideoError, check_video, read_runs, to_pixels, to_uint8
from .wan_vae import load_wan_vae, why_no_wan_vae

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
class Parts:
    """What turns prompts into what a student reads, and what it makes into pixels."""

    texts: Texts
    codec: Codec


def demo_parts(device: torch.device) -> Parts:
    """Those of the demo world."""
    return Parts(texts=DemoTexts(), codec=load_demo_codec().to(device))


def load_parts(
    student: str | Path | None,
    card: StudentCard,
    prompts: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_encoder: str | None = None,
    vae: str | None = None,
    models_dir: Path | None = None,
) -> Parts:
    """The parts that a student needs: by path, by name in ComfyUI's models folder, or what is found there.

    Prompts are encoded here and the text encoder let go, so that it never shares a device with the student; without
    prompts none is needed. The VAE runs in `dtype` on CUDA, in float32 elsewhere. Raises ValueError, one line.
    """
    given = {"text-encoder": text_encoder, "vae": vae}
    if card.base == "demo":
        if taken := [kind for kind, name in given.items() if name is not None]:
            raise ValueError(f"--{taken[0]}: the student is of the demo world, which has its own; leave it out")
        return demo_parts(device)
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
            raise ValueError(needs_parts(student, card))
    texts = EncodedTexts(name="none", rows={})
    if prompts:
        encoder = load_umt5(paths["text-encoder"], device)
        rows = dict(zip(prompts, (rows_LD[None] for rows_LD in encoder.encode(prompts))))
        texts = EncodedTexts(name=encoder.name, rows=rows)
    codec = load_wan_vae(paths["vae"], dtype if device.type == "cuda" else torch.float32)
    return Parts(texts=texts, codec=codec.to(device))


def needs_parts(student: str | Path | None, card: StudentCard) -> str:
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
    texts: Texts
    codec: Codec
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
        parts: Parts | None = None,
        offload: bool = False,
        **reading,
    ) -> "Pipeline":
        """`student` is a file, or None for the built-in one; without `parts`, those of the demo world.

        `offload` keeps the student's blocks in CPU memory (offload.py); `reading` as for `checkpoint.open_student`.
        """
        net, card = load_student(student, dtype, **reading)
        if parts is None:
            if card.base != "demo":
                raise ValueError(needs_parts(student, card))
            parts = demo_parts(device)
        call = Offload(net, device) if offload else direct
        bare = {**reading, "loras": ()}
        unmerged = open_student(student, **bare).named.tensors if reading.get("loras") else {}
        return cls(
            net=net if offload else net.to(device), card=card, texts=parts.texts, codec=parts.codec, device=device,
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
            "student": fingerprint(self.net), "text encoder": self.texts.name, "codec": fingerprint(self.codec),
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

    def tell(
        self, story: Story, memory: Memory, on_pass: Callable[[], None] = lambda: None, made: Iterable[Tensor] = ()
    ) -> Iterator[Memory]:
        """Continue a memory by a story; yields the memory after every chunk. `made` are chunks of an earlier run."""
        made = iter(made)
        sampler_of = lambda text: self.sampler(text, on_pass)
        for scene in story.segments:
            chunks = chunks_for(scene.seconds, story.fps or self.card.fps, memory.config.chunk)
            for memory in segment(
                sampler_of, memory, self.texts.encode(scene.prompt), prompt=scene.prompt,
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
        latents = denormalise(memory.latents(memory.slots.all).to(self.device))
        pictures = [to_uint8(self.codec.decode(latent)) for latent in latents.split(1, dim=2) if latent.numel()]
        return np.concatenate(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)


def new_memory(config: MemoryConfig, width: int, height: int) -> Memory:
    """An empty memory for videos of width x height pixels; raises ValueError unless both are multiples of 16."""
    check_size(width, height)
    return empty_memory(config, (16, height // VAE_STRIDE[1], width // VAE_STRIDE[2]))
