"""The causal sampler: chunk loop, few-step denoising, commit to memory (method.md 3.2)."""

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..memory.layer_store import LayerSlots, ReleasedMemory
from ..memory.memory import SIMILARITY_ELEMENTS, Memory, all_finite
from ..memory.view import MemoryView
from .attention import Attention, plain, sdpa
from .causal import AttendSelf, Call, MemoryAttention, TextContext, causal_forward, direct
from .config import VAE_STRIDE
from .finite import Watch, written
from .flow import SOLVERS, TIMESTEPS, add_noise, x0_from_flow
from .layer_attention import ReleasedAttention
from .rope import rotary_table, rotate

View = MemoryView | list[LayerSlots]
"""What the passes over one chunk see of a memory."""

Noise = Callable[[int, int], Tensor]
"""(absolute latent frame, step) -> standard normal noise [B, C, H, W]."""

Repeat = Callable[["CausalSampler"], object]
"""What made a chunk, by another sampler."""

MAX_SECONDS = 3e7

COMMIT_ATTENDS = ("all", "no sink", "fast only")

KV_PLACEMENTS = ("at once", "by layer", "from RAM")
"""When a memory's keys and values are laid out for a chunk: all layers before it, fastest; each layer when its turn
comes, in every pass, with half the memory; or so from RAM, where they stay. The result is the same."""


