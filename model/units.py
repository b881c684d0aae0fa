"""Units of Wan 2.1's latent space: pixels, latents, frames, seconds (docs/method.md, Units)."""

LATENT_CHANNELS = 16
FRAMES_PER_LATENT = 4
"""Pixel frames in one latent frame. The first latent frame of a video holds one."""
PIXELS_PER_LATENT = 8
"""Pixel rows and columns in one latent row and column."""
PIXEL_MULTIPLE = 16
"""Width and height are multiples of this: 8 pixels in a latent, 2 latents in a token."""
MAX_PIXELS = 2**24
"""Pixels of a frame, 4096 x 4096; far above what students are trained with."""


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a video of so many latent frames: 1 + 4 * (latent_frames - 1)."""
    return max(0, 1 + FRAMES_PER_LATENT * (latent_frames - 1))


def whole_pixel_frames(num_frames: int) -> int:
    """The largest 1 + 4k that is at most `num_frames` (1 or more)."""
    return num_frames - (num_frames - 1) % FRAMES_PER_LATENT


def latent_seconds(latent_frames: float, fps: float) -> float:
    """Duration of so many latent frames at `fps` pixel frames per second."""
    return latent_frames * FRAMES_PER_LATENT / fps


def latent_size(width: int, height: int) -> tuple[int, int, int]:
    """C, H, W of a latent frame for videos of `width` x `height` pixels.

    Raises ValueError unless both are positive multiples of 16.
    """
    check_size(width, height)
    return LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def pixel_size(latent_size: tuple[int, int, int]) -> tuple[int, int]:
    """Width and height in pixels of latent frames of C, H, W."""
    _, height, width = latent_size
    return width * PIXELS_PER_LATENT, height * PIXELS_PER_LATENT


def check_size(width: int, height: int) -> None:
    """Raises ValueError unless both sides are positive multiples of 16 and a frame has at most MAX_PIXELS."""
    for name, side in (("width", width), ("height", height)):
        if side <= 0 or side % PIXEL_MULTIPLE:
            nearest = max(PIXEL_MULTIPLE, round(side / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
            raise ValueError(f"size: {name} {side} is not a multiple of {PIXEL_MULTIPLE}; {nearest} is the nearest")
    if width * height > MAX_PIXELS:
        raise ValueError(f"size: {width}x{height} is more than {MAX_PIXELS} pixels; make it smaller")
