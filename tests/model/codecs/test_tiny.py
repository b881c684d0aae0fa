"""Tiny decoders: what the published layout computes, as a stream of any chunks, and which files are refused."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from context_forcing.model.codecs.base import denormalise, normalise
from context_forcing.model.codecs.tiny import TinyDecoder, load_tiny_decoder
from context_forcing.model.codecs.wan_vae import load_wan_vae
from context_forcing.model.units import pixel_frames


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(folder, state, name="taew2_1.safetensors"):
    save_file(state, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def decoder(tiny_decoder_state, tmp_path_factory):
    return load_tiny_decoder(saved(tmp_path_factory.mktemp("tiny"), tiny_decoder_state))


def at_once(state, latents_tChw):
    """The layout in words, layer by layer over all frames: each block sees its input and the frame before, or zeros."""
    conv = lambda x, name: F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding="same")
    x = F.relu(conv(torch.tanh(latents_tChw / 3) * 3, "decoder.1"))
    for first in (3, 9, 15):
        for place in range(first, first + 3):
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
            y = F.relu(conv(y, f"decoder.{place}.conv.0"))
            y = F.relu(conv(y, f"decoder.{place}.conv.2"))
            x = F.relu(conv(y, f"decoder.{place}.conv.4") + x)
        x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.{first + 4}.conv")
        x = x.unflatten(1, (-1, state[f"decoder.{first + 5}.weight"].shape[1])).flatten(0, 1)
        x = conv(x, f"decoder.{first + 5}")
    return conv(F.relu(x), "decoder.22")[3:].clamp(0, 1)


def test_the_full_size_has_the_tensors_of_taew2_1():
    with torch.device("meta"):
        state = TinyDecoder((256, 128, 64, 64), (1, 2, 2), True).state_dict()
    assert len(state) == 64 and sum(value.numel() for value in state.values()) == 9_844_611
    for key, shape in {
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.14.weight": (64, 128, 3, 3),
        "decoder.17.conv.4.bias": (64,),
        "decoder.22.weight": (3, 64, 3, 3),
    }.items():
        assert tuple(state[key].shape) == shape, key


def test_it_computes_what_the_layout_says(decoder, tiny_decoder_state):
    raw = random(1, 16, 7, 4, 6)
    pixels = decoder.decode(raw)
    expected = at_once(tiny_decoder_state, normalise(raw)[0].movedim(1, 0)).movedim(0, 1)[None] * 2 - 1
    assert pixels.shape == (1, 3, pixel_frames(7), 32, 48) and 0.1 < pixels.std() and pixels.abs().max() <= 1
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunking", [(1,) * 7, (3, 3, 1), (3, 4), (1, 6), (2, 2, 3), (6, 1)], ids=str)
def test_every_chunking_is_the_same_bit_for_bit(decoder, chunking):
    raw = random(1, 16, 7, 4, 6)
    parts = list(decoder.decode_stream(raw.split(chunking, dim=2)))
    assert [part.shape[2] for part in parts] == [1] + [4] * 6
    assert torch.equal(torch.cat(parts, dim=2), decoder.decode(raw))


def test_what_was_carried_matters_and_time_is_causal(decoder):
    raw = random(1, 16, 4, 4, 6)
    other = torch.cat([random(1, 16, 2, 4, 6, seed=1), raw[:, :, 2:]], dim=2)
    assert (decoder.decode(raw)[:, :, 9:] - decoder.decode(other)[:, :, 9:]).abs().max() > 0.01
    later = torch.cat([raw[:, :, :2], random(1, 16, 2, 4, 6, seed=1)], dim=2)
    assert torch.equal(decoder.decode(raw)[:, :, :5], decoder.decode(later)[:, :, :5])


def test_videos_of_a_batch_do_not_touch(decoder):
    raw = random(2, 16, 3, 4, 6)
    both = decoder.decode(raw)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], decoder.decode(raw[i : i + 1]), atol=1e-4, rtol=0)


def test_the_name_says_which_latents_it_takes(tiny_decoder_state, decoder, tmp_path):
    light = load_tiny_decoder(saved(tmp_path, tiny_decoder_state, "LightTAEw2_1.safetensors"))
    z = random(1, 16, 2, 4, 6)
    assert light.decoder[1].weight.equal(decoder.decoder[1].weight)
    torch.testing.assert_close(light.decode(z), decoder.decode(denormalise(z)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="tiny.safetensors: its name does not say which latents"):
        load_tiny_decoder(saved(tmp_path, tiny_decoder_state, "tiny.safetensors"))


def test_pth_and_half_precision_are_read(tiny_decoder_state, decoder, tmp_path):
    torch.save({key: value.half() for key, value in tiny_decoder_state.items()}, tmp_path / "taew2_1.pth")
    raw, half = random(1, 16, 2, 4, 6), load_tiny_decoder(tmp_path / "taew2_1.pth")
    assert half.decoder[1].weight.dtype == torch.float32
    torch.testing.assert_close(half.decode(raw), decoder.decode(raw), atol=0.02, rtol=0)


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {"x": torch.zeros(1)}, "not a tiny decoder, decoder.1.weight is missing"),
        (lambda s: without(s, "decoder.7.conv.weight"), "not a tiny decoder, decoder.7.conv.weight is missing"),
        (lambda s: without(s, "decoder.4.conv.2.bias"), "decoder.4.conv.2.bias"),
        (lambda s: {**s, "decoder.5.conv.0.weight": torch.zeros(2, 2, 3, 3)}, "decoder.5.conv.0.weight"),
        (lambda s: {**s, "decoder.8.weight": torch.zeros(8)}, "decoder.8.weight is missing or no convolution"),
        (
            lambda s: {**s, "decoder.1.weight": torch.zeros(12, 48, 3, 3)},
            "of 48 latent channels, for example of Wan 2.2",
        ),
        (lambda s: {**s, "decoder.7.conv.weight": torch.zeros(24, 12, 1, 1)}, "of 8 frames per latent frame"),
    ],
)
def test_other_files_are_refused_in_one_line(tiny_decoder_state, tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        load_tiny_decoder(saved(tmp_path, change(tiny_decoder_state)))
    assert words in str(error.value) and "taew2_1" in str(error.value) and "\n" not in str(error.value)


def test_it_is_no_vae(tiny_decoder_state, decoder, tmp_path):
    with pytest.raises(ValueError, match="a tiny decoder, which is for --decoder"):
        load_wan_vae(saved(tmp_path, tiny_decoder_state))
    with pytest.raises(ValueError, match="does not encode pictures; give the VAE too, with --vae"):
        decoder.encode(torch.zeros(1, 3, 1, 32, 48))
