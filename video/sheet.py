"""Sheets and axes for pictures that explain, drawn with pillow alone."""

import bisect
import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, RIGHT, MARGIN = 1280, 64, 1236, 20
"""Pixels: of the sheet, of the first and last column that axes fill, and around."""
INK, FAINT, GRID, PAPER = (28, 32, 40), (104, 108, 116), (222, 222, 217), (250, 250, 247)

_STEPS = tuple(digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5))
_CLOCK = (0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 86400)

Colour = tuple[int, int, int]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


def shortened(text: str, width: float, size: int) -> str:
    """As much of a text, on one line, as fits in so many pixels."""
    text = " ".join(text.split())
    if font(size).getlength(text) <= width:
        return text
    length = bisect.bisect_right(range(len(text)), width, key=lambda end: font(size).getlength(text[:end] + "..."))
    return text[: max(0, length - 1)].rstrip() + "..."


class Sheet:
    """A picture that grows downwards as it is drawn."""

    def __init__(self):
        self.bottom = MARGIN
        self._canvas(Image.new("RGB", (WIDTH, 1024), PAPER))

    def _canvas(self, image: Image.Image) -> None:
        self.image, self.draw = image, ImageDraw.Draw(image)

    def room(self, height: int) -> int:
        """Take so many pixels of height; returns where they begin."""
        top = self.bottom
        self.bottom += height
        if self.bottom + MARGIN > self.image.height:
            taller = Image.new("RGB", (WIDTH, 2 * (self.bottom + MARGIN)), PAPER)
            taller.paste(self.image, (0, 0))
            self._canvas(taller)
        return top

    def text(self, text: str, size: int = 14, colour: Colour = INK) -> None:
        """Lines of text over the whole width."""
        for line in text.splitlines():
            top = self.room(size + 7)
            self.draw.text((MARGIN, top), shortened(line, WIDTH - 2 * MARGIN, size), colour, font(size))

    def legend(self, entries: dict[str, Colour]) -> None:
        """Swatches with their names, on one line."""
        top, left = self.room(30) + 6, MARGIN
        for name, colour in entries.items():
            self.draw.rectangle((left, top, left + 13, top + 13), colour)
            self.draw.text((left + 20, top - 1), name, INK, font(13))
            left += 42 + font(13).getlength(name)

    def finished(self) -> Image.Image:
        """What was drawn, with a margin below."""
        return self.image.crop((0, 0, WIDTH, self.bottom + MARGIN))


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Seconds from left to right, values upwards, between two rows of pixels."""

    top: int
    bottom: int
    seconds: float
    """At the right end."""
    low: float = 0.0
    high: float = 1.0

    def x(self, seconds: float) -> float:
        return LEFT + seconds / max(self.seconds, 1e-9) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def levels(self, draw: ImageDraw.ImageDraw) -> None:
        """Lines at round values, six at most, named at the left."""
        step = next(step for step in _STEPS if (self.high - self.low) / step <= 6)
        for k in range(math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6) + 1):
            y = self.y(k * step)
            draw.line((LEFT, y, RIGHT, y), GRID)
            draw.text((LEFT - 8, y), f"{k * step:.{max(0, -math.floor(math.log10(step)))}f}", FAINT, font(12), "rm")

    def clock(self, draw: ImageDraw.ImageDraw) -> None:
        """Times under the bottom, 18 pixels high: seconds, or minutes where there are several."""
        step = next((step for step in _CLOCK if self.seconds / step <= 16), self.seconds)
        for k in range(math.floor(self.seconds / step + 1e-6) + 1):
            x = self.x(k * step)
            draw.line((x, self.bottom, x, self.bottom + 4), FAINT)
            draw.text((x, self.bottom + 6), at_time(k * step, self.seconds), FAINT, font(12), "mt")


def at_time(seconds: float, whole: float) -> str:
    """A time in a video of `whole` seconds: `7.5 s`, or `1:07.5` where it has minutes."""
    if whole < 100:
        return f"{seconds:.4g} s"
    minutes, rest = divmod(round(seconds, 2), 60)
    return f"{minutes:.0f}:{rest:04.1f}".removesuffix(".0")
