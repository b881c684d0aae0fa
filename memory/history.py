"""What became of every latent frame of a video."""

from .memory import FORGETTING, Memory, Segment

REFERENCE = "reference"
PARTS = ("sink", "slow", "fast")


def remembered_parts(memory: Memory) -> dict[str, tuple[int, ...]]:
    """The remembered frames in the order of their positions: references, if there are any, sink, slow, fast."""
    slots = memory.slots
    references = {REFERENCE: slots.references} if slots.references else {}
    return references | {"sink": slots.sink[len(slots.references) :], "slow": slots.slow, "fast": slots.fast}


def frame_status(memory: Memory) -> list[str]:
    """One of `sink`, `slow`, `fast`, `was slow`, `not kept` (by the policy), `forgotten` (FORGETTING) per frame.

    Policy recall keeps the film: a frame `was slow` if any chunk recalled it, others are `not recalled`.
    """
    # Layers decide on the first frame of a chunk only, and their slots are never flushed or cut.
    status = ["not kept" if memory.config.per_layer else "forgotten"] * memory.num_frames
    for decision in memory.decisions:
        if not decision.promoted:
            status[decision.frame] = "not kept"
        if decision.evicted is not None:
            status[decision.evicted] = "was slow"
    if memory.config.recalls:
        status[memory.first_recalled :] = ["not recalled"] * (memory.num_frames - memory.first_recalled)
        for frame in (frame for recall in memory.recalls for frame in recall.slow if frame >= memory.first_recalled):
            status[frame] = "was slow"
    for part, frames in remembered_parts(memory).items():
        for frame in frames if part != REFERENCE else ():
            status[frame] = part
    return status


def forgotten_frames(memory: Memory) -> dict[int, Segment]:
    """Forgotten frames, each with the segment whose flush or cut forgot it."""
    sink, config = _sink_frames(memory), memory.config

    def forgets(segment: Segment, frame: int) -> bool:
        if segment.change not in FORGETTING or frame >= segment.first_frame:
            return False
        if segment.change == "cut_new_sink" or frame in sink:
            return segment.change == "cut_new_sink"
        return segment.change == "cut" or frame < segment.first_frame - min(config.chunk, config.fast - config.chunk)

    frames = [frame for frame, status in enumerate(frame_status(memory)) if status == "forgotten"]
    by_frame = {frame: next((s for s in memory.segments if forgets(s, frame)), None) for frame in frames}
    return {frame: segment for frame, segment in by_frame.items() if segment}


def _sink_frames(memory: Memory) -> set[int]:
    """Frames that are or were in the sink."""
    starts = {segment.first_frame for segment in memory.segments if segment.change == "cut_new_sink"}
    sink, count = set(), 0
    for frame in range(memory.num_frames):
        count = 0 if frame in starts else count
        if count < memory.config.sink - len(memory.references):
            sink.add(frame)
            count += 1
    return sink


def reach_frames(memory: Memory) -> int:
    """Age of the oldest frame outside the sink that can be remembered, in latent frames; 0 if there is none.

    Policy recall can choose any frame of the film since the last flush or cut. Other policies have their slots.
    """
    frames = memory.slots.slow + memory.slots.fast
    if memory.config.recalls and memory.config.slow and frames:
        frames = (*frames, max(memory.first_recalled, memory.config.sink - len(memory.references)))
    return memory.num_frames - 1 - min(frames) if frames else 0
