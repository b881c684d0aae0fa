"""The causal sampler: few-step denoising chunk by chunk over a memory (docs/method.md, Sampling)."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory.fields import quoted
from ..memory.memory import Memory, all_finite
from ..memory.packed import KV_DTYPES
from ..memory.stores import KV_PLACEMENTS, Activations
from ..memory.view import ATTENDS as COMMIT_ATTENDS
from .attention import Attention, find_attention, load_attention
from .causal import TextContext
from .config import StudentCard
from .finite import FiniteCheck
from .flow import add_noise, match_channels, x0_from_flow
from .memory_attention import ChunkAttention
from .network import Network
from .units import FRAMES_PER_LATENT, check_size, pixel_size

Noise = Callable[[int, int], Tensor]
"""(absolute latent frame, step) -> standard normal noise [B, C, H, W]."""

Repeat = Callable[["CausalSampler"], object]
"""Computes a chunk again with another sampler."""

MAX_SECONDS = 3e7


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How a sampler runs, apart from the student and the prompt."""

    attention: str | Attention = "sdpa"
    """One of attention.ATTENTIONS, tested by make_sampler, or an attention function."""
    commit_attends: str | None = None
    """One of COMMIT_ATTENDS; None: as the student's card says."""
    kv_placement: str = "at once"
    """One of stores.KV_PLACEMENTS."""
    kv_dtype: str = "auto"
    """How sink and slow frames are stored: one of packed.KV_DTYPES. fp8 and int8 change the video."""
    check_finite: bool = True
    """Whether a chunk with NaN or infinity raises NotFiniteError."""

    def __post_init__(self):
        if isinstance(self.attention, str):
            find_attention(self.attention)
        if self.commit_attends not in (None, *COMMIT_ATTENDS):
            raise ValueError(f"commit_attends: {quoted(self.commit_attends)} is not one of {', '.join(COMMIT_ATTENDS)}")
        if self.kv_placement not in KV_PLACEMENTS:
            raise ValueError(f"kv_placement: {quoted(self.kv_placement)} is not one of {', '.join(KV_PLACEMENTS)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: {quoted(self.kv_dtype)} is not one of {', '.join(KV_DTYPES)}")


