"""Videos of the demo world, and encoded sets of them."""

import numpy as np
import torch

from context_forcing.train.data.clips import random_clip
from context_forcing.train.data.encode import EncodeSettings, SetEncoder
from context_forcing.train.data.manifest import MANIFEST
from context_forcing.train.data.shards import open_shard
from context_forcing.train.world.camera import view
from context_forcing.train.world.geometry import TOKEN
from context_forcing.train.world.scene import panorama
from context_forcing.video.mp4 import write_video

CLIP = 13
"""Pixel frames of a clip of four latent frames."""
SETTINGS = EncodeSettings(frames=4)
CAPTION = "A meadow by day. The camera pans right."
LENGTHS = {"a.mp4": 30, "b.mp4": 41, "sub/c.mp4": 13}
"""Pixel frames: 2, 3 and 1 clips."""


def world_frames(seed, num_frames):
    """True frames of the demo world, uint8 [num_frames, 64, 128, 3]."""
    clip = random_clip(np.random.default_rng(seed), num_frames // 12 + 1, 3, 0.5)
    # Between two latent frames the camera turns by at most a token of 8 art pixels, 2 in each of 4 pixel frames.
    lefts = np.interp(np.arange(num_frames) / 4, np.arange(len(clip.headings)), clip.headings * TOKEN).astype(int)
    rings = [panorama(clip.scene, style) for style in clip.styles]
    frames = [view(rings[(i + 3) // 12], left) for i, left in enumerate(lefts)]
    return np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)


def film(path, frames_THWC, fps=16, caption=CAPTION):
    """A video, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(frames_THWC).float() / 127.5 - 1
    write_video(path, [pixels.movedim(-1, 0)[None]], fps=fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def run(source, output, settings=SETTINGS, shard_bytes=60_000):
    """Encode into small shards: three clips of 32 kB or less each."""
    encoder = SetEncoder(source, output, settings)
    encoder.writer.shard_bytes = shard_bytes
    encoder.run()
    return encoder


def contents(folder):
    """The manifest and the bytes of all files."""
    return (folder / MANIFEST).read_text(), {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def tensors(folder, entry):
    """(latents, text) of a clip."""
    file = open_shard(folder / entry.shard)
    return file.get_tensor(f"{entry.key}.latents"), file.get_tensor(f"{entry.key}.text")
