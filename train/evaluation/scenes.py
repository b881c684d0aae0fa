"""Scenes as jobs: the rollouts of one student under one policy from one empty memory.

Shapes: C latent channels, T latent frames, H W latent rows and columns.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...memory.history import reach_frames
from ...memory.memory import Memory
from ...model.checkpoints.student import StudentSource
from ...model.device import pick_device, use_cpu_threads
from ...video.pipeline import Pipeline
from ...workers.job import Loaded
from ..world.prompts import ALL_STYLES, Style
from .rollout import branches
from .summary import LONG
from .variants import Variant

Path = tuple[str, int, int]
"""Kind, columns and chunks of the gap of a script; LONG, 0, 0 for a long rollout."""


@dataclass(frozen=True, kw_only=True)
class End:
    """A finished rollout."""

    path: Path
    latents_CTHW: np.ndarray
    """The whole video, float32, normalised."""
    reach: tuple[int, ...] = ()
    """Of a long rollout: reach_frames after each chunk."""


@dataclass(frozen=True, kw_only=True)
class SceneJob:
    """All scripts of gaps in a scene, or its long rollout. It is written to the results as one."""

    student: str
    file: str | None
    """A student file; None for the built-in student."""
    policy: str
    seed: int
    scene: int
    is_long: bool
    moves: Mapping[Path, tuple[int, ...]]
    """Camera moves of each rollout, one per chunk."""
    device: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.student}, {self.policy}, seed {self.seed}, {'long ' * self.is_long}scene {self.scene}"

    @property
    def style(self) -> Style:
        return ALL_STYLES[np.random.default_rng((self.seed, self.scene)).integers(len(ALL_STYLES))]

    def num_kept(self) -> int:
        """A scene is kept as a whole, in the results."""
        return 0

    def run(self, loaded: Loaded) -> list[End]:
        """Generate the rollouts, in the order of `moves`."""
        pipeline, variant = student_loader(loaded, self.device, self.dtype)(self.file), Variant.parse(self.policy)
        use_cpu_threads(pipeline.network.net)
        camera = variant.camera(pipeline, self.style, self.seed * 10_000 + self.scene)
        memory = variant.empty_memory(pipeline)
        if not self.is_long:
            ends = dict(branches(camera, memory, self.moves))
            return [End(path=path, latents_CTHW=_latents(ends[path])) for path in self.moves]
        reach = []
        for move in self.moves[LONG, 0, 0]:
            memory = camera.move(memory, move)
            reach.append(reach_frames(memory))
        return [End(path=(LONG, 0, 0), latents_CTHW=_latents(memory), reach=tuple(reach))]


def student_loader(loaded: Loaded, device: str, dtype: str) -> Callable[[str | None], Pipeline]:
    """(file) -> the student on a device, loaded once; scenes of several students follow each other."""

    def load(file: str | None) -> Pipeline:
        return Pipeline.load(StudentSource(file).open(), *pick_device(device, dtype))

    return loaded.get((device, dtype), lambda: functools.cache(load))


def _latents(memory: Memory) -> np.ndarray:
    """Latents of the whole video, [C, T, H, W]."""
    return torch.cat(memory.latent_chunks, dim=2)[0].numpy()
