"""Wan's VAE: no cut shows, time is causal, every published file of it loads, and others are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from context_forcing.model.codecs.base import WAN_MEAN, WAN_STD
from context_forcing.model.codecs.wan_vae import WanVAE, load_wan_vae
from context_forcing.model.units import pixel_frames


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae(wan_vae_state):
    net = WanVAE(8)
    net.load_state_dict(wan_vae_state)
    return net.eval().requires_grad_(False)


def test_the_full_size_has_wans_tensors():
    """Names, and counts of Wan2.1_VAE.pth: 194 tensors, 126.9 million numbers."""
    with torch.device("meta"):
        state = WanVAE().state_dict()
    assert len(state) == 194 and sum(value.numel() for value in state.values()) == 126_892_531
    for key, shape in {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.6.shortcut.weight": (384, 192, 1, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.7.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.4.residual.6.bias": (384,),
        "decoder.head.0.gamma": (96, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
    }.items():
        assert tuple(state[key].shape) == shape, key


@pytest.mark.parametrize("frames, latents", [(1, 1), (5, 2), (13, 4)])
def test_shapes(vae, frames, latents):
    raw = vae.encode(random(1, 3, frames, 32, 48).clamp(-1, 1))
    assert raw.shape == (1, 16, latents, 4, 6)
    pixels = vae.decode(raw)
    assert pixels.shape == (1, 3, frames, 32, 48) and pixels.abs().max() <= 1 and pixels.std() > 0.1


@pytest.mark.parametrize("shape", [(4, 32, 48), (5, 30, 48)], ids=str)
def test_other_shapes_are_refused(vae, shape):
    with pytest.raises(ValueError, match="give 1 . 4k frames"):
        vae.encode(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("chunking", [(1,) * 7, (3, 3, 1), (2, 5), (6, 1)], ids=str)
def test_every_chunking_is_the_same_bit_for_bit(vae, chunking):
    raw = random(1, 16, 7, 4, 6)
    stream = torch.cat(list(vae.decode_stream(raw.split(chunking, dim=2))), dim=2)
    assert stream.shape[2] == pixel_frames(7) and torch.equal(stream, vae.decode(raw))


def test_what_was_carried_matters(vae):
    """Else decoding piece by piece would be trivially the same."""
    raw = random(1, 16, 3, 4, 6)
    other = torch.cat([random(1, 16, 2, 4, 6, seed=1), raw[:, :, 2:]], dim=2)
    assert (vae.decode(raw)[:, :, 5:] - vae.decode(other)[:, :, 5:]).abs().max() > 0.05


def test_time_is_causal(vae):
    raw = random(1, 16, 5, 4, 6)
    later = torch.cat([raw[:, :, :3], random(1, 16, 2, 4, 6, seed=1)], dim=2)
    assert torch.equal(vae.decode(raw)[:, :, :9], vae.decode(later)[:, :, :9])
    pixels = random(1, 3, 13, 32, 32).clamp(-1, 1)
    later = torch.cat([pixels[:, :, :9], pixels[:, :, 9:].flip(2)], dim=2)
    assert torch.equal(vae.encode(pixels)[:, :, :3], vae.encode(later)[:, :, :3])
    assert not torch.equal(vae.encode(pixels)[:, :, 3], vae.encode(later)[:, :, 3])


def test_an_endless_film_is_decoded_as_it_comes_with_a_past_that_does_not_grow(vae, monkeypatch):
    seen = []
    decoder = vae.decoder.forward

    def watched(x, past):
        y = decoder(x, past)
        seen.append(sum(frames.nbytes for frames in past.values() if frames is not None))
        return y

    monkeypatch.setattr(vae.decoder, "forward", watched)

    def endless():
        while True:
            yield random(1, 16, 3, 2, 2)

    stream = vae.decode_stream(endless())
    assert [next(stream).shape[2] for _ in range(10)] == [1] + [4] * 9
    assert len(set(seen[2:])) == 1, seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_wans_layout(vae, wan_vae_state, tmp_path, dtype):
    stored = {key: value.to(dtype) for key, value in wan_vae_state.items()}
    torch.save(stored, tmp_path / "Wan2.1_VAE.pth")
    save_file(stored, tmp_path / "wan_2.1_vae.safetensors")
    save_file({f"model.{key}": value for key, value in stored.items()}, tmp_path / "prefixed.safetensors")
    for name in ("Wan2.1_VAE.pth", "wan_2.1_vae.safetensors", "prefixed.safetensors"):
        loaded = load_wan_vae(tmp_path / name)
        assert all(torch.equal(loaded.state_dict()[key], value.float()) for key, value in stored.items())
    assert load_wan_vae(tmp_path / "Wan2.1_VAE.pth", dtype).conv2.weight.dtype == dtype


def test_half_precision_is_close(vae, wan_vae_state, tmp_path):
    save_file(wan_vae_state, tmp_path / "vae.safetensors")
    half = load_wan_vae(tmp_path / "vae.safetensors", torch.bfloat16)
    raw, pixels = random(1, 16, 3, 4, 6), random(1, 3, 5, 32, 32).clamp(-1, 1)
    for exact, rough in ((vae.decode(raw), half.decode(raw)), (vae.encode(pixels), half.encode(pixels))):
        assert rough.dtype == torch.float32 and (exact - rough).abs().mean() < 0.02 < exact.std()


def to_diffusers(key):
    """AutoencoderKLWan's names, written from its module tree: two blocks a level down, three up."""
    part = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    for wan, name in part.items():
        key = key.replace(f".{wan}.", f".{name}.")
    key = key.replace(".shortcut.", ".conv_shortcut.")
    for side in ("encoder", "decoder"):
        key = key.replace(f"{side}.conv1.", f"{side}.conv_in.")
        key = key.replace(f"{side}.head.0.", f"{side}.norm_out.").replace(f"{side}.head.2.", f"{side}.conv_out.")
        for number, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            key = key.replace(f"{side}.middle.{number}.", f"{side}.mid_block.{name}.")
    key = key.replace("encoder.downsamples.", "encoder.down_blocks.")
    if key.startswith("decoder.upsamples."):
        _, _, place, rest = key.split(".", 3)
        level, place = divmod(int(place), 4)
        key = f"decoder.up_blocks.{level}.{'upsamplers.0' if place == 3 else f'resnets.{place}'}.{rest}"
    if key.startswith(("conv1.", "conv2.")):
        key = key.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
    return key


