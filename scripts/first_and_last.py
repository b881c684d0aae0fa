"""Tell whether the last view of a story shows the landmarks of the first: their classes for every seed, and a picture.

python scripts/first_and_last.py [--story FILE] [--policy recall] [--seeds 10] [--out first_and_last.png]

The story must end at the heading and in the style of its first segment, a meadow under a clear sky by day.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.device import pick_device
from context_forcing.train.evaluation.judge import World
from context_forcing.train.world.geometry import stations_in_view
from context_forcing.train.world.prompts import Style
from context_forcing.video.frames import to_uint8
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import Story, load_story


def first_and_last(pipeline: Pipeline, world: World, story: Story, policy: str) -> tuple[list[list[int]], np.ndarray]:
    """Classes of the landmarks in full view at the end of the first segment and of the film, and both views."""
    memory = pipeline.empty_memory(policy=policy)
    for memory in pipeline.generate(story.resolve(pipeline.card, memory), memory):
        pass
    film, end = torch.cat(memory.latent_chunks, dim=2)[0], memory.segments[1].first_frame
    heading = world.start(film[:, :end], np.zeros(end, dtype=np.int64), Style())
    classes = [
        [world.classify(film[:, frame], column, Style(), station)[0] for station, column in stations_in_view(heading)]
        for frame in (end - 1, film.shape[1] - 1)
    ]
    frames = to_uint8(torch.cat(list(pipeline.decode(memory.latent_chunks)), dim=2))
    return classes, np.concatenate([frames[4 * (end - 1)], frames[-1]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default=None)
    parser.add_argument("--story", default="workflows/stories/minute.yaml")
    parser.add_argument("--policy", default="recall")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", default="first_and_last.png")
    options = parser.parse_args()
    pipeline = Pipeline.load(StudentSource(options.student).open(), *pick_device("auto", "auto"))
    world, story, rows, same = World(pipeline), load_story(options.story), [], 0
    for seed in range(1, options.seeds + 1):
        with torch.inference_mode():
            (first, last), views = first_and_last(pipeline, world, story.with_seed(seed), options.policy)
        rows.append(views)
        same += first == last
        print(f"seed {seed}: first {first}, last {last}, {'the same' if first == last else 'not the same'}", flush=True)
    print(f"the same for {same} of {options.seeds} seeds")
    Image.fromarray(np.concatenate(rows)).save(options.out)


if __name__ == "__main__":
    main()
