"""Error recycling: a teacher must continue from a student's imperfect frames (method.md 4.7, 5.2).

The errors of its own one-step predictions are kept by noise level and added to the frames it continues from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RecyclingConfig:
    """How many errors are kept, and how often they are added."""

    bins: int = 10
    """Noise levels that are told apart."""
    entries: int = 64
    """Errors a bin keeps; an older one goes at random. One is a chunk of latent frames in bfloat16."""
    share: float = 0.9
    """Contexts that errors are added to."""
    clean_share: float = 0.2
    """Samples that stay clean whatever `share` says."""
    learn_clean_share: float = 0.1
    """How often errors measured on a clean context enter the bank."""

    def __post_init__(self):
        for name in ("bins", "entries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be 1 or more")


class ErrorBank:
    """Errors of x0 [C, chunk, H, W] by noise level; a function of what was added and of the generators given."""

    def __init__(self, config: RecyclingConfig):
        self.config = config
        self.bins: list[list[Tensor]] = [[] for _ in range(config.bins)]

    def __len__(self) -> int:
        return sum(map(len, self.bins))

    def add(self, sigma: float, error_CTHW: Tensor, chunk: int, generator: torch.Generator) -> None:
        """Keep an error, chunk by chunk."""
        held = self.bins[min(int(sigma * self.config.bins), self.config.bins - 1)]
        for part in error_CTHW.split(chunk, dim=1):
            part = part.detach().to("cpu", torch.bfloat16).clone()
            if len(held) < self.config.entries:
                held.append(part)
            else:
                held[int(torch.randint(len(held), (), generator=generator))] = part

    def draw(self, num_frames: int, generator: torch.Generator) -> Tensor | None:
        """An error for every frame of a context [C, num_frames, H, W], of any noise level; None while there is none."""
        filled = [held for held in self.bins if held]
        if not filled:
            return None
        pick = lambda count: int(torch.randint(count, (), generator=generator))
        parts, have = [], 0
        while have < num_frames:
            held = filled[pick(len(filled))]
            parts.append(held[pick(len(held))])
            have += parts[-1].shape[1]
        return torch.cat(parts, dim=1)[:, :num_frames].float()

    def state(self) -> dict[str, Tensor]:
        """What is held, one tensor a bin."""
        return {f"bin{number}": torch.stack(held) for number, held in enumerate(self.bins) if held}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put it back."""
        self.bins = [list(state.get(f"bin{number}", torch.empty(0)).unbind(0)) for number in range(self.config.bins)]
