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
from context_forcing.video.frames import to_uint8
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import Story, load_story

SCALE, GAP = 3, 6
INK, PAPER = (28, 32, 40), (250, 250, 247)


def filmstrip(pipeline: Pipeline, story: Story, title: str, **settings) -> Image.Image:
    """The same moments of a video in one row, with a title; `settings` are those of the memory."""
    memory = pipeline.empty_memory(**settings)
    for memory in pipeline.generate(story.resolve(pipeline.card, memory), memory):
        pass
    frames = to_uint8(torch.cat(list(pipeline.decode(memory.latent_chunks)), dim=2))
    ends = np.cumsum([segment.seconds for segment in story.segments])
    moments = [ends[0], ends[1], (ends[1] + ends[2]) / 2, ends[2], ends[3], ends[4]]
    height, width = frames.shape[1] * SCALE, frames.shape[2] * SCALE
    picture = Image.new("RGB", (len(moments) * (width + GAP), height + 54), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    draw.text((4, 4), title, INK, font)
    for i, second in enumerate(moments):
        left = i * (width + GAP)
        frame = Image.fromarray(frames[min(int(second * pipeline.card.fps) - 4, len(frames) - 1)])
        picture.paste(frame.resize((width, height), Image.Resampling.NEAREST), (left, 28))
        draw.text((left, height + 32), f"{second:.0f} s", INK, font)
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
    Path(options.out).mkdir(exist_ok=True)
    Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips])).save(Path(options.out) / "memory.png")


if __name__ == "__main__":
    main()
