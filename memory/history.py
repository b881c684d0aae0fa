"""What became of every latent frame of a video."""

from .memory import Memory, Segment

PARTS = ("sink", "slow", "fast")
FORGETTING = ("flush", "cut", "cut_new_sink")
"""Changes that forget frames (memory.CHANGES)."""


def frame_status(memory: Memory) -> list[str]:
    """One of `sink`, `slow`, `fast`, `was slow`, `not kept` (by the policy), `forgotten` (FORGETTING) per frame."""
    # Layers decide on the first frame of a chunk only, and their slots are never flushed or cut.
    status = ["not kept" if memory.config.per_layer else "forgotten"] * memory.num_frames
    for decision in memory.decisions:
        if not decision.promoted:
            status[decision.frame] = "not kept"
        if decision.evicted is not None:
            status[decision.evicted] = "was slow"
    for part in PARTS:
        for frame in getattr(memory.slots, part):
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
        if count < memory.config.sink:
            sink.add(frame)
            count += 1
    return sink


def reach_frames(memory: Memory) -> int:
    """Age of the oldest remembered frame outside the sink, in latent frames; 0 if there is none."""
    frames = memory.slots.slow + memory.slots.fast
    return memory.num_frames - 1 - min(frames) if frames else 0