def make_sampler(
    network: Network, card: StudentCard, text_BLC: Tensor, options: SamplerOptions = SamplerOptions(), student: str = ""
) -> "CausalSampler":
    """A sampler of a student under the text embeddings [1, L, C] of one prompt. `student` is its fingerprint.

    Raises ValueError for an attention that fails its self-test, and for a text too long.
    """
    attention = options.attention
    if isinstance(attention, str):
        attention = load_attention(attention, network.device, network.dtype, network.head_dim)
    commit = network.commit and dataclasses.replace(network.commit, attention=attention)
    network = dataclasses.replace(network, attention=attention, commit=commit)
    return CausalSampler(
        network=network,
        text=network.embed_text(text_BLC),
        commit_text=commit and commit.embed_text(text_BLC),
        options=options,
        solver=card.solver,
        first_sigmas=card.first_sigmas,
        commit_attends=options.commit_attends or card.commit_attends,
        match_sink=card.match_sink,
        student=student,
    )


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator that is a function of its numbers, each of 64 bits."""
    packed = b"".join(number.to_bytes(8, "little", signed=number < 0) for number in numbers)
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seeded_noise(seed: int, latent_size: tuple[int, int, int]) -> Noise:
    """Noise as a function of (seed, absolute latent frame, step), independent of call order, chunks and device."""
    return lambda frame, step: torch.randn((1, *latent_size), generator=seeded_generator(seed, frame, step))


def chunks_for(seconds: float, fps: float, chunk: int) -> int:
    """Number of whole chunks that cover `seconds`; a chunk of 3 latent frames has 12 pixel frames.

    Raises ValueError unless seconds is positive and less than a year.
    """
    if not 0 < seconds < MAX_SECONDS:
        raise ValueError(f"seconds: {seconds} must be above 0 and below {MAX_SECONDS:g}")
    return max(1, math.ceil(round(seconds * fps / (FRAMES_PER_LATENT * chunk), 6)))


@dataclass(frozen=True, kw_only=True)
class CausalSampler:
    """A network under a prompt that continues memories. Noise levels, x0 and latents are float32."""

    network: Network
    text: TextContext
    commit_text: TextContext | None = None
    """The prompt in the network of the commit pass, if that is another one."""
    options: SamplerOptions = SamplerOptions()
    solver: str = "renoise"
    """One of flow.SOLVERS."""
    first_sigmas: tuple[float, ...] = ()
    """Noise levels of a chunk generated while nothing is remembered; empty: those of all chunks."""
    commit_attends: str = "all"
    """What the pass over clean latents attends to while it computes their keys: one of COMMIT_ATTENDS."""
    match_sink: float = 0.0
    """StudentCard.match_sink."""
    student: str = ""
    """Fingerprint of the network. It marks memories, and memories of other students are refused; empty: no check."""

    def __post_init__(self):
        assert (self.commit_text is None) == (self.network.commit is None)

    def rollout(self, memory: Memory, num_chunks: int, *, sigmas: Sequence[float], noise: Noise) -> Iterator[Memory]:
        """Continue a memory by `num_chunks` chunks; yields the memory after each."""
        memory = self.prepare(memory)
        for _ in range(num_chunks):
            memory = self.generate_chunk(memory, sigmas, noise)
            yield memory

    def prepare(self, memory: Memory) -> Memory:
        """The memory on this sampler's device: references are read, whole chunks of its start latents committed.

        Raises ValueError for a memory of another student.
        """
        self._check_fits(memory)
        memory = dataclasses.replace(
            self._kept(self._at_home(memory, self.network.dtype)), student=self.student or memory.student
        )
        memory, chunk = memory if memory.is_compact else self.read(memory), memory.config.chunk
        while memory.start_latents is not None and memory.start_latents.shape[2] >= chunk:
            memory = self.commit(memory, memory.start_latents[:, :, :chunk].to(self.network.device))
        return memory

    def generate_chunk(self, memory: Memory, sigmas: Sequence[float], noise: Noise) -> Memory:
        """Denoise one chunk over the memory, then commit it."""
        view = self.view(memory)
        *_, x0 = self.denoise(memory, view, sigmas, noise)
        of_film = memory.slots.sink[len(memory.slots.references) :]
        if self.match_sink and of_film and not memory.num_start_frames:
            sink = memory.latents_of(of_film).to(x0)
            x0 = match_channels(x0, sink, self.match_sink)
        return self.commit(memory, x0, view, lambda again: again.generate_chunk(memory, sigmas, noise))

    def denoise(self, memory: Memory, view: Any, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
        """Yields x0 [1, C, T, H, W] of the next chunk after every step."""
        first, with_start = memory.num_frames, self._start_frames(memory)
        if self.first_sigmas and not memory.slots.film:
            sigmas = self.first_sigmas
        attend_self = self.network.attend(view, memory.config.chunk, memory.latent_size)
        x0 = eps = None
        for step, sigma in enumerate(sigmas):
            if eps is None:
                eps = torch.stack([noise(first + t, step) for t in range(memory.config.chunk)], dim=2)
                eps = eps.to(self.network.device)
            x = with_start(eps if x0 is None else add_noise(x0, eps, sigma))
            flow = self.network.flow(x, sigma, self.text, attend_self, memory.num_start_frames)
            x0 = with_start(x0_from_flow(x, flow, sigma))
            yield x0
            eps = x0 + flow if self.solver == "euler" else None

    def _start_frames(self, memory: Memory) -> Callable[[Tensor], Tensor]:
        """A function that sets the start frames of a chunk to their clean latents (docs/method.md, Start frames)."""
        if memory.start_latents is None:
            return lambda x: x
        clean = memory.start_latents.to(self.network.device)
        return lambda x: torch.cat([clean.to(x), x[:, :, memory.num_start_frames :]], dim=2)

    def commit(self, memory: Memory, x0_BCTHW: Tensor, view: Any = None, repeat: Repeat | None = None) -> Memory:
        """Append a chunk to the memory: one pass at sigma 0 over clean latents computes their keys and values.

        Raises NotFiniteError for values that are not finite; `repeat` computes the chunk again to find their origin.
        """
        new = self._keys(memory, x0_BCTHW, view or self.view(memory))
        frames = range(memory.num_frames, memory.num_frames + x0_BCTHW.shape[2])
        self._check_finite(memory, frames, x0_BCTHW, new, repeat or (lambda again: again.commit(memory, x0_BCTHW)))
        add_up = self.network.processes and self.network.processes.add_up
        return self.read(self._kept(memory.append(x0_BCTHW, new.new_kv, add_up)))

    def read(self, memory: Memory) -> Memory:
        """Compute keys and values of remembered frames that have none (docs/memory.md, Policies).

        One pass per chunk of the film, over its clean latents and under its own prompt; it attends to the remembered
        frames that have keys and values. One pass per reference, which attends to itself alone.
        """
        while memory.unread:
            memory = self._read_first(memory)
        return memory

    def _read_first(self, memory: Memory) -> Memory:
        """Compute keys and values of the first unread frame, and of others of its chunk."""
        unread = memory.unread
        run = memory.run_of(unread[0])
        past = [] if run.start < 0 else [frame for frame in memory.slots.all if frame not in {*unread, *run}]
        text = memory.text_of(run.start)
        reader = self if text is None or text is memory.text else self.under(text)
        past = dataclasses.replace(memory.restrict_to(past), scene_begins=False)
        new_kv = reader._read(past, memory.latents_of(run), run)
        wanted = [frame - run.start for frame in run if frame in unread]
        frames = [run[t] for t in wanted]
        return self._kept(memory.write(frames, [new_kv[t] for t in wanted]))

    def restore(self, memory: Memory) -> Memory:
        """Compute all keys and values of a compact memory: each frame under its own prompt where it is known."""
        return self.read(memory) if memory.texts else self.recache(memory)

    def under(self, text_BLC: Tensor) -> "CausalSampler":
        """The sampler under the text embeddings [1, L, C] of another prompt."""
        commit = self.network.commit
        commit_text = commit and commit.embed_text(text_BLC)
        return dataclasses.replace(self, text=self.network.embed_text(text_BLC), commit_text=commit_text)

    def _read(self, past: Memory, latents_BCTHW: Tensor, frames: Sequence[int]) -> Sequence[Any]:
        """Keys and values of frames with these latents after the remembered frames of `past`."""
        x0 = latents_BCTHW.to(self.network.device)
        new = self._keys(past, x0, self.view(past))
        self._check_finite(past, frames, x0, new, lambda again: again._keys(past, x0, again.view(past)))
        return new.new_kv

    def recache(self, memory: Memory) -> Memory:
        """Compute all remembered keys and values again under this prompt (docs/method.md, Prompt changes).

        Passes over a chunk of clean latents each, oldest first. Each attends to the remembered frames before it.
        References come first, under their own prompts.
        """
        frames, done, references = memory.slots.all, memory.compact(), memory.slots.references
        for _ in references:
            done = self._read_first(done)
        for first in range(len(references), len(frames), memory.config.chunk):
            current, past = frames[first : first + memory.config.chunk], done.restrict_to(frames[:first])
            done = self._kept(done.write(current, self._read(past, memory.latents_of(current), current)))
        return done

    def _keys(self, memory: Memory, x0_BCTHW: Tensor, view: Any) -> ChunkAttention:
        num_frames = x0_BCTHW.shape[2]
        network, text = self.network.commit or self.network, self.commit_text or self.text
        attend_self = network.attend(view, num_frames, memory.latent_size, self.commit_attends, keep=True)
        attend_self.keep(network.num_layers - 1, *network.last_keys(x0_BCTHW, text, attend_self))
        return attend_self

    def _check_finite(
        self, memory: Memory, frames: Sequence[int], x0_BCTHW: Tensor, new: ChunkAttention, repeat: Repeat
    ) -> None:
        if not self.options.check_finite or all_finite([x0_BCTHW, *new.new_tensors()]):
            return
        check = FiniteCheck(self.network, memory, frames)
        check.check_memory()
        # The chunk's view is still allocated: there may be no room for a second one.
        kv_placement = "by layer" if self.options.kv_placement == "at once" else self.options.kv_placement
        options = dataclasses.replace(self.options, kv_placement=kv_placement, check_finite=False)
        commit = self.network.commit
        commit = commit and dataclasses.replace(commit, run=FiniteCheck(commit, memory, frames))
        network = dataclasses.replace(self.network, run=check, commit=commit)
        repeat(dataclasses.replace(self, network=network, options=options))
        raise check.not_reproduced()

    def view(self, memory: Memory, lazy: bool = False) -> Any:
        """What the passes over the next chunk attend to (Memory.view)."""
        rotate = self.network.rotate_to_ranks(memory.latent_size, len(memory.slots.all))
        kv_placement = self.options.kv_placement
        if lazy and kv_placement == "at once":
            kv_placement = "by layer"
        return memory.view(rotate, self.network.device, kv_placement)

    def _check_fits(self, memory: Memory) -> None:
        if self.options.kv_dtype != "auto":
            memory.check_supports("eight bits")
        if memory.student and self.student and memory.student != self.student:
            students = f"{memory.student}, this one is {self.student}"
            raise ValueError(f"memory: it belongs to another student ({students}); use the student that generated it")
        network, size = self.network, memory.latent_size
        check_size(*pixel_size(size))
        if size[0] != (channels := network.net.patch_embedding.in_channels):
            raise ValueError(f"memory: it has {size[0]} latent channels, the student {channels}; use another memory")
        rows, columns = network.grid(size)
        expected = (network.num_layers, 1, rows * columns, network.kv_heads, network.head_dim)
        for shape in memory.store.key_shapes - {expected}:
            raise ValueError(f"memory: its keys have shape {shape}, not {expected}; use the student that generated it")

    def _kept(self, memory: Memory) -> Memory:
        """A memory as it is stored between two passes."""
        return self._at_home(memory.packed(self.options.kv_dtype))

    def _at_home(self, memory: Memory, dtype: torch.dtype | None = None) -> Memory:
        """A memory with keys and values where they are between two passes."""
        if self.options.kv_placement != "from RAM":
            return memory.to(self.network.device, dtype)
        return memory.to("cpu", dtype, pinned=self.network.device.type == "cuda")


def working_bytes(
    network: Network,
    memory: Memory,
    kv_placement: str = "at once",
    text: TextContext | None = None,
    kv_dtype: str = "auto",
) -> int:
    """Largest device memory of a rollout beside the weights: keys and values, and activations.

    Without `text`, that of a prompt of the largest length.
    """
    net, size, config = network.net, network.dtype.itemsize, memory.config
    rows, columns = network.grid(memory.latent_size)
    tokens, dim = rows * columns, network.num_heads * network.head_dim
    of_text = text.num_bytes if text else network.prompt_bytes
    in_pass = tokens * config.chunk // (network.processes.count if network.processes else 1)
    activations = Activations(
        # The block's input; queries, keys and values; the first two rotated.
        attending=in_pass * 6 * dim * size,
        # The block's input, two sums, cross-attention, the feed-forward's input; its width twice.
        most=in_pass * (5 * dim + 2 * net.blocks[0].ffn[0].out_features) * size,
    )
    sizes = network.num_layers, network.kv_heads * network.head_dim * tokens, size
    of_memory = memory.store.working_bytes(config, kv_placement, *sizes, activations, kv_dtype)
    # Rotations, float32: of the chunk, and of remembered frames where passes rotate them.
    rotated = config.chunk if kv_placement == "at once" and not config.per_layer else config.num_slots
    tables = 4 * network.head_dim * tokens * rotated
    # Noise, x at a noise level, x0 and flow, float32.
    latents = 4 * 4 * math.prod(memory.latent_size) * config.chunk
    return of_text * (2 if network.commit else 1) + of_memory + tables + latents
