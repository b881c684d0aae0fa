"""What differs between the demo world and Wan 2.1: text encoder, VAE, and default size of a video."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoints.locate import default_models_dir, find, locate
from ..checkpoints.student import ASSETS
from .base import VAE, PrecomputedText, TextEncoder
from .demo_text import DemoTextEncoder
from .demo_vae import load_demo_codec
from .tiny import load_tiny_decoder
from .umt5 import load_umt5, why_no_umt5
from .wan_vae import load_wan_vae, why_no_wan_vae

log = logging.getLogger("context_forcing")

NO_CODECS = (
    "student: a Wan 2.1 student needs a text encoder and a VAE; give `generate` --text-encoder and --vae, or"
    " --models-dir, the models folder of ComfyUI that holds them"
)


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """A text encoder, and a VAE on its device."""

    text_encoder: TextEncoder
    vae: VAE


class Backbone:
    """Wan 2.1 of any size, with UMT5-XXL and Wan's VAE; subclasses are other kinds of networks."""

    size = (832, 480)
    """Default width and height of a video in pixels."""
    preview_vae: VAE | None = None
    """A VAE on the CPU that is fast enough for previews."""
    negative_prompt = (ASSETS / "wan2.1_negative_prompt.txt").read_text(encoding="utf-8").strip()
    """The prompt of what a video should not be, as published with the network; empty for none."""

    def load_codecs(
        self,
        device: torch.device,
        dtype: torch.dtype,
        prompts: Iterable[str] = (),
        *,
        text_encoder: str | None = None,
        vae: str | None = None,
        decoder: str | None = None,
        encodes: bool = True,
        models_dir: Path | None = None,
    ) -> Codecs:
        """The codecs by path, by name in ComfyUI's models folder, or found there.

        Prompts are encoded at once and UMT5 is freed, so that it never shares the device with the student; without
        prompts it is not loaded. The VAE runs in `dtype` on CUDA, in float32 elsewhere. With a tiny `decoder` it is
        loaded only if something `encodes`. Raises ValueError, one line.
        """
        prompts, models_dir = list(dict.fromkeys(prompts)), default_models_dir(models_dir)
        encoder = PrecomputedText(name="none", rows={})
        umt5_path = self._path("text-encoder", text_encoder, models_dir, why_no_umt5) if prompts else None
        decoder_path = None if decoder is None else locate("decoder", decoder, models_dir)
        needs_vae = encodes or decoder_path is None
        vae_path = self._path("vae", vae, models_dir, why_no_wan_vae) if needs_vae else None
        if umt5_path:
            umt5 = load_umt5(umt5_path, device)
            rows = {prompt: rows_LD[None] for prompt, rows_LD in zip(prompts, umt5.encode(prompts))}
            encoder = PrecomputedText(name=umt5.name, rows=rows)
        vae_dtype = dtype if device.type == "cuda" else torch.float32
        net = load_wan_vae(vae_path, vae_dtype) if vae_path else None
        if decoder_path is not None:
            tiny = load_tiny_decoder(decoder_path, vae_dtype)
            tiny.encoder, net = net, tiny
        assert net is not None
        return Codecs(text_encoder=encoder, vae=net.to(device))

    def _path(self, kind: str, name: str | None, models_dir: Path | None, why_not) -> Path:
        if name is not None:
            return locate(kind, name, models_dir)
        if models_dir is None:
            raise ValueError(NO_CODECS)
        path = find(kind, models_dir, why_not)
        log.info("%s: %s", kind, path)
        return path

    def built_in_codecs(self, device: torch.device) -> Codecs:
        """The codecs in the package. Raises ValueError if there are none."""
        raise ValueError(NO_CODECS)


class DemoBackbone(Backbone):
    """The demo world; its codecs are in the package."""

    size = (128, 64)
    negative_prompt = ""

    def load_codecs(
        self, device, dtype, prompts=(), *, text_encoder=None, vae=None, decoder=None, encodes=True, models_dir=None
    ) -> Codecs:
        for option, path in (("--text-encoder", text_encoder), ("--vae", vae), ("--decoder", decoder)):
            if path is not None:
                raise ValueError(f"{option}: {path} is not used, the student is of the demo world; leave it out")
        return self.built_in_codecs(device)

    def built_in_codecs(self, device: torch.device) -> Codecs:
        return Codecs(text_encoder=DemoTextEncoder(), vae=load_demo_codec().to(device))

    @cached_property
    def preview_vae(self) -> VAE:
        return load_demo_codec()


WAN, DEMO = Backbone(), DemoBackbone()


def backbone_of(name: str) -> Backbone:
    """The backbone of a card's `base`, a training preset or the model of a training set: `demo`, or any of Wan 2.1."""
    return DEMO if name == "demo" else WAN
