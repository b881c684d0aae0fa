"""Run by ComfyUI's Python: features of a CLIP_VISION, of a still and a turning film.

    python clip_eye_check.py COMFYUI CHECKOUT PACK

Prints JSON: {film: similarity to the first frame}, and the largest `difference` from what the model encodes itself.
"""

import json
import sys

comfyui, checkout, pack = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, comfyui)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.clip_vision import ClipVisionModel  # noqa: E402
from pack import load_pack  # noqa: E402

CONFIG = {
    "hidden_act": "quick_gelu", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_channels": 3,
    "num_hidden_layers": 2, "patch_size": 8, "projection_dim": 16, "image_size": 32, "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
}  # fmt: skip


def small_clip_vision() -> ClipVisionModel:
    clip_vision = ClipVisionModel(CONFIG)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in clip_vision.get_sd().items()}
    state = {key: value / max(1, value[0].numel()) ** 0.5 for key, value in state.items()}
    clip_vision.load_sd({key: value + ("layer" in key and "norm" in key) for key, value in state.items()})
    return clip_vision


@torch.inference_mode()
def main() -> None:
    part = load_pack(checkout, pack)
    part("nodes")
    clip_vision = small_clip_vision()
    eye = part("nodes.consistency").clip_extractor(clip_vision)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    films = {"still": [picture] * 4, "turning": [np.roll(picture, 8 * step, 1) for step in range(4)]}
    measure_consistency = part("video.consistency").measure_consistency
    found = {
        name: measure_consistency(frames, 1.0, {"clip": eye}, 1.0).similarity["clip"] for name, frames in films.items()
    }
    own = clip_vision.encode_image(torch.from_numpy(picture[None]).float() / 255)["image_embeds"][0]
    found["difference"] = (eye([picture])[0] - own / own.norm()).abs().max().item()
    print(json.dumps(found))


main()
