"""What differs between the demo world and Wan 2.1: the text encoder, the VAE, and the size of a video."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoints.locate import default_models_dir, find, locate
from .base import VAE, PrecomputedText, TextEncoder
from .demo_text import DemoTextEncoder
from .demo_vae import load_demo_codec
from .umt5 import load_umt5, why_no_umt5
from .wan_vae import load_wan_vae, why_no_wan_vae

log = logging.getLogger("context_forcing")

WHY_NOT = {"text-encoder": why_no_umt5, "vae": why_no_wan_vae}


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """A text encoder and a VAE on their devices."""

    text_encoder: TextEncoder
    vae: VAE


class Backbone(ABC):
    """The kind of network a student is, by its card's `base`."""

    size: tuple[int, int]
    """Default width and height of a video in pixels."""

    @abstractmethod
    def load_codecs(
        self,
        device: torch.device,
        dtype: torch.dtype,
        prompts: Iterable[str] = (),
        *,
        text_encoder: str | None = None,
        vae: str | None = None,
        models_dir: Path | None = None,
    ) -> Codecs:
        """The text encoder and VAE, by path, by name in ComfyUI's models folder, or found there.

        Wan's prompts are encoded at once and the text encoder is freed, so that it never shares the device with the
        student; without prompts no text encoder is loaded. The VAE runs in `dtype` on CUDA, in float32 elsewhere.
        Raises ValueError, one line.
        """

    @abstractmethod
    def built_in_codecs(self, device: torch.device) -> Codecs:
        """The codecs that need no file. Raises ValueError where there are none."""

    preview_vae: VAE | None = None
    """A VAE on the CPU, fast enough for previews; None if there is none."""


class DemoBackbone(Backbone):
    """The demo world: its codecs are part of the package."""

    size = (128, 64)

    def load_codecs(self, device, dtype, prompts=(), *, text_encoder=None, vae=None, models_dir=None) -> Codecs:
        for option, path in (("--text-encoder", text_encoder), ("--vae", vae)):
            if path is not None:
                raise ValueError(f"{option}: {path} is not used, the student is of the demo world; leave it out")
        return self.built_in_codecs(device)

    def built_in_codecs(self, device: torch.device) -> Codecs:
        return Codecs(text_encoder=DemoTextEncoder(), vae=load_demo_codec().to(device))

    @cached_property
    def preview_vae(self) -> VAE:
        return load_demo_codec()


class WanBackbone(Backbone):
    """Wan 2.1 of any size: UMT5-XXL and Wan's VAE, from files."""

    size = (832, 480)

    def load_codecs(self, device, dtype, prompts=(), *, text_encoder=None, vae=None, models_dir=None) -> Codecs:
        prompts, models_dir = list(dict.fromkeys(prompts)), default_models_dir(models_dir)
        names = {"text-encoder": text_encoder, "vae": vae} if prompts else {"vae": vae}
        paths = {kind: self._path(kind, name, models_dir) for kind, name in names.items()}
        encoder = PrecomputedText(name="none", rows={})
        if prompts:
            umt5 = load_umt5(paths["text-encoder"], device)
            rows = {prompt: rows_LD[None] for prompt, rows_LD in zip(prompts, umt5.encode(prompts))}
            encoder = PrecomputedText(name=umt5.name, rows=rows)
        loaded = load_wan_vae(paths["vae"], dtype if device.type == "cuda" else torch.float32)
        return Codecs(text_encoder=encoder, vae=loaded.to(device))

    def _path(self, kind: str, name: str | None, models_dir: Path | None) -> Path:
        if name is not None:
            return locate(kind, name, models_dir)
        if models_dir is None:
            raise ValueError(self.missing)
        path = find(kind, models_dir, WHY_NOT[kind])
        log.info("%s: %s", kind, path)
        return path

    missing = (
        "student: a Wan 2.1 student needs a text encoder and a VAE; give `generate` --text-encoder and --vae, or"
        " --models-dir, the models folder of ComfyUI that holds them"
    )

    def built_in_codecs(self, device: torch.device) -> Codecs:
        raise ValueError(self.missing)


DEMO, WAN = DemoBackbone(), WanBackbone()


def backbone_of(name: str) -> Backbone:
    """The backbone of a card's `base`, of a training preset or of a set's model: `demo`, or any name of Wan 2.1."""
    return DEMO if name == "demo" else WAN
