"""What a memory remembers, in words and as a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ..memory.fields import counted
from ..memory.history import (  # fmt: skip
    FORGETTING,
    PARTS,
    REFERENCE,
    forgotten_frames,
    frame_status,
    reach_frames,
    remembered_parts,
)
from ..memory.memory import Memory, Segment
from ..memory.references import frame_name
from ..model.units import latent_seconds
from .sheet import FAINT, INK, LEFT, MARGIN, PAPER, RIGHT, WIDTH, Axes, Sheet, at_time, font, shortened

CHUNK = "the chunk itself"
COLOURS = {
    REFERENCE: (124, 84, 176),
    "sink": (196, 120, 20),
    "slow": (24, 132, 108),
    "fast": (36, 98, 196),
    "was slow": (160, 208, 196),
    "not kept": (226, 226, 222),
    "not recalled": (214, 222, 232),
    "forgotten": (220, 176, 216),
    CHUNK: (120, 124, 132),
}
LEGEND = {status: status for status in PARTS} | {
    "was slow": "was slow before",
    "not kept": "not kept by the policy",
    "not recalled": "in the film, not recalled yet",
    "forgotten": "forgotten at a flush or cut",
}
THRESHOLD, FORGETS, NOT_KEPT = (200, 40, 40), (150, 40, 140), (150, 150, 146)
COLUMNS, CAPTION = 6, 26
MAX_CHANGES = 4
"""Flushes and cuts that the summary lists one by one."""

Mass = Mapping[float, Sequence[float]]
"""Noise level -> share of the next chunk's attention on each frame that it sees: `slots.all`, then its own; sum 1."""


def summary(memory: Memory, fps: float, mass: Mass | None = None) -> str:
    """The memory as a few lines of text; with `mass`, also what the next chunk attends to."""
    slots, config = memory.slots, memory.config
    seconds, reach = (latent_seconds(frames, fps) for frames in (memory.num_frames, reach_frames(memory)))
    at_frame = lambda frame: at_time(latent_seconds(frame, fps), seconds)
    promoted = [decision.frame for decision in memory.decisions if decision.promoted]
    kept = ""
    if config.per_layer:
        kept = "; each layer decides for itself, slow is what any of them holds"
    elif promoted:
        share = f"{len(promoted) / len(memory.decisions):.0%} of the frames that left fast"
        kept = f", {share} were kept, the latest of them from {at_frame(promoted[-1])}"
    elif memory.recalls:
        reads = sum(recall.num_reads for recall in memory.recalls)
        kept = (
            ": slow frames were chosen from the film before every chunk; passes for that:"
            f" {reads} in {counted(len(memory.recalls), 'chunk')}"
        )
    elif memory.decisions:
        kept = ", none of the frames that left fast was kept"
    tau = f", threshold {config.slow_similarity_threshold:g}" if config.uses_threshold else ""
    lines = [
        f"{memory.num_frames} latent frames ({seconds:.4g} s), memory reaches back {reach:.4g} s",
        f"sink {len(slots.sink)} of {config.sink}{_pinned(memory)}, slow {len(slots.slow)} of {config.slow},"
        f" fast {len(slots.fast)} of {config.fast} (the next chunk is {config.chunk}); {memory.num_bytes / 1e6:.1f} MB",
        f"policy {config.policy}{tau}{kept}",
    ]
    if counts := Counter(forgotten_frames(memory).values()):
        changes = [
            f"{count} frames by the {segment.change} at {at_frame(segment.first_frame)}"
            for segment, count in sorted(counts.items(), key=lambda item: item[0].first_frame)
        ]
        if len(changes) > MAX_CHANGES:
            changes = [f"{counts.total()} frames by {len(changes)} flushes and cuts"]
        lines.append(f"forgotten: {', '.join(changes)}")
    if mass:
        shares = per_part(memory, np.mean(list(mass.values()), axis=0)).items()
        parts = ", ".join(f"{part} {share:.1%}" for part, share in shares)
        lines.append(f"attention of the next chunk, mean over noise levels: {parts}")
    return "\n".join(lines)


def _pinned(memory: Memory) -> str:
    """How many slots of the sink references have; empty for none."""
    count = len(memory.references)
    return f" ({count} reference{'s' * (count > 1)})" if count else ""


