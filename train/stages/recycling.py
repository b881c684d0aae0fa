"""Error recycling: a buffer of the teacher's own prediction errors (docs/method.md, Teacher)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import check_range


@dataclass(frozen=True, kw_only=True)
class RecyclingConfig:
    """How many errors are kept, and how often they are added."""

    bins: int = 10
    """Number of ranges of noise levels that errors are kept for."""
    entries: int = 64
    """Errors per bin; a full bin replaces a random one. An error is one chunk of latent frames in bfloat16."""
    share: float = 0.9
    """Share of the contexts that get an error."""
    clean_share: float = 0.2
    """Share of the samples that stay clean whatever `share` is."""
    learn_clean_share: float = 0.1
    """Share of the errors measured on clean contexts that are kept."""

    def __post_init__(self):
        check_range(self, "bins", "entries", least=1)


class ErrorBuffer:
    """Errors of x0, [C, chunk, H, W] each, by noise level. All randomness comes from the generators passed in."""

    def __init__(self, config: RecyclingConfig):
        self.config = config
        self.bins: list[list[Tensor]] = [[] for _ in range(config.bins)]

    def __len__(self) -> int:
        return sum(map(len, self.bins))

    def add(self, sigma: float, error_CTHW: Tensor, chunk: int, generator: torch.Generator) -> None:
        """Store an error, chunk by chunk. A full bin replaces a random entry."""
        entries = self.bins[min(int(sigma * self.config.bins), self.config.bins - 1)]
        for part in error_CTHW.split(chunk, dim=1):
            part = part.detach().to("cpu", torch.bfloat16).clone()
            if len(entries) < self.config.entries:
                entries.append(part)
            else:
                entries[int(torch.randint(len(entries), (), generator=generator))] = part

    def draw(self, num_frames: int, generator: torch.Generator) -> Tensor | None:
        """Random errors of any noise level for a context, [C, num_frames, H, W]; None while the buffer is empty."""
        filled = [entries for entries in self.bins if entries]
        if not filled:
            return None
        pick = lambda items: items[int(torch.randint(len(items), (), generator=generator))]
        parts: list[Tensor] = []
        while sum(part.shape[1] for part in parts) < num_frames:
            parts.append(pick(pick(filled)))
        return torch.cat(parts, dim=1)[:, :num_frames].float()

    def state(self) -> dict[str, Tensor]:
        """All errors, one tensor per bin that is not empty."""
        return {f"bin{number}": torch.stack(entries) for number, entries in enumerate(self.bins) if entries}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the errors of `state()`."""
        self.bins = [list(state.get(f"bin{number}", torch.empty(0)).unbind(0)) for number in range(self.config.bins)]
