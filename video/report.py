"""What is remembered, as a picture and in words."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ..memory.history import FORGETTING, PARTS, forgotten_frames, frame_status, reach_frames
from ..memory.memory import Memory, Segment
from ..model.units import latent_seconds
from .sheet import FAINT, INK, LEFT, MARGIN, PAPER, RIGHT, WIDTH, Axes, Sheet, at_time, font, shortened

CHUNK = "the chunk itself"
COLOURS = {
    "sink": (196, 120, 20),
    "slow": (24, 132, 108),
    "fast": (36, 98, 196),
    "was slow": (160, 208, 196),
    "not kept": (226, 226, 222),
    "forgotten": (220, 176, 216),
    CHUNK: (120, 124, 132),
}
MEANING = {
    "sink": "sink",
    "slow": "slow",
    "fast": "fast",
    "was slow": "was slow, made room",
    "not kept": "not kept by the policy",
    "forgotten": "forgotten at a flush or cut",
}
THRESHOLD, FORGETS, LET_GO = (200, 40, 40), (150, 40, 140), (150, 150, 146)
COLUMNS, CAPTION = 6, 26
SAID = 4
"""Flushes and cuts that the summary names one by one."""

Mass = Mapping[float, Sequence[float]]
"""Noise level -> share of the next chunk's attention on each frame that it sees: `slots.all`, then its own; sum 1."""


def summary(memory: Memory, fps: float, mass: Mass | None = None) -> str:
    """The memory as a few lines of text; with `mass`, also where the next chunk looks."""
    slots, config = memory.slots, memory.config
    seconds, reach = (latent_seconds(frames, fps) for frames in (memory.num_frames, reach_frames(memory)))
    promoted = [decision.frame for decision in memory.decisions if decision.promoted]
    kept = ""
    if promoted:
        latest = at_time(promoted[-1] * 4 / fps, seconds)
        share = f"{len(promoted) / len(memory.decisions):.0%} of the frames that left fast"
        kept = f", {share} were kept, the latest of them from {latest}"
    elif memory.decisions:
        kept = ", none of the frames that left fast was kept"
    tau = f", threshold {config.slow_similarity_threshold:g}" if config.uses_threshold else ""
    if config.per_layer:
        kept = "; each layer decides for itself, slow is what any of them holds"
    lines = [
        f"{memory.num_frames} latent frames ({seconds:.1f} s), memory reaches back {reach:.1f} s",
        f"sink {len(slots.sink)} of {config.sink}, slow {len(slots.slow)} of {config.slow},"
        f" fast {len(slots.fast)} (+ {config.chunk} being made) of {config.fast}; {memory.num_bytes / 1e6:.1f} MB",
        f"policy {config.policy}{tau}{kept}",
    ]
    if taken := Counter(forgotten_frames(memory).values()):
        each = [
            f"{count} frames by the {segment.change} at {at_time(segment.first_frame * 4 / fps, seconds)}"
            for segment, count in sorted(taken.items(), key=lambda item: item[0].first_frame)
        ]
        if len(each) > SAID:
            each = [f"{taken.total()} frames by {len(each)} flushes and cuts"]
        lines.append(f"forgotten: {', '.join(each)}")
    if mass:
        parts = ", ".join(f"{part} {share:.1%}" for part, share in per_part(memory, _over_levels(mass)).items())
        lines.append(f"attention of the next chunk, mean over noise levels: {parts}")
    return "\n".join(lines)


def _over_levels(mass: Mass) -> np.ndarray:
    return np.mean(list(mass.values()), axis=0)


def per_part(memory: Memory, frames: Sequence[float]) -> dict[str, float]:
    """Shares of frames (`slots.all`, then the chunk's) summed over sink, slow, fast and the chunk."""
    ends = np.cumsum([len(getattr(memory.slots, part)) for part in PARTS])
    sums = [float(np.sum(part)) for part in np.split(np.asarray(frames, np.float64), ends)]
    return dict(zip((*PARTS, CHUNK), sums))


def draw_report(memory: Memory, thumbnails: np.ndarray | None, fps: float, mass: Mass | None = None) -> Image.Image:
    """Fates over time with segment boundaries, similarity with its threshold, segments, and the remembered frames.

    `thumbnails` are uint8 [M, H, W, 3], one per remembered frame in the order of `memory.slots.all`; None where
    there is no codec to draw them. With `mass`, also where the next chunk looks.
    """
    sheet = Sheet()
    sheet.text(summary(memory, fps), size=16)
    sheet.legend({MEANING[fate]: COLOURS[fate] for fate in MEANING})
    scenes = _scenes(memory)
    _draw_time(sheet, memory, scenes, fps)
    _draw_similarity(sheet, memory, scenes, fps)
    _draw_scenes(sheet, memory, scenes, fps)
    if mass:
        _draw_mass(sheet, memory, mass)
    _draw_thumbnails(sheet, memory, thumbnails, fps, mass)
    return sheet.finished()


