"""Measure on the demo world what a reference does: docs/memory.md, References.

    python scripts/references.py [--student FILE] [--scenes 16]

A film begins with three true frames of a scene and pans away. References are true views: of the place where the camera
stops, or also of the two places three and six columns before it. Do their landmarks turn up there? Landmarks that the
beginning shows do not count.
"""

import argparse

import numpy as np
import torch

from context_forcing.memory.references import Reference
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.device import pick_device
from context_forcing.model.segment import used_rows
from context_forcing.train.evaluation.judge import World, path_of
from context_forcing.train.evaluation.rollout import Camera
from context_forcing.train.world.camera import headings, view
from context_forcing.train.world.geometry import CHUNK, RING_COLUMNS, TOKEN, VIEW_COLUMNS, stations_in_view
from context_forcing.train.world.prompts import ALL_STYLES, Style, caption
from context_forcing.train.world.scene import Scene, panorama
from context_forcing.video.pipeline import Pipeline

COLUMNS = (3, 6, 9, 18)
"""From the beginning to the place."""
BEFORE = {"no reference": (), "the place": (0,), "and two on the way": (6, 3, 0)}
"""Columns before the place of every reference."""


def targets(heading: int) -> list[tuple[int, int]]:
    """(station, view column) of the landmarks in full view at a heading of which heading 0 shows nothing."""
    hidden = lambda station: VIEW_COLUMNS <= station * 3 % RING_COLUMNS <= RING_COLUMNS - 2
    return [(station, column) for station, column in stations_in_view(heading) if hidden(station)]


@torch.inference_mode()
def film_of(
    pipeline: Pipeline, world: World, scene: Scene, style: Style, seed: int, moves: list[int], places: list[int]
) -> torch.Tensor:
    """Latents [C, T, H, W] of a film that begins in a scene; `places` are the headings of the references' views."""
    ring = panorama(scene, style)
    picture = lambda heading: world.encode(view(ring, heading * TOKEN)[None])[:, :, None].cpu()
    memory = pipeline.empty_memory().with_start_latents(torch.cat([picture(0)] * CHUNK, dim=2))
    text = used_rows(encode_demo_text(caption(style, 0)))
    memory = memory.with_references([Reference(latents=picture(place), text=text) for place in places])
    camera = Camera(pipeline, style, seed)
    for move in moves[1:]:  # the first chunk is given
        memory = camera.move(memory, move)
    return torch.cat(memory.latent_chunks, dim=2)[0]


def measure(pipeline: Pipeline, world: World, number: int, columns: int, out: int, before: tuple[int, ...]):
    """(share of the targets that are those of the scene, share of frames at the heading of the script) of a film."""
    rng = np.random.default_rng([number, 13])
    scene, style = Scene.sample(rng), ALL_STYLES[int(rng.integers(len(ALL_STYLES)))]
    moves = [0, *[out] * (columns // CHUNK), 0]
    path = headings(moves)
    end = int(path[-1])
    places = [end - out * distance for distance in before]
    film = film_of(pipeline, world, scene, style, number, moves, places).to(world.device)
    wanted = targets(end)
    drawn = [world.classify(film[:, -1], column, style, station)[0] for station, column in wanted]
    hits = [class_id == scene.class_ids[station] for class_id, (station, _) in zip(drawn, wanted)]
    return float(np.mean(hits)), float((path_of(film) == path).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=None)
    parser.add_argument("--scenes", type=int, default=16)
    options = parser.parse_args()
    pipeline = Pipeline.load(StudentSource(options.student).open(), *pick_device("auto", "auto"))
    world = World(pipeline)
    print(" | ".join(["columns", *(f"{title}: landmarks (error), camera" for title in BEFORE)]))
    for columns in COLUMNS:
        cells = []
        for before in BEFORE.values():
            films = [(number, out) for number in range(options.scenes) for out in (-1, 1)]
            figures = np.array([measure(pipeline, world, number, columns, out, before) for number, out in films])
            landmarks, camera = figures.T
            # Both directions of a scene are one sample.
            error = landmarks.reshape(-1, 2).mean(1).std(ddof=1) / options.scenes**0.5
            cells.append(f"{landmarks.mean():.2f} ({error:.2f}), {camera.mean():.2f}")
        print(" | ".join([f"{columns}", *cells]), flush=True)


if __name__ == "__main__":
    main()
