"""Draws the icon and the banner that the ComfyUI registry shows, from the demo world: docs/icon.png, docs/banner.png.

python scripts/registry_pictures.py
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from context_forcing.train.world.prompts import Style
from context_forcing.train.world.scene import Scene, panorama

DOCS = Path(__file__).parents[1] / "docs"
SEED, ICON_SCALE, BANNER_SCALE = 4, 12, 5
BANNER = (168, 72)
"""Art pixels, 21:9: the same place at day and at night, with a band between."""
INK, PAPER = (236, 236, 232), (24, 26, 32)


def enlarged(art: np.ndarray, scale: int) -> Image.Image:
    picture = Image.fromarray(art)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    scene = Scene.sample(np.random.default_rng(SEED))
    day, night = panorama(scene, Style()), panorama(scene, Style(time="night"))
    side = day.shape[0]
    icon = np.concatenate([day[:, : side // 2], night[:, side // 2 : side]], axis=1)
    enlarged(icon, ICON_SCALE).quantize(64).save(DOCS / "icon.png", optimize=True)

    width, height = BANNER
    banner = Image.new("RGB", (width * BANNER_SCALE, height * BANNER_SCALE), PAPER)
    banner.paste(enlarged(day[:, :width], BANNER_SCALE), (0, 0))
    banner.paste(enlarged(night[:, :width], BANNER_SCALE), (0, (height - side) * BANNER_SCALE))
    place, font = (banner.width // 2, banner.height // 2), ImageFont.load_default(26)
    ImageDraw.Draw(banner).text(place, "Context Forcing: long videos that remember", INK, font, anchor="mm")
    banner.quantize(96).save(DOCS / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
