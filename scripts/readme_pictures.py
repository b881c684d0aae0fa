"""Draw the README's filmstrips: one story, one seed, with and without slow memory.

python scripts/readme_pictures.py [--student FILE] [--story FILE] [--out docs]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.device import pick_device
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import load_story

SCALE = 3
COLUMNS = 6


def filmstrip(pipeline: Pipeline, story, title: str, **settings) -> Image.Image:
    """The same moments of a film in one row, with a title."""
    memory = pipeline.empty_memory(**settings)
    for memory in pipeline.generate(story, memory):
        pass
    pixels = torch.cat(list(pipeline.decode(memory.latent_chunks)), dim=2)[0]
    fps = pipeline.card.fps
    ends = np.cumsum([scene.seconds for scene in story.segments])
    moments = [ends[0], ends[1], (ends[1] + ends[2]) / 2, ends[2], ends[3], ends[4]]
    frames = pixels[:, [min(int(s * fps) - 4, pixels.shape[1] - 1) for s in moments]]
    frames = frames.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()
    height, width = frames.shape[1] * SCALE, frames.shape[2] * SCALE
    picture = Image.new("RGB", (COLUMNS * (width + 6), height + 54), (250, 250, 247))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    draw.text((4, 4), title, (28, 32, 40), font)
    for i, (frame, second) in enumerate(zip(frames, moments)):
        left = i * (width + 6)
        picture.paste(Image.fromarray(frame).resize((width, height), Image.NEAREST), (left, 28))
        draw.text((left, height + 32), f"{second:.0f} s", (28, 32, 40), font)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default=None)
    parser.add_argument("--story", default="workflows/stories/there_and_back.yaml")
    parser.add_argument("--out", default="docs")
    options = parser.parse_args()
    pipeline = Pipeline.load(StudentSource(options.student).open(), *pick_device("auto", "auto"))
    story = load_story(options.story)
    strips = [
        filmstrip(pipeline, story, "with slow memory"),
        filmstrip(pipeline, story, "without slow memory (sink and fast frames only), same seed", slow=0),
    ]
    both = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), (250, 250, 247))
    for i, strip in enumerate(strips):
        both.paste(strip, (0, i * strip.height))
    Path(options.out).mkdir(exist_ok=True)
    both.save(Path(options.out) / "memory.png")


if __name__ == "__main__":
    main()
