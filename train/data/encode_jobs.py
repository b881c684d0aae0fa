"""Sources as jobs: each is encoded into a set of its own, whose clips one process takes over in the order of sources.

So the whole set is that of one process, whatever the number of workers. After an interrupt or an error, the sets of
single sources (parts.py) stay, and the next command continues them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...memory.files import hold_folder
from ...model.codecs.backbone import DEMO, backbone_of
from ...video.reading import VideoError
from ...workers.engine import Engine, Progress
from ...workers.job import Death, Loaded
from .encode import Encoder, EncodeSettings, SetEncoder, load_encoder
from .manifest import Manifest, read_manifest
from .sources import Source


@dataclass(frozen=True, kw_only=True)
class EncoderJob:
    """What a set says of its encoder, and the texts that are stored beside the clips."""

    settings: EncodeSettings
    with_vae: bool
    name: str = "encoder"

    def num_kept(self) -> int:
        """Nothing is on the disk."""
        return 0

    @torch.inference_mode()
    def run(self, loaded: Loaded) -> tuple[tuple[int, int], str, str | None, dict[str, np.ndarray]]:
        """Size, names of the text encoder and the VAE, and texts [L, D] by prompt."""
        encoder = _load(loaded, self.settings, self.with_vae)
        texts = {prompt: encoder.text(prompt).cpu().numpy() for prompt in {"", self.settings.own_negative_prompt}}
        return encoder.size, encoder.text_name, encoder.vae_name, texts


@dataclass(frozen=True, kw_only=True)
class SourceJob:
    """A video, or some prompts, to be encoded into a set of their own; its steps are clips."""

    path: Path
    """The source that they are of."""
    folder: Path
    settings: EncodeSettings
    sources: tuple[Source, ...]
    clips_before: Mapping[str, int]
    """First clips of a video that the whole set has."""

    @property
    def name(self) -> str:
        first, *others = self.sources
        return f"{first.name} and {len(others)} more" if others else first.name

    def num_kept(self) -> int:
        """Clips on the disk."""
        return len(list(self.folder.glob("shard-*.safetensors")))

    def run(self, loaded: Loaded) -> Manifest:
        """Encode; returns the manifest of the set. Each clip of a video has a shard, so that none is made twice."""
        shard_bytes = None if self.sources[0].video is None else 1
        load = partial(_load, loaded)
        with hold_folder("output", self.folder):
            SetEncoder(
                self.path, self.folder, self.settings, load, self.sources, self.clips_before, shard_bytes
            ).add_clips()
        return read_manifest(self.folder)


class SetEncoderOnWorkers(SetEncoder):
    """A SetEncoder whose workers encode. This process loads no model; it writes the set."""

    def __init__(self, path: str | Path, output: str | Path, settings: EncodeSettings, engine: Engine):
        # Workers may have another working directory.
        model = settings.model if backbone_of(settings.model) is DEMO else str(Path(settings.model).absolute())
        settings = dataclasses.replace(settings, model=model, device=engine.workers.device)
        self._path, self._engine = Path(path).absolute(), engine
        super().__init__(self._path, Path(output).absolute(), settings, partial(_load_by, engine))

    def add_sources(self, on_clip: Callable[[int], None]) -> None:
        with self._engine:
            self._made = self._engine.in_order(self._jobs(), len(self.parts.all))
            self._taken: dict[str, Progress[SourceJob]] = {}
            super().add_sources(on_clip)

    def _jobs(self) -> Iterator[SourceJob]:
        """A job for each part, made when there is room for it."""
        for part in self.parts.all:
            if self.num_left == 0:
                return
            # With one clip more than the set can take, a job knows whether its video has ended with the last one, also
            # if it is continued. A source that an earlier attempt skipped is tried again.
            most = None if self.num_left is None else self.num_left + self.parts.num_taken(part) + 1
            yield SourceJob(
                path=self._path,
                folder=part.folder,
                settings=dataclasses.replace(self.settings, max_clips=most, retry=True),
                sources=part.sources,
                clips_before={source.name: self.parts.first(source) for source in part.sources},
            )

    def encode(self, source: Source) -> Iterator[None]:
        """Add the missing clips of a source, when a worker has made them."""
        while source.name not in self._taken:
            progress = next(self._made)
            self._taken = {each.name: progress for each in progress.job.sources}
        progress = self._taken[source.name]
        if isinstance(progress.outcome, Death):
            raise VideoError(progress.problem)
        yield from self.take(source, progress.result)


def _load(loaded: Loaded, settings: EncodeSettings, with_vae: bool) -> Encoder:
    key = (settings.model, settings.device, with_vae)
    return loaded.get(key, lambda: load_encoder(settings, with_vae))


def _load_by(engine: Engine, settings: EncodeSettings, with_vae: bool) -> Encoder:
    """The encoder as far as the process that writes the set needs it. Raises ValueError, as load_encoder does."""
    (progress,) = engine.in_order([EncoderJob(settings=settings, with_vae=with_vae)], 1)
    size, text_name, vae_name, texts = progress.result
    return Encoder(
        device=torch.device("cpu"),
        size=size,
        text=lambda prompt: torch.tensor(texts[prompt]),
        text_name=text_name,
        vae=None,
        vae_name=vae_name,
    )