def write_diffusers(folder, state, **config):
    folder.mkdir()
    names = {to_diffusers(key): value for key, value in state.items()}
    assert len(names) == len(state)
    save_file(names, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"latents_mean": WAN_MEAN, "latents_std": WAN_STD, **config}))
    return folder


def test_a_diffusers_folder(vae, wan_vae_state, tmp_path):
    write_diffusers(tmp_path / "vae", wan_vae_state)
    for path in (tmp_path / "vae", tmp_path):
        loaded = load_wan_vae(path).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in wan_vae_state.items())


def test_diffusers_itself_agrees(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=2).eval()
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_wan_vae(tmp_path / "vae")
    pixels, raw = random(1, 3, 9, 32, 48).clamp(-1, 1), random(1, 16, 4, 4, 6)
    with torch.inference_mode():
        torch.testing.assert_close(ours.encode(pixels), theirs.encode(pixels).latent_dist.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(raw), theirs.decode(raw).sample, atol=1e-5, rtol=0)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


REFUSED = {
    "Wan 2.2's": (lambda s: {**s, "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, "a VAE with 48 latent channels"),
    "a tiny autoencoder": (lambda s: {"decoder.1.weight": torch.zeros(2)}, "not a Wan VAE, encoder.conv1.weight"),
    "a tensor missing": (lambda s: without(s, "decoder.head.2.bias"), "first decoder.head.2.bias"),
    "a tensor too many": (lambda s: {**s, "encoder.extra": torch.zeros(2)}, "first encoder.extra"),
    "another shape": (lambda s: {**s, "decoder.head.0.gamma": torch.ones(4, 1, 1, 1)}, "first decoder.head.0.gamma"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED.keys())
def test_others_are_refused_in_one_line(wan_vae_state, tmp_path, change, words):
    save_file(change(wan_vae_state), tmp_path / "vae.safetensors")
    refused(tmp_path / "vae.safetensors", words)


def test_damaged_files_and_code_are_refused_in_one_line(wan_vae_state, tmp_path):
    torch.save(wan_vae_state, tmp_path / "vae.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "vae.pth").read_bytes()[:5000])
    torch.save({"state_dict": WanVAE(8)}, tmp_path / "code.pth")
    torch.save({"state_dict": wan_vae_state}, tmp_path / "nested.pth")
    refused(tmp_path / "half.pth", "not a complete torch file")
    refused(tmp_path / "code.pth", "only tensors are read")
    refused(tmp_path / "nested.pth", "holds other values than tensors")
    refused(tmp_path / "none.pth", "no such file")
    refused(write_diffusers(tmp_path / "vae", wan_vae_state, latents_mean=[0.0] * 16), "latents_mean is not that of")


def test_a_pickle_as_older_torch_wrote_it_is_read(wan_vae_state, tmp_path):
    torch.save(wan_vae_state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    read = load_wan_vae(tmp_path / "legacy.pth").state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in wan_vae_state.items())


def refused(path, words):
    with pytest.raises(ValueError) as error:
        load_wan_vae(path)
    said = str(error.value)
    assert words in said and str(path) in said and "\n" not in said, said
