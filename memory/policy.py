"""Which latent frames stay: sink, slow, fast (docs/method.md, Memory and Policies). Integers and floats, no tensors.

Between chunks fast holds `fast - chunk` frames: the oldest fast frames leave when a chunk is committed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import NOVEL, MemoryConfig
from .recall import Choose

Similarity = Callable[[int, Sequence[int]], Sequence[float]]
"""(frame, other frames) -> mean cosine of their keys, one per other; all are absolute latent-frame indices."""


@dataclass(frozen=True)
class Slots:
    """Absolute indices of the remembered latent frames, each part oldest first. Those of references are below 0."""

    sink: tuple[int, ...] = ()
    """References (references.py), then the first frames of the film or scene."""
    slow: tuple[int, ...] = ()
    fast: tuple[int, ...] = ()
    similarity_to_previous: tuple[float | None, ...] = ()
    """Similarity of each fast frame to the frame before it (policy clean)."""

    @property
    def all(self) -> tuple[int, ...]:
        """In the order of their positions."""
        return self.sink + self.slow + self.fast

    @property
    def references(self) -> tuple[int, ...]:
        """The references among them."""
        return tuple(frame for frame in self.sink if frame < 0)

    @property
    def film(self) -> tuple[int, ...]:
        """The frames of the film among them."""
        return self.all[len(self.references) :]


@dataclass(frozen=True)
class Decision:
    """What happened to a latent frame when it left fast."""

    frame: int
    promoted: bool
    similarity: float | None
    """The value compared with the threshold; None if nothing was compared."""
    evicted: int | None = None
    """The slow frame that was evicted for it."""


def advance(
    slots: Slots,
    config: MemoryConfig,
    new_frames: Sequence[int],
    similarity: Similarity,
    choose: Choose = lambda held, remembered: (),
) -> tuple[Slots, tuple[Decision, ...]]:
    """The slots after `new_frames` are committed and the oldest fast frames leave.

    Policy recall needs `choose`, and decides nothing about single frames.
    """
    num_sink = config.sink - len(slots.sink)
    sink = slots.sink + tuple(new_frames[:num_sink])
    slow = slots.slow
    fast, similarity_to_previous = list(slots.fast), list(slots.similarity_to_previous)
    previous = tuple(frame for frame in (sink + slots.fast)[-1:] if frame >= 0)  # a reference is before no frame
    for frame in new_frames[num_sink:]:
        compare = config.policy == "clean" and config.slow and previous
        similarity_to_previous.append(similarity(frame, previous)[0] if compare else None)
        fast.append(frame)
        previous = (frame,)
    decisions, left = [], []
    while len(fast) > config.fast - config.chunk:
        frame, score, evicted = fast.pop(0), similarity_to_previous.pop(0), None
        left.append(frame)
        if config.policy in NOVEL and config.slow:
            others = (sink if config.novel_against_sink else ()) + slow
            score = max(similarity(frame, others)) if others else None
        if promoted := _is_promoted(frame, score, config):
            slow = (*slow, frame)
            if len(slow) > config.slow:
                evicted = _most_redundant(slow, similarity) if config.evicts_redundant else slow[0]
                slow = tuple(kept for kept in slow if kept != evicted)
        if not config.recalls:
            decisions.append(Decision(frame, promoted, score, evicted))
    if config.recalls and config.slow:
        slow = choose((*slow, *left), (*sink, *fast))
    return Slots(sink, slow, tuple(fast), tuple(similarity_to_previous)), tuple(decisions)


def _is_promoted(frame: int, score: float | None, config: MemoryConfig) -> bool:
    if not config.slow or config.recalls:
        return False
    if config.policy == "uniform":
        return frame % config.uniform_stride == 0
    return score is None or score < config.slow_similarity_threshold  # policy fifo has no score


def _most_redundant(slow: tuple[int, ...], similarity: Similarity) -> int:
    """The frame most like two others: the middle of the densest triple. Of equals the oldest."""

    def told(frame: int) -> float:
        return sum(sorted(similarity(frame, [other for other in slow if other != frame]))[-2:])

    return max(slow, key=told)