def _scenes(memory: Memory) -> list[Segment]:
    """Segments, without those that go on exactly as the one before."""
    scenes: list[Segment] = []
    for segment in memory.segments:
        same = scenes and segment.prompt and (segment.prompt, segment.seed) == (scenes[-1].prompt, scenes[-1].seed)
        if not same or segment.change != "keep":
            scenes.append(segment)
    return scenes


def _boundary(sheet: Sheet, segment: Segment, x: float, top: float, bottom: float) -> None:
    sheet.draw.line((x, top, x, bottom), FORGETS if segment.change in FORGETTING else FAINT, 1)


def _draw_time(sheet: Sheet, memory: Memory, scenes: Sequence[Segment], fps: float) -> None:
    top, draw = sheet.room(118) + 24, sheet.draw
    bar = Axes(top=top, bottom=top + 40, seconds=memory.num_frames * 4 / fps)
    at = lambda frame: bar.x(frame * 4 / fps)
    fate = frame_status(memory)
    # The remembered last and never thinner than three pixels: they must be seen in an hour of video.
    for frame in sorted(range(len(fate)), key=lambda frame: fate[frame] in PARTS):
        left, right = at(frame), max(at(frame), at(frame + 1) - 1)
        if fate[frame] in PARTS and right - left < 2:
            left, right = (left + right) / 2 - 1, (left + right) / 2 + 1
        draw.rectangle((left, bar.top + (0 if fate[frame] in PARTS else 10), right, bar.bottom), COLOURS[fate[frame]])
    bar.clock(draw)
    free = 0.0
    for number, segment in enumerate(scenes, 1):
        x, ends = at(segment.first_frame), [at(each.first_frame) for each in scenes[number:]] + [RIGHT]
        _boundary(sheet, segment, x, bar.top - 4, bar.bottom)
        names = (str(number), f"{number} {segment.change.replace('_', ' ')}")[: 1 if segment.change == "keep" else 2]
        fitting = [name for name in names if free <= x <= ends[0] - font(13).getlength(name) - 4]
        if fitting:
            draw.text((x + 2, bar.top - 20), fitting[-1], INK, font(13))
            free = x + font(13).getlength(fitting[-1]) + 4
    if reach := latent_seconds(reach_frames(memory), fps):
        _draw_reach(sheet, at(min(memory.slots.slow + memory.slots.fast)), bar.bottom + 34, reach)


def _draw_reach(sheet: Sheet, left: float, y: float, seconds: float) -> None:
    """A bracket over the time that is remembered, the words inside it or before it."""
    words = f"the memory reaches back {seconds:.1f} s"
    room = font(13).getlength(words) + 16
    sheet.draw.line((left, y - 5, left, y + 5), INK, 2)
    sheet.draw.line((left, y, RIGHT, y), INK, 2)
    sheet.draw.line((RIGHT, y - 5, RIGHT, y + 5), INK, 2)
    inside = RIGHT - left > room + 40
    middle = (left + RIGHT) / 2 if inside else left - room / 2
    sheet.draw.rectangle((middle - room / 2, y - 9, middle + room / 2 - (0 if inside else 4), y + 9), PAPER)
    sheet.draw.text((middle, y), words, INK, font(13), "mm")


def _draw_similarity(sheet: Sheet, memory: Memory, scenes: Sequence[Segment], fps: float) -> None:
    scores = [(d.frame, d.similarity, d.promoted) for d in memory.decisions if d.similarity is not None]
    if not scores:
        says = f"Policy {memory.config.policy} compares nothing, or nothing left fast yet."
        if memory.config.per_layer:
            says = f"Policy {memory.config.policy}: every layer compares, in every pass; what it saw is not kept."
        sheet.text(says, 13, FAINT)
        return
    tau = memory.config.slow_similarity_threshold
    what = "the frame before it" if memory.config.policy == "clean" else "everything remembered"
    sheet.text(
        f"Similarity of each frame with {what}, when it left fast. Below the red line, the threshold {tau:g}, it is kept"
        " (green), else let go (grey).",
        13,
    )
    top = sheet.room(196) + 6
    low = min(tau, *(score for _, score, _ in scores))
    axes = Axes(
        top=top, bottom=top + 168, seconds=memory.num_frames * 4 / fps, low=low - 0.06 * (1 - low) - 1e-3, high=1.0
    )
    axes.levels(sheet.draw)
    for segment in scenes:
        _boundary(sheet, segment, axes.x(segment.first_frame * 4 / fps), axes.top, axes.bottom)
    sheet.draw.line((LEFT, axes.y(tau), RIGHT, axes.y(tau)), THRESHOLD, 1)
    for frame, score, promoted in scores:
        x, y = axes.x((frame + 0.5) * 4 / fps), axes.y(score)
        sheet.draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), COLOURS["slow"] if promoted else LET_GO)


