"""Two loops that students run in elsewhere, timed beside ours over the same weights (docs/performance.md, Ports).

They are written from what the two projects compute: which keys are kept and how, at which positions, what is computed
again in every pass. Linear layers, norms and the attention function are those of `Network`, the noise is ours.

Shapes: B batch (one video), C latent channels, T latent frames of a chunk, H W latent rows and columns, P tokens per
latent frame, S tokens of a chunk (T * P), K tokens in a cache, N heads, E head dim, D model width, L text tokens.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..model.causal import WanNet, sinusoid
from ..model.flow import TIMESTEPS, add_noise
from ..model.network import Network
from ..model.sampler import Noise
from .clock import Switch, no_clock

THETA = 10000.0
MAX_POSITIONS = 1024
"""Entries of Wan's table of rotary positions."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What both loops are told."""

    network: Network
    text_BLC: Tensor
    latent_size: tuple[int, int, int]
    chunk: int
    """Latent frames of a chunk."""
    window: int
    """Latent frames that a full chunk attends to, itself included."""
    sigmas: Sequence[float]
    noise: Noise


class CacheLoop(abc.ABC):
    """A loop that keeps rotated keys and values in one buffer per layer, and denoises a chunk in it."""

    name: str

    def __init__(self, settings: LoopSettings):
        self.settings, self.network = settings, settings.network
        self.net: WanNet = settings.network.net
        self.grid = self.network.grid(settings.latent_size)
        self.tokens = self.grid[0] * self.grid[1]
        self.first_frame = 0
        """Absolute latent frame of the next chunk."""
        shape = (1, settings.window * self.tokens, self.network.num_heads, self.network.head_dim)
        zeros = lambda: torch.zeros(shape, device=self.network.device, dtype=self.network.dtype)
        self.keys = [zeros() for _ in self.net.blocks]
        self.values = [zeros() for _ in self.net.blocks]
        self.text_kv: list[tuple[Tensor, Tensor]] = []
        self._switch: Switch = no_clock

    def chunk(self, switch: Switch = no_clock) -> Tensor:
        """Generate the next chunk: x0 [1, C, T, H, W]. A clock is told where text and commit begin."""
        noise, sigmas, frames = self.settings.noise, self.settings.sigmas, range(self.settings.chunk)
        self._switch, x0 = switch, None
        for step, sigma in enumerate(sigmas):
            eps = torch.stack([noise(self.first_frame + t, step) for t in frames], dim=2).to(self.network.device)
            x = eps if x0 is None else add_noise(x0, eps, sigma)
            x0 = self.x0(x, self.flow(x, sigma), sigma)
        assert x0 is not None
        switch("commit")
        self.commit(x0)
        self._switch = no_clock
        return x0

    def commit(self, x0_BCTHW: Tensor) -> None:
        """Write keys and values of a clean chunk into the buffers, and go on to the next chunk."""
        self.flow(x0_BCTHW, 0.0)
        self.first_frame += x0_BCTHW.shape[2]

    def held_bytes(self) -> int:
        """Bytes of the buffers and of the text's keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *(t for kv in self.text_kv for t in kv)))

    def flow(self, x_BCTHW: Tensor, sigma: float) -> Tensor:
        """Predicted flow [1, C, T, H, W], float32. The chunk's keys and values are written to their place."""
        net, dtype = self.net, self.network.dtype
        weight = net.patch_embedding.weight
        tokens = net.patch_embedding(x_BCTHW.to(weight.dtype)).to(dtype)
        x_BSD = tokens.flatten(2).transpose(1, 2)
        timestep_BT = torch.full((1, x_BCTHW.shape[2]), TIMESTEPS * sigma, device=self.network.device)
        temb_BTD = net.time_embedding(sinusoid(timestep_BT, net.time_embedding[0].in_features).to(dtype))
        tproj_BT6D = net.time_projection(temb_BTD).unflatten(-1, (6, -1))
        part = self._switch("text")
        self._embed_text()
        self._switch(part)
        rotary = self.rotary(x_BCTHW.shape[2])
        for layer, block in enumerate(net.blocks):
            x_BSD = self._block(layer, block, x_BSD, tproj_BT6D, rotary)
        modulation_BT2D = net.head.modulation.to(dtype) + temb_BTD[:, :, None]
        patches = net.head.head(self.modulate(net.head.norm(x_BSD), *modulation_BT2D.unbind(2)))
        rows, columns = self.grid
        _, p, q = net.patch_size
        flow = rearrange(patches, "B (T h w) (p q C) -> B C T (h p) (w q)", h=rows, w=columns, p=p, q=q)
        return flow.float()

    def _embed_text(self) -> None:
        """The text embedding runs in every pass of both loops; keys and values are kept from the first."""
        text_BLC = self.settings.text_BLC.to(self.network.device, self.network.dtype)
        embedded = self.net.text_embedding(F.pad(text_BLC, (0, 0, 0, self.net.text_len - text_BLC.shape[1])))
        if not self.text_kv:
            for block in self.net.blocks:
                attn = block.cross_attn
                self.text_kv.append((self._heads(attn.norm_k(attn.k(embedded))), self._heads(attn.v(embedded))))

    def _block(self, layer: int, block: WanNet, x_BSD: Tensor, tproj_BT6D: Tensor, rotary: Any) -> Tensor:
        attention, modulation = self.network.attention, (block.modulation.to(x_BSD) + tproj_BT6D).unbind(2)
        attn, y = block.self_attn, self.modulate(block.norm1(x_BSD), *modulation[:2])
        q = self.rotate(self._heads(attn.norm_q(attn.q(y))), rotary)
        k = self.rotate(self._heads(attn.norm_k(attn.k(y))), rotary)
        y = attention(q, *self.remember(layer, k, self._heads(attn.v(y))))
        x_BSD = self.add_gated(x_BSD, attn.o(y.flatten(2)), modulation[2])
        attn = block.cross_attn
        y = attention(self._heads(attn.norm_q(attn.q(block.norm3(x_BSD)))), *self.text_kv[layer])
        x_BSD = x_BSD + attn.o(y.flatten(2))
        return self.add_gated(x_BSD, block.ffn(self.modulate(block.norm2(x_BSD), *modulation[3:5])), modulation[5])

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.network.num_heads, -1))

    def _axis_pairs(self) -> tuple[int, int, int]:
        """Complex pairs of a head that turn with time, row and column."""
        pairs = self.network.head_dim // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3

    @abc.abstractmethod
    def x0(self, x_BCTHW: Tensor, flow_BCTHW: Tensor, sigma: float) -> Tensor:
        """Clean latents of a predicted flow."""

    @abc.abstractmethod
    def modulate(self, x_BSD: Tensor, shift_BTD: Tensor, scale_BTD: Tensor) -> Tensor:
        """x * (1 + scale) + shift, by the frame of each token."""

    @abc.abstractmethod
    def add_gated(self, x_BSD: Tensor, y_BSD: Tensor, gate_BTD: Tensor) -> Tensor:
        """x + gate * y, by the frame of each token."""

    @abc.abstractmethod
    def rotary(self, num_frames: int) -> Any:
        """Rotations of the next `num_frames` frames at their absolute positions, made for every pass."""

    @abc.abstractmethod
    def rotate(self, x_BSNE: Tensor, rotary: Any) -> Tensor:
        """Rotated queries or keys."""

    @abc.abstractmethod
    def remember(self, layer: int, k_BSNE: Tensor, v_BSNE: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of the chunk into a layer's buffers; all keys and values that it attends to."""


class ComfyUILoop(CacheLoop):
    """ComfyUI core's sampler `ar_video`: one buffer for the whole video, its end rewound before every pass.

    Core has no window. To attend to as many frames as ours, every chunk here is the last one of a video of `window`
    frames.
    """

    name = "ComfyUI ar_video"

    def __init__(self, settings: LoopSettings):
        super().__init__(settings)
        self.end = [0] * len(self.keys)

    def commit(self, x0_BCTHW: Tensor) -> None:
        super().commit(x0_BCTHW)
        if self.first_frame + self.settings.chunk > self.settings.window:
            self.first_frame -= self.settings.chunk
        self.end = [self.first_frame * self.tokens] * len(self.end)

    def flow(self, x_BCTHW: Tensor, sigma: float) -> Tensor:
        flow = super().flow(x_BCTHW, sigma)
        self.end = [end - x_BCTHW.shape[2] * self.tokens for end in self.end]
        return flow

    def x0(self, x_BCTHW: Tensor, flow_BCTHW: Tensor, sigma: float) -> Tensor:
        return x_BCTHW - sigma * flow_BCTHW

    def modulate(self, x_BSD: Tensor, shift_BTD: Tensor, scale_BTD: Tensor) -> Tensor:
        return torch.addcmul(self._by_token(shift_BTD), x_BSD, 1 + self._by_token(scale_BTD))

    def add_gated(self, x_BSD: Tensor, y_BSD: Tensor, gate_BTD: Tensor) -> Tensor:
        return torch.addcmul(x_BSD, y_BSD, self._by_token(gate_BTD))

    def _by_token(self, x_BTD: Tensor) -> Tensor:
        return torch.repeat_interleave(x_BTD, self.tokens, dim=1)

    def rotary(self, num_frames: int) -> Tensor:
        """2 x 2 matrices, float32, [1, S, 1, E/2, 2, 2]."""
        starts, device = (self.first_frame, 0, 0), self.network.device
        sizes, angles = (num_frames, *self.grid), []
        for axis, (start, size, pairs) in enumerate(zip(starts, sizes, self._axis_pairs())):
            at = torch.arange(start, start + size, device=device).double()
            omega = THETA ** -(torch.arange(pairs, device=device).double() / pairs)
            shape = [1, 1, 1, pairs]
            shape[axis] = size
            angles.append(torch.outer(at, omega).view(shape).expand(*sizes, pairs))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None]
        turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
        return turns.unflatten(-1, (2, 2)).float()

    def rotate(self, x_BSNE: Tensor, rotary: Tensor) -> Tensor:
        pairs = x_BSNE.float().unflatten(-1, (-1, 1, 2))
        turned = torch.addcmul(rotary[..., 0] * pairs[..., 0], rotary[..., 1], pairs[..., 1])
        return turned.flatten(-2).to(x_BSNE.dtype)

    def remember(self, layer: int, k_BSNE: Tensor, v_BSNE: Tensor) -> tuple[Tensor, Tensor]:
        begin, end = self.end[layer], self.end[layer] + k_BSNE.shape[1]
        self.keys[layer][:, begin:end] = k_BSNE
        self.values[layer][:, begin:end] = v_BSNE
        self.end[layer] = end
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class SelfForcingLoop(CacheLoop):
    """Self-Forcing's rolling cache with a local window and no sink: the oldest frames are shifted out of the buffer.

    Two indices per layer are tensors on the device, read by the host in every layer of every pass.
    """

    name = "Self-Forcing"

    def __init__(self, settings: LoopSettings):
        super().__init__(settings)
        index = lambda: torch.zeros(1, dtype=torch.long, device=self.network.device)
        self.seen = [index() for _ in self.keys]
        """Tokens of the whole video so far."""
        self.filled = [index() for _ in self.keys]
        """Tokens in the buffer."""
        at = torch.arange(MAX_POSITIONS, device=self.network.device).double()
        omegas = [THETA ** -(torch.arange(n, device=at.device).double() / n) for n in self._axis_pairs()]
        self.tables = [torch.polar(torch.ones_like(angle), angle) for angle in (torch.outer(at, o) for o in omegas)]

    def x0(self, x_BCTHW: Tensor, flow_BCTHW: Tensor, sigma: float) -> Tensor:
        return (x_BCTHW.double() - sigma * flow_BCTHW.double()).float()

    def modulate(self, x_BSD: Tensor, shift_BTD: Tensor, scale_BTD: Tensor) -> Tensor:
        by_frame = x_BSD.unflatten(1, (shift_BTD.shape[1], -1))
        return (by_frame * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]).flatten(1, 2)

    def add_gated(self, x_BSD: Tensor, y_BSD: Tensor, gate_BTD: Tensor) -> Tensor:
        return x_BSD + (y_BSD.unflatten(1, (gate_BTD.shape[1], -1)) * gate_BTD[:, :, None]).flatten(1, 2)

    def rotary(self, num_frames: int) -> range:
        """The positions; the rotations are put together for every tensor that is rotated. Raises ValueError."""
        frames = range(self.first_frame, self.first_frame + num_frames)
        if frames.stop > MAX_POSITIONS:
            most = MAX_POSITIONS // self.settings.chunk
            raise ValueError(f"chunks: Self-Forcing's table of positions ends after {most} chunks; measure fewer")
        return frames

    def rotate(self, x_BSNE: Tensor, rotary: range) -> Tensor:
        sizes = (len(rotary), *self.grid)
        time, row, column = self.tables
        turns = torch.cat(
            [
                time[rotary.start : rotary.stop, None, None].expand(*sizes, -1),
                row[: sizes[1]][None, :, None].expand(*sizes, -1),
                column[: sizes[2]][None, None].expand(*sizes, -1),
            ],
            dim=-1,
        ).flatten(0, 2)[None, :, None]
        pairs = torch.view_as_complex(x_BSNE.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(x_BSNE.dtype)

    def remember(self, layer: int, k_BSNE: Tensor, v_BSNE: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, new = self.keys[layer], self.values[layer], k_BSNE.shape[1]
        stop = self.first_frame * self.tokens + new
        grown = stop - int(self.seen[layer].item())
        evicted = 0
        if grown > 0 and new + int(self.filled[layer].item()) > keys.shape[1]:
            filled = int(self.filled[layer].item())
            evicted = new + filled - keys.shape[1]
            for buffer in (keys, values):
                buffer[:, : filled - evicted] = buffer[:, evicted:filled].clone()
        end = int(self.filled[layer].item()) + grown - evicted
        keys[:, end - new : end] = k_BSNE
        values[:, end - new : end] = v_BSNE
        self.seen[layer].fill_(stop)
        self.filled[layer].fill_(end)
        return keys[:, :end], values[:, :end]


PORTS: tuple[type[CacheLoop], ...] = (ComfyUILoop, SelfForcingLoop)
