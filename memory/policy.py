"""Which latent frames stay: sink, slow, fast. Integers and floats only, no tensors.

Between chunks fast holds `fast - chunk` frames, because the next chunk will be the rest of it: what leaves fast
when a chunk starts (method.md 5.5, choice 1) is decided as soon as the chunk before it is committed. Nothing can
happen in between, so the decisions are the same and less is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import MemoryConfig

Similarity = Callable[[int, Sequence[int]], Sequence[float]]
"""(frame, other frames) -> mean cosine of their keys, one per other; all are absolute latent-frame indices."""


@dataclass(frozen=True)
class Slots:
    """Absolute indices of the remembered latent frames, each part oldest first."""

    sink: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()
    fast: tuple[int, ...] = ()
    similarity_to_previous: tuple[float | None, ...] = ()
    """Similarity of each fast frame to the frame just before it in time (policy clean)."""

    @property
    def all(self) -> tuple[int, ...]:
        """In the order of their positions."""
        return self.sink + self.slow + self.fast


@dataclass(frozen=True)
class Decision:
    """What became of one latent frame when it left fast."""

    frame: int
    promoted: bool
    similarity: float | None
    """What the threshold was compared with; None where the policy does not compare or had nothing to compare."""
    evicted: int | None = None
    """The slow frame that made room."""


def advance(
    slots: Slots, config: MemoryConfig, new_frames: Sequence[int], similarity: Similarity
) -> tuple[Slots, tuple[Decision, ...]]:
    """Commit `new_frames` and let the oldest fast frames leave; pure."""
    num_sink = config.sink - len(slots.sink)
    sink = slots.sink + tuple(new_frames[:num_sink])
    slow = slots.slow
    fast, similarity_to_previous = list(slots.fast), list(slots.similarity_to_previous)
    previous = slots.fast[-1] if slots.fast else (sink[-1] if sink else None)
    for frame in new_frames[num_sink:]:
        compare = config.policy == "clean" and config.slow and previous is not None
        similarity_to_previous.append(similarity(frame, [previous])[0] if compare else None)
        fast.append(frame)
        previous = frame
    decisions = []
    while len(fast) > config.fast - config.chunk:
        frame, like = fast.pop(0), similarity_to_previous.pop(0)
        slow, decision = _leave_fast(frame, like, sink, slow, config, similarity)
        decisions.append(decision)
    return Slots(sink, slow, tuple(fast), tuple(similarity_to_previous)), tuple(decisions)


def _leave_fast(
    frame: int,
    similarity_to_previous: float | None,
    sink: tuple[int, ...],
    slow: tuple[int, ...],
    config: MemoryConfig,
    similarity: Similarity,
) -> tuple[tuple[int, ...], Decision]:
    score = None
    if not config.slow:
        promoted = False
    elif config.policy == "fifo":
        promoted = True
    elif config.policy == "uniform":
        promoted = frame % config.uniform_stride == 0
    else:
        if config.policy == "clean":
            score = similarity_to_previous
        else:
            others = (sink if config.novel_against_sink else ()) + slow
            score = max(similarity(frame, others)) if others else None
        promoted = score is None or score < config.slow_similarity_threshold
    if not promoted:
        return slow, Decision(frame, False, score)
    slow = (*slow, frame)
    evicted = None
    if len(slow) > config.slow:
        evicted = _most_redundant(slow, similarity) if config.eviction == "redundant" else slow[0]
        slow = tuple(kept for kept in slow if kept != evicted)
    return slow, Decision(frame, True, score, evicted)


def _most_redundant(slow: tuple[int, ...], similarity: Similarity) -> int:
    """The older frame of the most similar pair."""
    best, oldest = -2.0, slow[0]
    for position, frame in enumerate(slow[:-1]):
        closest = max(similarity(frame, slow[position + 1 :]))
        if closest > best:
            best, oldest = closest, frame
    return oldest
