"""Codecs and encoders: ours against ComfyUI's on the same weights; decoding as a stream against decoding at once."""

import comfy.latent_formats
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.wan.vae import WanVAE
from comfy.text_encoders.wan import WanT5Model, WanT5Tokenizer
from conftest import shared
from safetensors.torch import save_file

import nodes
from context_forcing.model.codecs.base import denormalise
from context_forcing.model.codecs.demo_vae import load_demo_codec
from context_forcing.model.codecs.tiny import load_tiny_decoder
from context_forcing.model.codecs.umt5 import load_umt5
from context_forcing.model.codecs.wan_vae import load_wan_vae
from context_forcing.nodes.consistency import clip_extractor
from context_forcing.nodes.demo import DemoVAE
from context_forcing.nodes.progress import preview_of
from context_forcing.nodes.video import decode_stream
from context_forcing.video.consistency import measure_consistency
from context_forcing.video.frames import to_uint8

PROMPTS = ["a meadow by day, the camera pans right", "snow", "fog over a desert " * 12]
UMT5 = {"num_layers": 2, "d_ff": 16, "num_heads": 2, "d_kv": 8, "vocab_size": 256}


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny_vae(tiny_decoder_state, tmp_path_factory):
    """(dtype) -> a tiny decoder from VAELoader, in a file of this dtype."""
    folder = tmp_path_factory.mktemp("vae_approx")
    folder_paths.add_model_folder_path("vae_approx", str(folder))

    def load(dtype=torch.float32):
        state = {key: value.to(dtype) for key, value in tiny_decoder_state.items()}
        save_file(state, folder / "lighttaew2_1.safetensors")
        return nodes.VAELoader().load_vae("lighttaew2_1.safetensors")[0]

    return load


@pytest.mark.parametrize("codec", ["demo", "wan", "tiny"])
def test_decoding_as_a_stream_equals_decoding_at_once(codec, wan_vae_state, tiny_vae):
    make = {
        "demo": lambda: DemoVAE(load_demo_codec()), "wan": lambda: comfy.sd.VAE(sd=dict(wan_vae_state)),
        "tiny": tiny_vae,
    }  # fmt: skip
    vae = make[codec]()
    latents = random(1, 16, 10, 4, 6)
    whole = vae.decode(denormalise(latents))
    assert whole.shape == (1, 37, 32, 48, 3) and whole.amax() - whole.amin() > 0.1
    for sizes in ([10], [1] * 10, [3, 3, 3, 1], [1, 2, 2, 2, 2, 1], [2, 1, 4, 3], [1, 3, 3, 3]):
        pixels = torch.cat(list(decode_stream(vae, latents.split(sizes, dim=2))), dim=2)
        as_images = pixels.add(1).div(2).clamp(0, 1).movedim(1, -1)
        torch.testing.assert_close(as_images, whole.clamp(0, 1), atol=1e-6, rtol=0)
    if codec == "tiny":
        return  # The file has no encoder.
    assert vae.encode(whole[0]).shape == latents.shape
    tiled = vae.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1)
    assert tiled.shape == whole.shape and 0 <= tiled.amin() and tiled.amax() <= 1


def test_a_tiny_decoder_in_half_precision_is_refused(tiny_vae):
    """ComfyUI scales its latents as HunyuanVideo's."""
    with pytest.raises(ValueError, match="takes a tiny decoder in float16 .* for HunyuanVideo's; load lighttaew2_1"):
        decode_stream(tiny_vae(torch.float16), [random(1, 16, 3, 4, 6)])


def test_the_tiny_decoder_equals_comfyuis(tiny_vae, tiny_decoder_state, tmp_path):
    save_file(tiny_decoder_state, tmp_path / "lighttaew2_1.safetensors")
    raw = random(1, 16, 6, 4, 6)
    theirs = tiny_vae().decode(raw).movedim(-1, 1).clamp(0, 1) * 2 - 1
    assert theirs.std() > 0.1
    torch.testing.assert_close(load_tiny_decoder(tmp_path / "lighttaew2_1.safetensors").decode(raw), theirs)


