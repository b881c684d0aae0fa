"""The built-in text encoder and codec as ComfyUI's CLIP and VAE."""

import math
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch

from ..model.codecs.demo_text import DemoTextEncoder
from ..model.codecs.demo_vae import DemoCodec
from ..model.units import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT, pixel_frames

WORDS = "context_forcing_words"
"""Key of a CONDITIONING's options under which DemoCLIP keeps the prompt, for reports. Other encoders do not."""


class DemoCLIP:
    """The interface of CLIP that text encode nodes use. It has no weights."""

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, str]:
        return {"text": text}

    def encode_from_tokens_scheduled(
        self, tokens: dict[str, str], unprojected: bool = False, add_dict: dict | None = None, show_pbar: bool = True
    ) -> list[list]:
        rows = DemoTextEncoder().encode(tokens["text"])
        return [[rows, {"pooled_output": None, WORDS: tokens["text"], **(add_dict or {})}]]

    def clone(self, disable_dynamic: bool = False) -> "DemoCLIP":
        return self


class DemoVAE(comfy.sd.VAE):
    """The demo codec behind the interface of ComfyUI's VAE, whose own __init__ builds only what it can detect."""

    def __init__(self, codec: DemoCodec):
        self.first_stage_model = codec
        self.memory_used_encode = lambda shape, dtype: 64 * math.prod(shape) * mm.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: 4096 * math.prod(shape[2:]) * mm.dtype_size(dtype)
        stride, side = FRAMES_PER_LATENT, PIXELS_PER_LATENT
        self.upscale_ratio = (pixel_frames, side, side)
        self.downscale_ratio = (lambda frames: max(0, math.ceil(frames / stride)), side, side)
        self.upscale_index_formula = self.downscale_index_formula = (stride, side, side)
        self.latent_dim, self.latent_channels, self.output_channels = 3, LATENT_CHANNELS, 3
        self.pad_channel_value = 1.0
        self.process_input = lambda image: image * 2.0 - 1.0
        # In place: comfy.sd.VAE.decode ignores the returned tensor.
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.disable_offload = self.not_video = self.handles_tiling = False
        self.crop_input = True
        self.extra_1d_channel = self.format_encoded = self.size = None
        self.audio_sample_rate = 44100
        self.device = mm.vae_device()
        self.vae_dtype = torch.float32
        self.output_device = mm.intermediate_device()
        mm.archive_model_dtypes(codec)
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            codec, load_device=self.device, offload_device=mm.vae_offload_device()
        )
        self.model_size()
