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
from .causal import AttendSelf, ModuleRunner, TextContext, WanNet, causal_forward, embed_text, run_directly
from .flow import TIMESTEPS
from .memory_attention import ChunkAttention, attention_over
from .pooling import Cells
from .rope import rotary_table, rotate
from .sequence import Processes


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
        """Text embeddings [B * G, L, C] -> keys and values of cross-attention (causal.embed_text)."""
        embed = functools.partial(embed_text, num_groups=num_groups, run=self.run)
        return self.run(self.net, embed, text_BLC.to(self.device, self.dtype))

    def flow(
        self, x_BCTHW: Tensor, sigma: float | Tensor, text: TextContext, attend_self: AttendSelf, num_clean: int = 0
    ) -> Tensor:
        """Predicted flow [B, C, T, H, W], float32, at noise level `sigma`: one for all frames, or [B, T].

        The first `num_clean` frames have noise level 0.
        """
        self.on_pass()
        if isinstance(sigma, Tensor):
            timestep_BT = TIMESTEPS * sigma
        else:
            timestep_BT = torch.full((x_BCTHW.shape[0], x_BCTHW.shape[2]), TIMESTEPS * sigma, device=self.device)
            timestep_BT[:, :num_clean] = 0
        if self.processes:
            _, channels, _, height, width = x_BCTHW.shape
            rows, columns = self.grid((channels, height, width))
            self.processes.check(self.num_heads, rows * columns)
            attend_self = self.processes.around(attend_self)
        forward = functools.partial(causal_forward, attention=self.attention, run=self.run, processes=self.processes)
        flow_BCTHW = self.run(self.net, forward, x_BCTHW.to(self.dtype), timestep_BT, text, attend_self)
        return plain(flow_BCTHW.float())

    def attend(
        self, view: Any, num_frames: int, latent_size: tuple[int, int, int], attends: str = "all", keep: bool = False
    ) -> ChunkAttention:
        """Self-attention of a chunk of `num_frames` over a memory's view (memory_attention.attention_over).

        With `keep` the keys and values of a pass stay in its `new_kv`.
        """
        table = self.rotary_table(view.positions(num_frames), latent_size)
        return attention_over(view, table, self.attention, attends, NewFrames(self.num_layers) if keep else None)

    def rotate_to_ranks(self, latent_size: tuple[int, int, int], num_frames: int) -> Rotate:
        """A function that rotates raw keys of some of `num_frames` remembered frames to their positions."""
        table = self.rotary_table(range(num_frames), latent_size)
        rows, columns = self.grid(latent_size)
        times = torch.arange(num_frames, device=self.device)

        def turn(keys, positions, cell=1):
            if cell == 1:
                return rotate(keys, table[positions.start : positions.stop])
            pooled = rotary_table(times[positions.start : positions.stop], rows, columns, self.head_dim, cell)
            return rotate(keys, pooled)

        turn.cells = lambda cell: Cells(rows, columns, cell)
        return turn

    def rotary_table(self, positions: range, latent_size: tuple[int, int, int]) -> Tensor:
        """Rotations of latent frames at temporal positions (rope.rotary_table)."""
        times = torch.arange(positions.start, positions.stop, device=self.device)
        return rotary_table(times, *self.grid(latent_size), self.head_dim)