def test_previews_of_a_tiny_decoder_are_frames_of_the_video(tiny_vae, monkeypatch):
    """With and without a picture of every frame; the state is carried from chunk to chunk."""
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.TAESD)
    vae, latents = tiny_vae(), random(1, 16, 6, 4, 6)
    video = to_uint8(torch.cat(list(decode_stream(vae, [latents])), dim=2))
    for only_last in (False, True):
        preview, pictures = preview_of(None), []
        for chunk in latents.split(3, dim=2):
            pictures.append(preview(chunk.split(1, dim=2), only_last)[-1])
        assert np.array_equal(np.stack(pictures), video[[8, 20]])


def test_the_wan_vae_equals_comfyuis(models_dir, wan_vae_state):
    ours, theirs = (
        load_wan_vae(models_dir / "vae" / "wan.safetensors"),
        WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True]),
    )
    theirs.load_state_dict(wan_vae_state)
    pixels, raw = random(1, 3, 17, 32, 48).clamp(-1, 1), random(1, 16, 6, 4, 6)
    decoded = theirs.decode(raw)
    assert decoded.std() > 0.1
    torch.testing.assert_close(ours.encode(pixels), theirs.encode(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.decode(raw), decoded.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_text_encoder_equals_comfyuis(quantised, umt5_state, spiece, tmp_path):
    """ComfyUI pads to 512 rows, those of padding zero."""
    words = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    state = shared.scaled_fp8(umt5_state) if quantised else umt5_state
    save_file({**state, "spiece_model": words}, tmp_path / "umt5.safetensors")
    ours = load_umt5(tmp_path / "umt5.safetensors", torch.device("cpu"))

    options = {"quantization_metadata": {"mixed_ops": True}} if quantised else {}
    theirs = WanT5Model(dtype=torch.float32, model_options={"umt5xxl_model_config": UMT5, **options})
    converted = comfy.utils.convert_old_quants(dict(state))[0] if quantised else state
    keys = theirs.umt5xxl.transformer.load_state_dict(converted, strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys
    tokenizer = WanT5Tokenizer(tokenizer_data={"spiece_model": words})
    for prompt, rows in zip(PROMPTS, ours.encode(PROMPTS), strict=True):
        weighted, tokens = tokenizer.tokenize_with_weights(prompt.strip()), ours.tokens(prompt)
        assert [token for token, _ in weighted["umt5xxl"][0]] == tokens + [0] * (512 - len(tokens))
        expected = theirs.encode_token_weights(weighted)[0][0]
        assert expected.shape == (512, 4096) and not expected[len(rows) :].any() and rows.std() > 0.3
        torch.testing.assert_close(rows, expected[: len(rows)].float(), atol=1e-5, rtol=1e-5)


CLIP_VISION = {
    "hidden_act": "quick_gelu", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_channels": 3,
    "num_hidden_layers": 2, "patch_size": 8, "projection_dim": 16, "image_size": 32, "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
}  # fmt: skip


def test_features_of_a_clip_vision():
    """A tiny one of ComfyUI's own classes, with random weights, on a still and a turning film."""
    clip_vision = ClipVisionModel(CLIP_VISION)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in clip_vision.get_sd().items()}
    state = {key: value / max(1, value[0].numel()) ** 0.5 for key, value in state.items()}
    clip_vision.load_sd({key: value + ("layer" in key and "norm" in key) for key, value in state.items()})
    extractor = clip_extractor(clip_vision)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    own = clip_vision.encode_image(torch.from_numpy(picture[None]).float() / 255)["image_embeds"][0]
    torch.testing.assert_close(extractor([picture])[0], own / own.norm(), atol=1e-6, rtol=0)

    similarity = lambda film: measure_consistency(film, 1.0, {"clip": extractor}, 1.0).similarity["clip"]
    assert similarity([picture] * 4) == pytest.approx([1] * 4, abs=1e-4)
    turning = similarity([np.roll(picture, 8 * step, 1) for step in range(4)])
    assert turning[0] == pytest.approx(1, abs=1e-4) and max(turning[1:]) < 0.999
