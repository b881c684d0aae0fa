"""One network and how it runs: sampler, teacher, critic and teacher-forced passes all use this object.

Shapes: B batch, C latent channels, T latent frames, H W latent rows and columns, M remembered latent frames,
P tokens per latent frame, G text groups, N heads, E head dim, L text tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory.stores import NewFrames
from ..memory.view import Rotate
from .attention import Attention, plain, sdpa
from .causal import AttendSelf, ModuleRunner, TextContext, WanNet, causal_forward, embed_text, last_keys, run_directly
from .flow import TIMESTEPS
from .memory_attention import ChunkAttention, attention_over
from .rope import rotary_table, rotate
from .sequence import Processes
from .text_cache import TextCache


@dataclass(frozen=True)
class Network:
    """A module tree with Wan's names, the device and dtype it computes in, and how its modules run."""

    net: WanNet
    device: torch.device
    dtype: torch.dtype
    attention: Attention = sdpa
    run: ModuleRunner = run_directly
    """Runs the whole network and each of its blocks: for sharding, recomputing, offloading, compiling and checks."""
    on_pass: Callable[[], None] = lambda: None
    """Called before every forward pass, for example to stop after an interrupt."""
    commit: "Network | None" = None
    """The network of the commit pass, if the student has weights of its own for it (docs/method.md, Sampling)."""
    processes: Processes | None = None
    """Those that share each pass (model/sequence.py); None: this one alone."""
    texts: TextCache | None = None
    """Prompts that are embedded already, for a network whose weights do not change; None: every call embeds."""

    def shared_by(self, processes: Processes) -> "Network":
        """The network with passes that several processes share."""
        return dataclasses.replace(self, processes=processes, commit=self.commit and self.commit.shared_by(processes))

    @property
    def num_layers(self) -> int:
        return len(self.net.blocks)

    @property
    def num_heads(self) -> int:
        return self.net.blocks[0].self_attn.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads whose keys and values this process has."""
        return self.num_heads // (self.processes.count if self.processes else 1)

    @property
    def head_dim(self) -> int:
        return self.net.blocks[0].self_attn.head_dim

    def grid(self, latent_size: tuple[int, int, int]) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of C, H, W."""
        _, patch_rows, patch_columns = self.net.patch_size
        return latent_size[1] // patch_rows, latent_size[2] // patch_columns

    def embed_text(self, text_BLC: Tensor, num_groups: int = 1) -> TextContext:
        """Text embeddings [B * G, L, C] -> keys and values of cross-attention (causal.embed_text).

        With gradients every call embeds: chunks that share an embedding would sum its gradients in another order.
        """
        function = functools.partial(embed_text, num_groups=num_groups, run=self.run)
        embed = lambda: self.run(self.net, function, text_BLC.to(self.device, self.dtype))
        if self.texts is None or num_groups > 1 or self.has_grad:
            return embed()
        return self.texts.find((self.net, self.device, self.dtype), text_BLC, self.prompt_bytes, embed)

    @property
    def has_grad(self) -> bool:
        """Whether a pass now gives gradients to weights."""
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.net.parameters())

    @property
    def prompt_bytes(self) -> int:
        """Keys and values of a prompt of full length. `texts` have so many bytes at most, all prompts together."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.net.text_len * self.dtype.itemsize

    def flow(
        self, x_BCTHW: Tensor, sigma: float | Tensor, text: TextContext, attend_self: AttendSelf, num_clean: int = 0
    ) -> Tensor:
        """Predicted flow [B, C, T, H, W], float32, at noise level `sigma`: one for all frames, or [B, T].

        The first `num_clean` frames have noise level 0.
        """
        if isinstance(sigma, Tensor):
            timestep_BT = TIMESTEPS * sigma
        else:
            timestep_BT = self._timestep(x_BCTHW, sigma)
            timestep_BT[:, :num_clean] = 0
        return plain(self._pass(causal_forward, x_BCTHW, timestep_BT, text, attend_self).float())

    def last_keys(self, x0_BCTHW: Tensor, text: TextContext, attend_self: AttendSelf) -> tuple[Tensor, Tensor]:
        """Raw keys and values [B, T, P, N, E] of the last layer for clean latents: the end of a pass without a flow.

        `attend_self` gets those of the other layers.
        """
        return self._pass(last_keys, x0_BCTHW, self._timestep(x0_BCTHW, 0.0), text, attend_self)

    def _timestep(self, x_BCTHW: Tensor, sigma: float) -> Tensor:
        """One noise level for all frames, [B, T]."""
        return torch.full((x_BCTHW.shape[0], x_BCTHW.shape[2]), TIMESTEPS * sigma, device=self.device)

    def _pass(
        self, function: Callable, x_BCTHW: Tensor, timestep_BT: Tensor, text: TextContext, attend_self: AttendSelf
    ) -> Any:
        """`causal_forward` or `last_keys` of this network."""
        self.on_pass()
        if self.processes:
            _, channels, _, height, width = x_BCTHW.shape
            rows, columns = self.grid((channels, height, width))
            self.processes.check(self.num_heads, rows * columns)
            attend_self = self.processes.around(attend_self)
        function = functools.partial(function, attention=self.attention, run=self.run, processes=self.processes)
        return self.run(self.net, function, x_BCTHW.to(self.dtype), timestep_BT, text, attend_self)

    def attend(
        self, view: Any, num_frames: int, latent_size: tuple[int, int, int], attends: str = "all", keep: bool = False
    ) -> ChunkAttention:
        """Self-attention of a chunk of `num_frames` over a memory's view (memory_attention.attention_over).

        With `keep` the keys and values of a pass are in its `new_kv` after its method `keep` got those of `last_keys`.
        """
        table = self.rotary_table(view.positions(num_frames), latent_size)
        return attention_over(view, table, self.attention, attends, NewFrames(self.num_layers) if keep else None)

    def rotate_to_ranks(self, latent_size: tuple[int, int, int], num_frames: int) -> Rotate:
        """A function that rotates raw keys of some of `num_frames` remembered frames to their positions."""
        table = self.rotary_table(range(num_frames), latent_size)
        return lambda keys_BnPNE, positions: rotate(keys_BnPNE, table[positions.start : positions.stop])

    def rotary_table(self, positions: range, latent_size: tuple[int, int, int]) -> Tensor:
        """Rotations of latent frames at temporal positions (rope.rotary_table)."""
        times = torch.arange(positions.start, positions.stop, device=self.device)
        return rotary_table(times, *self.grid(latent_size), self.head_dim)