def seeded_noise(seed: int, latent_size: tuple[int, int, int]) -> Noise:
    """Noise as a function of (seed, absolute latent frame, step): never of call order, chunking or device."""

    def noise(frame: int, step: int) -> Tensor:
        digest = hashlib.blake2b(struct.pack("<Qqq", seed, frame, step), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn((1, *latent_size), generator=generator)

    return noise


def chunks_for(seconds: float, fps: float, chunk: int) -> int:
    """Whole chunks that cover `seconds`: 12 pixel frames a chunk of 3 latent frames.

    Raises ValueError unless seconds is positive and less than a year.
    """
    if not 0 < seconds < MAX_SECONDS:
        raise ValueError(f"seconds: {seconds} must be above 0 and below {MAX_SECONDS:g}")
    return max(1, math.ceil(round(seconds * fps / (VAE_STRIDE[0] * chunk), 6)))


@dataclass(frozen=True, kw_only=True)
class CausalSampler:
    """A network with a prompt, ready to continue memories.

    The network runs in `dtype` on `device`; noise levels, x0 and the film are float32. `on_pass` is called before
    every pass of the network, the place to honour an interrupt.
    """

    net: nn.Module
    text: TextContext
    device: torch.device
    dtype: torch.dtype
    attention: Attention = sdpa
    solver: str = "renoise"
    """How to get from one noise level to the next (flow.SOLVERS)."""
    first_sigmas: tuple[float, ...] = ()
    """Noise levels of a chunk made while nothing is remembered, in place of the usual ones; empty: the usual ones."""
    commit_attends: str = "all"
    """What the pass over clean latents sees while it writes their keys: `all`, `no sink`, `fast only`."""
    kv_placement: str = "at once"
    """When keys and values of the memory are laid out: one of LAYOUTS."""
    on_pass: Callable[[], None] = lambda: None
    call: Call = direct
    student: str = ""
    """Fingerprint of the network; memories are marked with it, and those of others refused. Empty: no check."""
    checks: bool = True
    """Whether a chunk that is not finite is refused; training has a rule of its own for those."""

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: {self.solver!r} is not one of {', '.join(SOLVERS)}")
        if self.commit_attends not in COMMIT_ATTENDS:
            raise ValueError(f"commit_attends: {self.commit_attends!r} is not one of {', '.join(COMMIT_ATTENDS)}")
        if self.kv_placement not in KV_PLACEMENTS:
            raise ValueError(f"layout: {self.kv_placement!r} is not one of {', '.join(KV_PLACEMENTS)}")

    def rollout(self, memory: Memory, num_chunks: int, *, sigmas: Sequence[float], noise: Noise) -> Iterator[Memory]:
        """Continue a memory by `num_chunks` chunks; yields the memory after each."""
        memory = self.prepare(memory)
        for _ in range(num_chunks):
            memory = self.generate_chunk(memory, sigmas, noise)
            yield memory

    def prepare(self, memory: Memory) -> Memory:
        """The memory where this sampler keeps it, whole chunks it was given taken over into the film.

        Raises ValueError for one that another student made.
        """
        self._check_fits(memory)
        memory = dataclasses.replace(memory.to(self._home, self.dtype), student=self.student or memory.student)
        chunk = memory.config.chunk
        while memory.start_latents is not None and memory.start_latents.shape[2] >= chunk:
            memory = self.commit(memory, memory.start_latents[:, :, :chunk].to(self.device))
        return memory

    def generate_chunk(self, memory: Memory, sigmas: Sequence[float], noise: Noise) -> Memory:
        """Denoise one chunk against the memory, then commit it."""
        view = self.view(memory)
        *_, x0 = self.denoise(memory, view, sigmas, noise)
        return self.commit(memory, x0, view, lambda again: again.generate_chunk(memory, sigmas, noise))

    def denoise(self, memory: Memory, view: View, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
        """The chunk after a memory, x0 [1, C, T, H, W] as it stands after every step."""
        first, given = memory.num_frames, self._put_start_frames(memory)
        if self.first_sigmas and not memory.slots.all:
            sigmas = self.first_sigmas
        attend_self = self._attend(memory, view, memory.config.chunk)
        x0 = flow = None
        for step, sigma in enumerate(sigmas):
            if x0 is not None and self.solver == "euler":
                eps = x0 + flow
            else:
                eps = torch.stack([noise(first + t, step) for t in range(memory.config.chunk)], dim=2).to(self.device)
            x = given(eps if x0 is None else add_noise(x0, eps, sigma))
            flow = self._flow(x, sigma, attend_self, memory.num_start_frames)
            x0 = given(x0_from_flow(x, flow, sigma))
            yield x0

    def _put_start_frames(self, memory: Memory) -> Callable[[Tensor], Tensor]:
        """Put the frames of the next chunk that are given in their place, clean (method.md 3.7)."""
        if not memory.num_start_frames:
            return lambda x: x
        clean = memory.start_latents.to(self.device)
        return lambda x: torch.cat([clean.to(x), x[:, :, memory.num_start_frames :]], dim=2)

    def commit(
        self, memory: Memory, x0_BCTHW: Tensor, view: View | None = None, repeat: Repeat | None = None
    ) -> Memory:
        """One pass at sigma 0 over clean latents, whose only purpose is to write their keys and values.

        `repeat` makes the chunk again, to find where values began that are not finite; without it, this pass alone.
        Raises NotFiniteError for those.
        """
        new_kv = self._keys(memory, x0_BCTHW, view or self.view(memory))
        frames = range(memory.num_frames, memory.num_frames + x0_BCTHW.shape[2])
        self._check_finite(memory, frames, x0_BCTHW, new_kv, repeat or (lambda again: again.commit(memory, x0_BCTHW)))
        return memory.append(x0_BCTHW, new_kv).to(self._home)

    def recache(self, memory: Memory) -> Memory:
        """Write all that is remembered anew under this sampler's prompt (method.md 3.6).

        Clean latents in passes of a chunk, oldest first; each sees those before it, as when the film was made, and
        nothing that was forgotten since.
        """
        frames, done = memory.slots.all, memory.compact()
        for first in range(0, len(frames), memory.config.chunk):
            now, seen = frames[first : first + memory.config.chunk], done.restrict_to(frames[:first])
            x0 = memory.latents_of(now).to(self.device)
            new_kv = self._keys(seen, x0, self.view(seen))
            self._check_finite(seen, now, x0, new_kv, lambda again: again._keys(seen, x0, again.view(seen)))
            done = done.write(now, new_kv).to(self._home)
        return done

    def _keys(self, memory: Memory, x0_BCTHW: Tensor, view: View) -> Sequence:
        attend_self = self._attend(memory, view, x0_BCTHW.shape[2], commits=True)
        self._flow(x0_BCTHW, 0.0, attend_self)
        return attend_self.new_kv

    def _check_finite(
        self, memory: Memory, frames: Sequence[int], x0_BCTHW: Tensor, new_kv: Sequence, repeat: Repeat
    ) -> None:
        if not self.checks or all_finite([x0_BCTHW, *written(new_kv, frames[0])]):
            return
        measure_consistency = Watch(self.net, self.call, memory, frames)
        measure_consistency.look_at_memory()
        # The memory as it was laid out for the chunk is still held: there may be no room for it twice.
        kv_placement = "by layer" if self.kv_placement == "at once" else self.kv_placement
        repeat(dataclasses.replace(self, call=measure_consistency, kv_placement=kv_placement, checks=False))
        raise measure_consistency.nothing_found()

    def view(self, memory: Memory, lazy: bool = False) -> View:
        """The memory as this network's attention sees it: keys rotated to their ranks. Of a released memory its
        layers, which the passes over the next chunk replace."""
        if isinstance(memory, ReleasedMemory):
            return list(memory.layers) or [LayerSlots()] * len(self.net.blocks)
        grid, head_dim = self._grid(memory), self._head_dim
        ranks = torch.arange(len(memory.slots.all), device=self.device)
        table = rotary_table(ranks, *grid, head_dim)
        return memory.view(lambda keys: rotate(keys.to(self.device), table), lazy or self.kv_placement != "at once")

    def _attend(self, memory: Memory, view: View, num_frames: int, commits: bool = False) -> AttendSelf:
        attends, where = self.commit_attends if commits else "all", (self._head_dim, self.device, self.attention)
        if isinstance(memory, ReleasedMemory):
            return ReleasedAttention(view, memory.config, memory.num_frames, self._grid(memory), *where, attends)
        num_sink, num_slow = len(memory.slots.sink), len(memory.slots.slow)
        hidden = {"all": 0, "no sink": num_sink, "fast only": num_sink + num_slow}[attends]
        # The first chunk of a scene stands as far from the sink as the window allows (method.md 3.6, scene cut).
        first = memory.config.window - memory.config.chunk if memory.scene_begins else None
        return MemoryAttention(view.without_first(hidden), self._grid(memory), num_frames, *where, commits, first)

    def _flow(self, x_BCTHW: Tensor, sigma: float, attend_self: AttendSelf, num_clean: int = 0) -> Tensor:
        """Predicted flow; the first `num_clean` frames are clean whatever the noise level of the others."""
        self.on_pass()
        timestep = torch.full((1, x_BCTHW.shape[2]), TIMESTEPS * sigma, device=self.device)
        timestep[:, :num_clean] = 0
        x = x_BCTHW.to(self.dtype)
        flow = self.call(self.net, causal_forward, x, timestep, self.text, attend_self, self.attention, self.call)
        return plain(flow.float())

    def _check_fits(self, memory: Memory) -> None:
        if memory.student and self.student and memory.student != self.student:
            raise ValueError(
                f"memory: made by another student ({memory.student}, this one is {self.student}); keys of one network"
                " mean nothing to another, continue it with the student that made it"
            )
        attn = self.net.blocks[0].self_attn
        rows, columns = self._grid(memory)
        fits = (len(self.net.blocks), 1, rows * columns, attn.num_heads, attn.head_dim)
        for shape in memory.key_shapes - {fits}:
            raise ValueError(
                f"memory: its keys are {shape}, this student's would be {fits}; continue a memory with the student that"
                " made it"
            )

    def _grid(self, memory: Memory) -> tuple[int, int]:
        _, height, width = memory.latent_size
        return height // self.net.patch_size[1], width // self.net.patch_size[2]

    @property
    def _head_dim(self) -> int:
        return self.net.blocks[0].self_attn.head_dim

    @property
    def _home(self) -> torch.device:
        """Where the memory's keys and values are between two passes."""
        return torch.device("cpu") if self.kv_placement == "from RAM" else self.device


def working_bytes(net: nn.Module, memory: Memory, dtype: torch.dtype, kv_placement: str = "at once") -> int:
    """Most device memory a rollout needs beside the weights: keys and values held and laid out, and activations."""
    config, attn, size, depth = memory.config, net.blocks[0].self_attn, dtype.itemsize, len(net.blocks)
    tokens = (memory.latent_size[1] // net.patch_size[1]) * (memory.latent_size[2] // net.patch_size[2])
    dim, ffn_dim = attn.num_heads * attn.head_dim, net.blocks[0].ffn[0].out_features
    chunk = 2 * depth * dim * tokens * config.chunk * size
    held = {"at once": 2, "by layer": 1, "from RAM": 0}[kv_placement] * chunk * config.capacity // config.chunk
    text = 2 * depth * dim * net.text_len * size
    # In a pass, of one layer: remembered keys turned in float32, next to values; then both with the chunk's behind.
    turned = dim * tokens * config.capacity * (2 * 4 + size)
    attended = dim * tokens * 2 * (config.capacity + config.window) * size
    passing = tokens * config.chunk * (6 * dim + 2 * ffn_dim) * size
    # After it: the chunk's keys and values as its pass left them and by frame, and keys compared in float32.
    compared = 5 * 4 * min(SIMILARITY_ELEMENTS, depth * dim * tokens)
    return held + text + chunk + max(max(turned, attended) + passing, chunk + compared)
