"""What is remembered, as a picture and as a table."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .memory import Memory

WIDTH = 1280
MARGIN = 28
INK, PAPER, GRID = (28, 32, 40), (250, 250, 247), (214, 214, 208)
COLOURS = {
    "sink": (196, 120, 20),
    "slow": (24, 132, 108),
    "fast": (36, 98, 196),
    "was slow": (160, 208, 196),
    "not kept": (226, 226, 222),
}
THRESHOLD = (200, 40, 40)


def fates(memory: Memory) -> list[str]:
    """What became of every latent frame of the film so far."""
    fate = ["not kept"] * memory.num_frames
    for decision in memory.decisions:
        if decision.promoted:
            fate[decision.frame] = "was slow"
    for part in ("sink", "slow", "fast"):
        for frame in getattr(memory.slots, part):
            fate[frame] = part
    return fate


def reach_seconds(memory: Memory, fps: float, frames_per_latent: int = 4) -> float:
    """Age of the oldest remembered frame that is not in the sink."""
    frames = memory.slots.slow + memory.slots.fast
    return (memory.num_frames - 1 - min(frames)) * frames_per_latent / fps if frames else 0.0


def summary(memory: Memory, fps: float) -> str:
    """The memory as a few lines of text."""
    slots, config = memory.slots, memory.config
    seconds = memory.num_frames * 4 / fps
    promoted = sum(decision.promoted for decision in memory.decisions)
    share = (
        f", {promoted / len(memory.decisions):.0%} of the frames that left fast were kept" if memory.decisions else ""
    )
    tau = f", threshold {config.slow_similarity_threshold:g}" if config.policy in ("clean", "novel") else ""
    return "\n".join(
        [
            f"{memory.num_frames} latent frames ({seconds:.1f} s),"
            f" memory reaches back {reach_seconds(memory, fps):.1f} s",
            f"sink {len(slots.sink)} of {config.sink}, slow {len(slots.slow)} of {config.slow},"
            f" fast {len(slots.fast)} (+ {config.chunk} being made) of {config.fast}; {memory.num_bytes / 1e6:.1f} MB",
            f"policy {config.policy}{tau}{share}",
        ]
    )


def draw_report(memory: Memory, thumbnails: np.ndarray, fps: float) -> Image.Image:
    """Fates over time with segment boundaries, similarity with its threshold, and the remembered frames.

    `thumbnails` are uint8 [M, H, W, 3], one per remembered frame in the order of `memory.slots.all`.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    rows, thumb_height = _layout_thumbnails(memory, thumbnails)
    height = 400 + rows * (thumb_height + 26) + MARGIN
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.multiline_text((MARGIN, 14), summary(memory, fps), INK, font, spacing=5)

    top = 92
    for i, (name, colour) in enumerate(COLOURS.items()):
        draw.rectangle((MARGIN + i * 120, top, MARGIN + 14 + i * 120, top + 14), colour)
        draw.text((MARGIN + 20 + i * 120, top - 1), name, INK, small)

    _draw_time(draw, memory, fps, 130, small)
    _draw_similarity(draw, memory, 212, 372, small)
    _draw_thumbnails(image, draw, memory, thumbnails, 400, thumb_height, fps, small)
    return image


def _x(memory: Memory, frame: float) -> float:
    return MARGIN + frame / max(1, memory.num_frames) * (WIDTH - 2 * MARGIN)


def _draw_time(draw: ImageDraw.ImageDraw, memory: Memory, fps: float, top: int, font) -> None:
    for frame, fate in enumerate(fates(memory)):
        left, right = _x(memory, frame), _x(memory, frame + 1)
        tall = 0 if fate in ("sink", "slow", "fast") else 10
        draw.rectangle((left, top + tall, max(left, right - 1), top + 40), COLOURS[fate])
    for segment in memory.segments:
        left = _x(memory, segment.first_frame)
        draw.line((left, top - 6, left, top + 46), INK)
    seconds = memory.num_frames * 4 / fps
    step = next(s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1e9) if seconds / s <= 16)
    for k in range(int(seconds / step) + 1):
        left = _x(memory, k * step * fps / 4)
        draw.text((left, top + 44), f"{k * step:.0f} s", INK, font)


def _draw_similarity(draw: ImageDraw.ImageDraw, memory: Memory, top: int, bottom: int, font) -> None:
    scores = [(d.frame, d.similarity, d.promoted) for d in memory.decisions if d.similarity is not None]
    if not scores:
        draw.text((MARGIN, top), f"policy {memory.config.policy} compares nothing, or nothing left fast yet", INK, font)
        return
    tau = memory.config.slow_similarity_threshold
    low = min(tau, *(score for _, score, _ in scores)) - 0.02
    y = lambda score: bottom - (score - low) / (1.001 - low) * (bottom - top - 18)
    what = "the frame before it" if memory.config.policy == "clean" else "everything remembered"
    draw.text((MARGIN, top), f"similarity of each frame with {what}, when it left fast", INK, font)
    for level in np.arange(np.ceil(low * 20) / 20, 1.0001, 0.05):
        draw.line((MARGIN, y(level), WIDTH - MARGIN, y(level)), GRID)
        draw.text((2, y(level) - 7), f"{level:.2f}", INK, ImageFont.load_default(10))
    draw.line((MARGIN, y(tau), WIDTH - MARGIN, y(tau)), THRESHOLD)
    draw.text((WIDTH - MARGIN - 130, y(tau) - 16), f"threshold {tau:g}", THRESHOLD, font)
    for frame, score, promoted in scores:
        x = (_x(memory, frame) + _x(memory, frame + 1)) / 2
        draw.ellipse((x - 2.5, y(score) - 2.5, x + 2.5, y(score) + 2.5), COLOURS["slow" if promoted else "fast"])


def _layout_thumbnails(memory: Memory, thumbnails: np.ndarray) -> tuple[int, int]:
    if not len(thumbnails):
        return 1, 20
    _, height, width, _ = thumbnails.shape
    per_row = 6
    return -(-len(thumbnails) // per_row), int((WIDTH - 2 * MARGIN) / per_row * height / width)


def _draw_thumbnails(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    memory: Memory,
    thumbnails: np.ndarray,
    top: int,
    height: int,
    fps: float,
    font,
) -> None:
    fate, column = fates(memory), (WIDTH - 2 * MARGIN) // 6
    frames: Sequence[int] = memory.slots.all
    if not frames:
        draw.text((MARGIN, top), "nothing is remembered yet", INK, font)
    for i, (frame, pixels) in enumerate(zip(frames, thumbnails)):
        left, upper = MARGIN + i % 6 * column, top + i // 6 * (height + 26)
        picture = Image.fromarray(np.asarray(pixels)).resize((column - 8, height - 4), Image.NEAREST)
        draw.rectangle((left - 3, upper - 3, left + column - 6, upper + height - 2), COLOURS[fate[frame]])
        image.paste(picture, (left, upper))
        draw.text((left, upper + height + 1), f"{fate[frame]}  {frame * 4 / fps:.1f} s", INK, font)
