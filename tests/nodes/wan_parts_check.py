"""Run by ComfyUI's Python: a tiny random Wan VAE and UMT5 of ComfyUI's, and what they make of something.

    python wan_parts_check.py COMFYUI FOLDER

FOLDER holds spiece.model and prompts.json; written are vae.safetensors, umt5.safetensors, umt5_fp8.safetensors, and
made.safetensors with inputs and outputs.
"""

import json
import sys
from pathlib import Path

comfyui, folder = sys.argv[1], Path(sys.argv[2])
sys.argv[1:] = []
sys.path.insert(0, comfyui)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from comfy.text_encoders.wan import WanT5Model, WanT5Tokenizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SIZES = {"num_layers": 2, "d_ff": 16, "num_heads": 2, "d_kv": 8, "vocab_size": 256}
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=generator)


def draw(state, one, gain):
    return {
        key: 1 + 0.1 * random(*value.shape) if one in key else random(*value.shape) * gain / value[0].numel() ** 0.5
        for key, value in state.items()
    }


def text_encoder(state, quantised):
    options = {"umt5xxl_model_config": SIZES, **({"quantization_metadata": {"mixed_ops": True}} if quantised else {})}
    model = WanT5Model(dtype=torch.float32, model_options=options)
    missing = model.umt5xxl.transformer.load_state_dict(state, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    return model


def scaled_fp8(state):
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        scaled[key] = value
        if value.ndim == 2 and "layer." in key and "relative" not in key:
            scale = value.abs().max() / 448
            scaled[key] = (value / scale).to(torch.float8_e4m3fn)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale
    return scaled


@torch.inference_mode()
def main() -> None:
    vae = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    vae.load_state_dict(draw(vae.state_dict(), "gamma", 0.7))
    save_file(vae.state_dict(), folder / "vae.safetensors")
    pixels, raw = random(1, 3, 17, 32, 48).clamp(-1, 1), random(1, 16, 6, 4, 6)
    made = {"pixels": pixels, "raw": raw, "encoded": vae.encode(pixels), "decoded": vae.decode(raw)}

    empty = WanT5Model(dtype=torch.float32, model_options={"umt5xxl_model_config": SIZES})
    state = draw(empty.umt5xxl.transformer.state_dict(), "norm", 0.7)
    words = torch.frombuffer(bytearray((folder / "spiece.model").read_bytes()), dtype=torch.uint8)
    save_file({**state, "spiece_model": words}, folder / "umt5.safetensors")
    scaled = scaled_fp8(state)
    save_file({**scaled, "spiece_model": words}, folder / "umt5_fp8.safetensors")
    tokenizer = WanT5Tokenizer(tokenizer_data={"spiece_model": words})
    encoders = {
        "umt5": text_encoder(state, False),
        "umt5_fp8": text_encoder(comfy.utils.convert_old_quants(dict(scaled))[0], True),
    }
    for number, prompt in enumerate(json.loads((folder / "prompts.json").read_text())):
        tokens = tokenizer.tokenize_with_weights(prompt)
        made[f"tokens.{number}"] = torch.tensor([token for token, _ in tokens["umt5xxl"][0]])
        for name, encoder in encoders.items():
            made[f"{name}.{number}"] = encoder.encode_token_weights(tokens)[0]
    save_file({key: value.contiguous() for key, value in made.items()}, folder / "made.safetensors")


main()
