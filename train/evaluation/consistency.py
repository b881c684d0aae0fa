"""Consistency of videos over time, by image features of CLIP and DINOv2, and their motion.

A still picture is perfectly consistent. A similarity is therefore always reported with the motion of the same video.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ...memory.files import atomic_path
from ...model.checkpoints.containers import read_json
from ...model.device import pick_device
from ...video.consistency import ConsistencyCurve, FeatureExtractor, draw_consistency, measure_consistency
from ...video.reading import VideoError, read_frames

RESULTS = "consistency.json"
_ARCHITECTURES = {
    "clip": {"CLIPModel": "projected", "CLIPVisionModelWithProjection": "projected", "CLIPVisionModel": "pooled"},
    "dino": {"Dinov2Model": "class token"},
}
"""Kind of model -> architecture of the folder -> feature."""
_FEATURES = {
    "projected": ("CLIPVisionModelWithProjection", lambda out: out.image_embeds),
    "pooled": ("CLIPVisionModel", lambda out: out.pooler_output),
    "class token": ("Dinov2Model", lambda out: out.last_hidden_state[:, 0]),
}
"""Feature -> class of the model in transformers, and the feature of its output."""


class PretrainedFeatures:
    """An image model in a local folder as a feature extractor."""

    def __init__(self, kind: str, folder: Path, device: torch.device, dtype: torch.dtype):
        """`kind` is clip or dino. Raises ValueError, one line, for a folder without a complete model of this kind."""
        try:
            import transformers
        except ImportError:
            raise ValueError(f"{kind}: transformers is not installed; pip install transformers") from None
        self.device, self.dtype = device, dtype
        try:
            architecture = (read_json(folder / "config.json").get("architectures") or ["none"])[0]
            if architecture not in _ARCHITECTURES[kind]:
                raise ValueError(f"it holds {architecture}, not one of {', '.join(_ARCHITECTURES[kind])}")
            self.feature = _ARCHITECTURES[kind][architecture]
            name, self._feature_of = _FEATURES[self.feature]
            # Pillow also where torchvision is installed: features must not depend on the machine.
            self._prepare = transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, backend="pil"
            )
            net, info = getattr(transformers, name).from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True
            )
            # transformers initialises missing tensors with random numbers and only logs a warning.
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} first")
        except (OSError, ValueError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise ValueError(f"{kind}: {folder} is not a complete folder in transformers' layout: {reason}") from None
        self._net = net.to(device, dtype).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures [H, W, 3] -> features of unit length [N, features], float32, on the CPU."""
        pixels = self._prepare(images=list(pictures), return_tensors="pt")["pixel_values"]
        features = self._feature_of(self._net(pixel_values=pixels.to(self.device, self.dtype)))
        return nn.functional.normalize(features.float(), dim=-1).cpu()


def measure_video(path: Path, extractors: Mapping[str, FeatureExtractor], every: float) -> ConsistencyCurve:
    """Consistency of a video file, sampled every so many seconds. The file is read as a stream.

    Raises ValueError for a file that is not a video, and for a video with fewer than two samples.
    """
    try:
        fps, frames = read_frames(path)
    except VideoError as error:
        raise ValueError(f"video: {path}: {error}") from None
    return measure_consistency(frames, fps, extractors, every, str(path))


def evaluate_videos(
    videos: Sequence[Path], clip: Path | None, dino: Path | None, every: float, device: str, dtype: str, out: Path
) -> list[Table]:
    """Measure videos; writes consistency.json and consistency.png into `out` and returns a table."""
    folders = {kind: folder for kind, folder in (("clip", clip), ("dino", dino)) if folder is not None}
    if not videos:
        raise ValueError(f"{', '.join(folders)}: for videos only; give --video as well")
    if not folders:
        raise ValueError("clip, dino: none given; a video is measured by local weights, give one folder at least")
    for path in videos:
        if not path.is_file():
            raise ValueError(f"video: {path}: there is no such file")
    if not 0 < every < math.inf:
        raise ValueError(f"every: {every:g} must be seconds above 0")
    where = pick_device(device, dtype)
    extractors = {kind: PretrainedFeatures(kind, folder, *where) for kind, folder in folders.items()}
    models = {kind: {"folder": str(folders[kind]), "feature": extractors[kind].feature} for kind in extractors}
    out.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in videos]
    if len(set(names)) < len(names):
        names = [str(path) for path in videos]
    curves: dict[str, ConsistencyCurve] = {}
    results = []
    for path, name in zip(track(videos, description="measure", transient=True), names):
        curves[name] = measure_video(path, extractors, every)
        results.append({"name": name, "video": str(path), **asdict(curves[name])})
        content = {"every": every, "models": models, "videos": results}
        with atomic_path(out / RESULTS) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw_consistency(curves).save(out / "consistency.png")
    return [as_table(curves)]


def as_table(curves: Mapping[str, ConsistencyCurve]) -> Table:
    """Similarity to the first frame by quarters of the video, and the motion of the same quarters."""
    table = Table(title="cosine to the first frame by quarter; motion: mean change frame to frame, % of full range")
    for column in ("video", "seconds", "samples", "figure", "1", "2", "3", "4", "whole", "least"):
        table.add_column(column, justify="left" if column in ("video", "figure") else "right")
    for name, curve in curves.items():
        shown = [name, f"{curve.num_frames / curve.fps:.1f}", str(len(curve.times))]
        for figure, values in {**curve.similarity, "motion": curve.motion}.items():
            # The first frame is the reference of the others.
            quarters = np.array_split(np.array(values[1:]), 4)
            means = [f"{part.mean():.3f}" if len(part) else "" for part in quarters]
            table.add_row(*shown, figure, *means, f"{np.mean(values[1:]):.3f}", f"{min(values[1:]):.3f}")
            shown = ["", "", ""]
    return table
