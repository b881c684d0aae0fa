"""Error recycling: a buffer of the teacher's own prediction errors (docs/method.md, Teacher)."""

import torch
from torch import Tensor

from ..config import RecyclingConfig


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
