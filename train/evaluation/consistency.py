"""How far a video stays what it was at its first frame, by image features of CLIP and DINOv2, beside its motion.

A still picture is perfectly consistent, so no similarity is given without the motion of the same video.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ...model.device import pick_device
from ...video.consistency import ConsistencyCurve, measure_consistency

log = logging.getLogger("context_forcing")

RESULTS = "consistency.json"
QUARTERS = 4
_FEATURES = {
    "clip": {"CLIPModel": "projected", "CLIPVisionModelWithProjection": "projected", "CLIPVisionModel": "pooled"},
    "dino": {"Dinov2Model": "class token"},
}
"""Architecture of a folder -> the feature taken: CLIP's image embedding, or what it is projected from."""


@dataclass(frozen=True, kw_only=True)
class Consistency(ConsistencyCurve):
    """One video over time."""

    name: str
    video: str


class PretrainedFeatures:
    """A local image model: pictures -> features of unit length."""

    def __init__(self, kind: str, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ValueError, one line, for a folder that is not such a model, whole."""
        self.device, self.dtype = device, dtype
        architecture = _architecture(kind, folder)
        self.feature = _FEATURES[kind][architecture]
        self._prepare = Preparation.load(kind, folder)
        self._net = _load(kind, folder, self.feature).to(device, dtype).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures [H, W, 3] -> [N, features], float32, on the CPU."""
        batch = torch.stack([self._prepare(picture) for picture in pictures]).to(self.device, self.dtype)
        out = self._net(pixel_values=batch)
        found = {
            "projected": lambda: out.image_embeds,
            "pooled": lambda: out.pooler_output,
            "class token": lambda: out.last_hidden_state[:, 0],
        }[self.feature]()
        return nn.functional.normalize(found.float(), dim=-1).cpu()


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a model's own preprocessor_config.json asks for: resize (bicubic), crop the centre, normalise."""

    resize: tuple[int, int] | int
    """Height and width, or the shorter side."""
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, kind: str, folder: Path) -> "Preparation":
        """Raises ValueError where the file lacks what is needed."""
        raw = _read_json(kind, folder, "preprocessor_config.json")
        try:
            size = raw["size"]
            crop = raw["crop_size"] if raw.get("do_center_crop") else None
            return cls(
                resize=_sides(size) if "shortest_edge" not in _named(size) else size["shortest_edge"],
                crop=_sides(crop) if crop is not None else None,
                mean=tuple(raw["image_mean"]),
                std=tuple(raw["image_std"]),
            )
        except KeyError as error:
            raise ValueError(f"{kind}: {folder}/preprocessor_config.json has no {error}") from None

    def __call__(self, picture: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> [3, h, w], normalised."""
        image = Image.fromarray(picture)
        width, height = image.size
        if isinstance(self.resize, int):
            grow = self.resize / min(width, height)
            width, height = (max(self.resize, int(side * grow)) for side in (width, height))
        else:
            height, width = self.resize
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.crop is not None:
            rows, columns = self.crop
            left, top = (width - columns) // 2, (height - rows) // 2
            image = image.crop((left, top, left + columns, top + rows))
        pixels = torch.from_numpy(np.asarray(image).copy()).float() / 255
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).movedim(-1, 0)


def _named(size: object) -> Mapping:
    return size if isinstance(size, Mapping) else {}


def _sides(size: Mapping | int) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _read_json(kind: str, folder: Path, name: str) -> dict:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{kind}: {folder / name} cannot be read ({error.strerror}); give a folder in transformers' layout"
        ) from None
    except ValueError as error:
        raise ValueError(f"{kind}: {folder / name} is not JSON ({error})") from None


def _architecture(kind: str, folder: Path) -> str:
    named = _read_json(kind, folder, "config.json").get("architectures") or ["none"]
    if named[0] not in _FEATURES[kind]:
        raise ValueError(f"{kind}: {folder} holds {named[0]}; it must be one of {', '.join(_FEATURES[kind])}")
    return named[0]


def _load(kind: str, folder: Path, feature: str) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{kind}: transformers is not installed; pip install transformers") from None
    cls = {
        "projected": transformers.CLIPVisionModelWithProjection,
        "pooled": transformers.CLIPVisionModel,
        "class token": transformers.Dinov2Model,
    }[feature]
    try:
        net, found = cls.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"{kind}: {folder} cannot be loaded ({' '.join(str(error).split())})") from None
    # transformers fills what is missing with random numbers, and only warns.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{kind}: the weights in {folder} lack {len(missing)} tensors, {missing[0]} first")
    return net


def read_frames(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """Frames a second, and every frame as it streams, uint8 [H, W, 3]. Raises ValueError for what is no video."""
    import imageio_ffmpeg

    if not path.is_file():
        raise ValueError(f"video: {path} is not there")
    stream = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    try:
        meta = next(stream)
    except (OSError, RuntimeError):
        raise ValueError(f"video: ffmpeg finds no video in {path}") from None
    width, height = meta["size"]
    return float(meta["fps"]), (np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in stream)


def measure_video(path: Path, name: str, extractors: Mapping[str, PretrainedFeatures], every: float) -> Consistency:
    """Look at a video every so many seconds, frame by frame as it streams.

    Raises ValueError for a video with fewer than two frames to look at.
    """
    fps, frames = read_frames(path)
    return Consistency(
        name=name, video=str(path), **vars(measure_consistency(frames, fps, extractors, every, str(path)))
    )


def evaluate_videos(
    videos: Sequence[Path], clip: Path | None, dino: Path | None, every: float, device: str, dtype: str, out: Path
) -> list[Table]:
    """Watch videos; writes consistency.json and consistency.png into `out` and returns a table."""
    folders = {kind: folder for kind, folder in (("clip", clip), ("dino", dino)) if folder is not None}
    if not videos:
        raise ValueError(f"{', '.join(folders)}: for videos only; give --video as well")
    if not folders:
        raise ValueError("clip, dino: none given; a video is measured by local weights, give one folder at least")
    for path in videos:
        if not path.is_file():
            raise ValueError(f"video: {path} is not there")
    if not 0 < every < math.inf:
        raise ValueError(f"every: {every:g} must be seconds above 0")
    where = pick_device(device, dtype)
    extractors = {kind: PretrainedFeatures(kind, folder, *where) for kind, folder in folders.items()}
    out.mkdir(parents=True, exist_ok=True)
    curve: list[Consistency] = []
    for path, name in zip(track(videos, description="watch", transient=True), _names(videos)):
        curve.append(measure_video(path, name, extractors, every))
        _write(out / RESULTS, curve, extractors, folders, every)
    _draw(curve, out)
    return [as_table(curve)]


def _names(videos: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in videos]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in videos]


def _write(path: Path, curve: Sequence[Consistency], extractors: Mapping, folders: Mapping, every: float) -> None:
    models = {
        kind: {"folder": str(folders[kind]), "feature": extractor.feature} for kind, extractor in extractors.items()
    }
    content = {"every": every, "models": models, "videos": [asdict(each) for each in curve]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _draw(curve: Sequence[Consistency], out: Path) -> None:
    try:
        from .plots import draw_consistency
    except ImportError as error:
        log.warning("no plot: %s is not installed; pip install 'context-forcing[train]'", error.name)
    else:
        draw_consistency([asdict(each) for each in curve], out / "consistency.png")


def as_table(curve: Sequence[Consistency]) -> Table:
    """Similarity to the first frame by quarters of the video, each beside the motion of that quarter."""
    table = Table(title="cosine to the first frame by quarter; motion: mean change frame to frame, % of full range")
    for column in ("video", "seconds", "looks", "figure", "1", "2", "3", "4", "whole", "least"):
        table.add_column(column, justify="left" if column in ("video", "figure") else "right")
    for each in curve:
        rows = {**{model: values[1:] for model, values in each.similarity.items()}, "motion": each.motion[1:]}
        for i, (figure, values) in enumerate(rows.items()):
            about = (each.name, f"{each.num_frames / each.fps:.1f}", str(len(each.times))) if i == 0 else ("", "", "")
            quarters = [
                f"{part.mean():.3f}" if len(part) else "" for part in np.array_split(np.array(values), QUARTERS)
            ]
            table.add_row(*about, figure, *quarters, f"{np.mean(values):.3f}", f"{min(values):.3f}")
    return table