def _draw_scenes(sheet: Sheet, memory: Memory, scenes: Sequence[Segment], fps: float) -> None:
    """A line a segment: when it begins, how its prompt took over, what that forgot, the prompt."""
    taken, whole = Counter(forgotten_frames(memory).values()), memory.num_frames * 4 / fps
    for number, segment in enumerate(scenes, 1):
        top = sheet.room(20)
        gone = f", {taken[segment]} forgotten" if segment in taken else ""
        change = "begins" if number == 1 else segment.change.replace("_", " ") + gone
        columns = {
            MARGIN: f"{number}",
            MARGIN + 32: at_time(segment.first_frame * 4 / fps, whole),
            MARGIN + 108: change,
            MARGIN + 320: f"seed {segment.seed}",
        }
        for (left, words), end in zip(columns.items(), [*list(columns)[1:], MARGIN + 440]):
            colour = FORGETS if left == MARGIN + 108 and segment.change in FORGETTING else INK
            sheet.draw.text((left, top), shortened(words, end - left - 8, 13), colour, font(13))
        prompt = segment.prompt or "(a prompt whose words the memory was not told)"
        prompt = shortened(prompt, WIDTH - 2 * MARGIN - 440, 13)
        sheet.draw.text((MARGIN + 440, top), prompt, INK if segment.prompt else FAINT, font(13))
    sheet.room(12)


def _draw_mass(sheet: Sheet, memory: Memory, mass: Mass) -> None:
    """A bar a noise level, and one of what frames would draw if all were looked at alike."""
    sheet.text(
        "Where the next chunk looks, under the last prompt: softmax mass of its self-attention per part, averaged over"
        " layers, heads and its tokens.",
        13,
    )
    seen = len(next(iter(mass.values())))
    rows = {f"noise {sigma:.2f}": frames for sigma, frames in mass.items()} | {"all alike": [1 / seen] * seen}
    left, right = LEFT + 36, 700
    for name, frames in rows.items():
        top, x = sheet.room(22), float(left)
        sheet.draw.text((MARGIN, top + 1), name, FAINT if name == "all alike" else INK, font(13))
        for number, (part, share) in enumerate(per_part(memory, frames).items()):
            end = x + share * (right - left)
            sheet.draw.rectangle((x, top, end, top + 15), COLOURS[part])
            swatch = right + 20 + 124 * number
            sheet.draw.rectangle((swatch, top + 2, swatch + 11, top + 13), COLOURS[part])
            sheet.draw.text((swatch + 17, top), f"{part.removesuffix(' itself')} {share:.1%}", INK, font(13))
            x = end
    sheet.room(12)


def _draw_thumbnails(
    sheet: Sheet, memory: Memory, thumbnails: np.ndarray | None, fps: float, mass: Mass | None
) -> None:
    frames = memory.slots.all
    if not frames or thumbnails is None:
        sheet.text("The remembered frames are not drawn." if frames else "Nothing is remembered yet.", 13, FAINT)
        return
    share = _over_levels(mass) if mass else None
    sheet.text(
        "The remembered frames, with their time in the video"
        + (" and their share of the next chunk's attention, mean over noise levels." if mass else "."),
        13,
    )
    fate, whole = frame_status(memory), memory.num_frames * 4 / fps
    column = (WIDTH - 2 * MARGIN) // COLUMNS
    height = int((column - 12) * thumbnails.shape[1] / thumbnails.shape[2])
    for i, (frame, pixels) in enumerate(zip(frames, thumbnails)):
        if i % COLUMNS == 0:
            top = sheet.room(height + 6 + CAPTION) + 3
        left = MARGIN + i % COLUMNS * column + 3
        enlarged = pixels.shape[1] < column
        picture = Image.fromarray(np.asarray(pixels)).resize(
            (column - 12, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        )
        sheet.draw.rectangle((left - 3, top - 3, left + column - 10, top + height + 2), COLOURS[fate[frame]])
        sheet.image.paste(picture, (left, top))
        words = f"{fate[frame]}  {at_time(frame * 4 / fps, whole)}" + (f"  {share[i]:.1%}" if mass else "")
        sheet.draw.text((left, top + height + 5), words, INK, font(13))