def per_part(memory: Memory, frames: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Shares of frames (`slots.all`, then the chunk's) summed over references, sink, slow, fast and the chunk."""
    parts = remembered_parts(memory)
    ends = np.cumsum([len(part) for part in parts.values()])
    sums = [float(np.sum(part)) for part in np.split(np.asarray(frames, np.float64), ends)]
    return dict(zip((*parts, CHUNK), sums))


def draw_report(memory: Memory, thumbnails: np.ndarray | None, fps: float, mass: Mass | None = None) -> Image.Image:
    """Status of frames over time, similarity with its threshold, segments, and the remembered frames.

    `thumbnails` are uint8 [M, H, W, 3], one per remembered frame in the order of `memory.slots.all`; None: they are not
    drawn. With `mass`, also what the next chunk attends to.
    """
    report = _Report(memory, fps)
    report.sheet.text(summary(memory, fps), size=16)
    pinned = {"reference, not in the video": COLOURS[REFERENCE]} if memory.references else {}
    report.sheet.legend(pinned | {LEGEND[status]: COLOURS[status] for status in LEGEND})
    report.draw_time()
    report.draw_similarity()
    report.draw_segments()
    if mass:
        report.draw_mass(mass)
    report.draw_thumbnails(thumbnails, mass)
    return report.sheet.finished()


class _Report:
    """The parts of a report, drawn one below the other."""

    def __init__(self, memory: Memory, fps: float):
        self.sheet, self.memory, self.fps = Sheet(), memory, fps
        self.seconds = latent_seconds(memory.num_frames, fps)
        self.status = frame_status(memory)
        self.segments: list[Segment] = []
        """Without those that continue the one before without a change."""
        for segment in memory.segments:
            before = self.segments[-1] if self.segments else None
            same = before and segment.prompt and (segment.prompt, segment.seed) == (before.prompt, before.seed)
            if not same or segment.change != "keep":
                self.segments.append(segment)

    def draw_time(self) -> None:
        """The status of every frame, with the segments' boundaries and the time that is remembered."""
        top, draw, status = self.sheet.room(118) + 24, self.sheet.draw, self.status
        bar = Axes(top=top, bottom=top + 40, seconds=self.seconds)
        x_of = lambda frame: bar.x(latent_seconds(frame, self.fps))
        # Remembered frames come last and are at least two pixels wide: they are visible in an hour of video.
        for frame in sorted(range(len(status)), key=lambda frame: status[frame] in PARTS):
            left, right = x_of(frame), max(x_of(frame), x_of(frame + 1) - 1)
            if status[frame] in PARTS and right - left < 2:
                left, right = (left + right) / 2 - 1, (left + right) / 2 + 1
            margin = 0 if status[frame] in PARTS else 10
            draw.rectangle((left, bar.top + margin, right, bar.bottom), COLOURS[status[frame]])
        bar.clock(draw)
        free = 0.0
        for number, segment in enumerate(self.segments, 1):
            x = x_of(segment.first_frame)
            end = x_of(self.segments[number].first_frame) if number < len(self.segments) else RIGHT
            self._boundary(segment, x, bar.top - 4, bar.bottom)
            names = [str(number)]
            if segment.change != "keep":
                names.append(f"{number} {segment.change.replace('_', ' ')}")
            fitting = [name for name in names if free <= x <= end - font(13).getlength(name) - 4]
            if fitting:
                draw.text((x + 2, bar.top - 20), fitting[-1], INK, font(13))
                free = x + font(13).getlength(fitting[-1]) + 4
        if reach := reach_frames(self.memory):
            last = self.memory.num_frames - 1
            self._reach(x_of(last - reach), x_of(last), bar.bottom + 34)

    def _boundary(self, segment: Segment, x: float, top: float, bottom: float) -> None:
        self.sheet.draw.line((x, top, x, bottom), FORGETS if segment.change in FORGETTING else FAINT, 1)

    def _reach(self, left: float, right: float, y: float) -> None:
        """A bracket from the oldest remembered frame to the last one, the words inside it or before it."""
        draw, words = (
            self.sheet.draw,
            f"the memory reaches back {latent_seconds(reach_frames(self.memory), self.fps):.4g} s",
        )
        width = font(13).getlength(words) + 16
        draw.line((left, y - 5, left, y + 5), INK, 2)
        draw.line((left, y, right, y), INK, 2)
        draw.line((right, y - 5, right, y + 5), INK, 2)
        inside = right - left > width + 40
        middle = (left + right) / 2 if inside else left - width / 2
        draw.rectangle((middle - width / 2, y - 9, middle + width / 2 - (0 if inside else 4), y + 9), PAPER)
        draw.text((middle, y), words, INK, font(13), "mm")

    def draw_similarity(self) -> None:
        """The similarity by which the policy kept frames or not, with the threshold."""
        config, sheet = self.memory.config, self.sheet
        scores = [(d.frame, d.similarity, d.promoted) for d in self.memory.decisions if d.similarity is not None]
        if not scores:
            text = f"Policy {config.policy} compares no frames, or no frame has left fast yet."
            if config.recalls:
                text = f"Policy {config.policy} chooses the slow frames of every chunk by the path of the camera."
            if config.per_layer:
                text = (
                    f"Policy {config.policy}: every layer compares frames in every pass; the similarities are not kept."
                )
            sheet.text(text, 13, FAINT)
            return
        tau = config.slow_similarity_threshold
        sheet.text(
            f"Similarity of each frame with {config.compares_with} when it left fast. A frame below the threshold"
            f" {tau:g} (red line) is kept (green), other frames are not (grey).",
            13,
        )
        top = sheet.room(196) + 6
        low = min(tau, *(score for _, score, _ in scores))
        low -= 0.06 * (1 - low) + 1e-3
        axes = Axes(top=top, bottom=top + 168, seconds=self.seconds, low=low)
        axes.levels(sheet.draw)
        for segment in self.segments:
            self._boundary(segment, axes.x(latent_seconds(segment.first_frame, self.fps)), axes.top, axes.bottom)
        sheet.draw.line((LEFT, axes.y(tau), RIGHT, axes.y(tau)), THRESHOLD, 1)
        for frame, score, promoted in scores:
            x, y = axes.x(latent_seconds(frame + 0.5, self.fps)), axes.y(score)
            sheet.draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), COLOURS["slow"] if promoted else NOT_KEPT)

    def draw_segments(self) -> None:
        """A line per segment: its start, its change, the frames that the change forgot, its seed and prompt."""
        counts = Counter(forgotten_frames(self.memory).values())
        for number, segment in enumerate(self.segments, 1):
            top = self.sheet.room(20)
            lost = f", {counts[segment]} forgotten" if segment in counts else ""
            change = "begins" if number == 1 else segment.change.replace("_", " ") + lost
            columns = (
                (0, 32, f"{number}", INK),
                (32, 108, self._at(segment.first_frame), INK),
                (108, 320, change, FORGETS if segment.change in FORGETTING else INK),
                (320, 440, f"seed {segment.seed}", INK),
                (440, WIDTH - 2 * MARGIN + 8, segment.prompt or "(prompt unknown)", INK if segment.prompt else FAINT),
            )
            for left, right, words, colour in columns:
                words = shortened(words, right - left - 8, 13)
                self.sheet.draw.text((MARGIN + left, top), words, colour, font(13))
        self.sheet.room(12)

    def draw_mass(self, mass: Mass) -> None:
        """A bar per noise level, and one for equal attention on all frames."""
        text = "What the next chunk attends to under the last prompt: softmax mass of its self-attention per part,"
        self.sheet.text(f"{text} mean over layers, heads and tokens.", 13)
        num_frames = len(next(iter(mass.values())))
        rows = {f"noise {sigma:.2f}": frames for sigma, frames in mass.items()}
        rows["all equal"] = [1 / num_frames] * num_frames
        left, right, draw = LEFT + 36, 1196 - 124 * len(per_part(self.memory, rows["all equal"])), self.sheet.draw
        for name, frames in rows.items():
            top, x = self.sheet.room(22), float(left)
            draw.text((MARGIN, top + 1), name, FAINT if name == "all equal" else INK, font(13))
            for number, (part, share) in enumerate(per_part(self.memory, frames).items()):
                end = x + share * (right - left)
                draw.rectangle((x, top, end, top + 15), COLOURS[part])
                swatch = right + 20 + 124 * number
                draw.rectangle((swatch, top + 2, swatch + 11, top + 13), COLOURS[part])
                draw.text((swatch + 17, top), f"{part.removesuffix(' itself')} {share:.1%}", INK, font(13))
                x = end
        self.sheet.room(12)

    def draw_thumbnails(self, thumbnails: np.ndarray | None, mass: Mass | None) -> None:
        """The remembered frames with their status, their time and, with `mass`, their share of the attention."""
        frames, sheet = self.memory.slots.all, self.sheet
        if not frames or thumbnails is None:
            sheet.text("The remembered frames are not drawn." if frames else "Nothing is remembered yet.", 13, FAINT)
            return
        shares = [f"  {share:.1%}" for share in np.mean(list(mass.values()), axis=0)] if mass else [""] * len(frames)
        text = " and their share of the next chunk's attention, mean over noise levels" if mass else ""
        sheet.text(f"The remembered frames, with their time in the video{text}.", 13)
        num_references = len(self.memory.references)
        column = (WIDTH - 2 * MARGIN) // COLUMNS
        width, height = column - 12, int((column - 12) * thumbnails.shape[1] / thumbnails.shape[2])
        resampling = Image.Resampling.NEAREST if thumbnails.shape[2] < column else Image.Resampling.LANCZOS
        for i, (frame, pixels, share) in enumerate(zip(frames, thumbnails, shares)):
            if i % COLUMNS == 0:
                top = sheet.room(height + 6 + CAPTION) + 3
            left = MARGIN + i % COLUMNS * column + 3
            status = REFERENCE if frame < 0 else self.status[frame]
            sheet.draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), COLOURS[status])
            sheet.image.paste(Image.fromarray(np.asarray(pixels)).resize((width, height), resampling), (left, top))
            words = f"{status}  {self._at(frame)}{share}"
            if frame < 0:
                prompt = self.memory.references[frame].prompt
                words = shortened(f"{frame_name(frame, num_references)}{share}  {prompt}", width, 13)
            sheet.draw.text((left, top + height + 5), words, INK, font(13))

    def _at(self, frame: int) -> str:
        """The time of a latent frame."""
        return at_time(latent_seconds(frame, self.fps), self.seconds)
