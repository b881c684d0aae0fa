"""Latents and pixels: normalisation, the demo codec, decoding as a stream."""

import pytest
import torch
from torch import nn

from context_forcing.model.codecs.base import WAN_MEAN, WAN_STD, denormalise, normalise
from context_forcing.model.codecs.demo_vae import DemoCodec, dct_transform, load_demo_codec
from context_forcing.model.codecs.wan_vae import decode_wan_stream
from context_forcing.model.units import pixel_frames


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec():
    """Random weights and statistics: every part matters."""
    codec = DemoCodec(width=16, num_blocks=1)
    for i, parameter in enumerate(codec.parameters()):
        parameter.data = 0.1 * random(*parameter.shape, seed=i)
    codec.mean.copy_(random(16, seed=100))
    codec.scale.copy_(random(16, seed=101).abs() + 0.5)
    return codec.eval().requires_grad_(False)


def test_normalise_and_back():
    raw = random(2, 16, 3, 4, 6)
    assert torch.allclose(denormalise(normalise(raw)), raw, atol=1e-6)
    assert torch.allclose(normalise(denormalise(raw)), raw, atol=1e-6)
    for c in (0, 7, 15):
        assert torch.allclose(normalise(raw)[:, c], (raw[:, c] - WAN_MEAN[c]) / WAN_STD[c])
    assert len(WAN_MEAN) == len(WAN_STD) == 16
    assert normalise(raw.bfloat16()).dtype == torch.bfloat16


def test_pixel_frames():
    assert [pixel_frames(t) for t in (0, 1, 2, 3, 21, 241)] == [0, 1, 5, 9, 81, 961]


@pytest.mark.parametrize("frames, latents", [(1, 1), (5, 2), (9, 3), (33, 9)])
@pytest.mark.parametrize("height, width", [(32, 48), (16, 64)])
def test_shapes(codec, frames, latents, height, width):
    raw = codec.encode(random(2, 3, frames, height, width).clamp(-1, 1))
    assert raw.shape == (2, 16, latents, height // 8, width // 8)
    pixels = codec.decode(raw)
    assert pixels.shape == (2, 3, frames, height, width)
    assert pixels.min() >= -1 and pixels.max() <= 1


@pytest.mark.parametrize("shape", [(4, 32, 48), (2, 32, 48), (5, 30, 48), (5, 32, 44)])
def test_other_shapes_are_refused(codec, shape):
    frames, height, width = shape
    with pytest.raises(ValueError, match=f"{frames} frames of {width} x {height}"):
        codec.encode(torch.zeros(1, 3, *shape))


def test_the_latent_space_is_wans(codec):
    """encode gives VAE space: normalised, it is the codec's own standardised space."""
    pixels = random(1, 3, 5, 16, 16).clamp(-1, 1)
    art = torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 2, 2)).movedim(1, -1)
    assert torch.allclose(normalise(codec.encode(pixels)), codec.encode_art(art), atol=1e-5)


def test_dct_rows_keep_what_they_should():
    transform = dct_transform()
    assert transform.shape == (16, 48)
    assert torch.allclose(transform @ torch.linalg.pinv(transform), torch.eye(16).double(), atol=1e-9)
    white = torch.ones(48).double()
    assert (transform @ white).abs().gt(1e-4).nonzero().flatten().tolist() == [0], "grey is one luma coefficient"


CHUNKINGS = [(1,) * 7, (3, 3, 1), (3, 4), (1, 6), (2, 2, 3), (6, 1)]


def test_streaming_is_decoding_at_once_to_a_rounding_error(codec):
    raw = random(1, 16, 7, 4, 6)
    whole = codec.decode(raw)
    for chunking in CHUNKINGS:
        streamed = torch.cat(list(codec.decode_stream(raw.split(chunking, dim=2))), dim=2)
        assert torch.allclose(streamed, whole, atol=1e-5)


@pytest.mark.parametrize("built_in", [False, True])
def test_every_chunking_is_the_same_bit_for_bit(codec, built_in):
    codec, raw = load_demo_codec() if built_in else codec, random(1, 16, 7, 8, 16)
    whole = codec.decode(raw)
    for chunking in CHUNKINGS:
        parts = list(codec.decode_stream(raw.split(chunking, dim=2)))
        assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunking)]
        assert torch.equal(torch.cat(parts, dim=2), whole), chunking


def test_later_latents_do_not_change_earlier_frames(codec):
    raw = random(1, 16, 6, 4, 6)
    before = codec.decode(raw)
    raw[:, :, 4:] = 9
    after = codec.decode(raw)
    assert torch.equal(after[:, :, : pixel_frames(4)], before[:, :, : pixel_frames(4)])
    assert not torch.equal(after[:, :, pixel_frames(4) :], before[:, :, pixel_frames(4) :])


def test_a_latent_holds_nothing_of_the_future(codec):
    pixels = random(1, 3, 13, 16, 16).clamp(-1, 1)
    before = codec.encode(pixels)
    pixels[:, :, 9:] = 0
    assert torch.equal(codec.encode(pixels)[:, :, :3], before[:, :, :3])


def test_an_endless_stream_is_decoded_as_it_comes(codec):
    def endless():
        while True:
            yield torch.zeros(1, 16, 3, 4, 6)

    stream = codec.decode_stream(endless())
    assert [next(stream).shape[2] for _ in range(4)] == [9, 12, 12, 12]


class FakeWanVae(nn.Module):
    """Wan's decoder as far as streaming goes: a cache of the last two frames of what it was given, and its trap.

    Frame t of the output is drawn from latents t - 2 .. t. The cache holds what a single call brought, so one latent
    frame after another would lose the frame before (docs/method.md, Codecs).
    """

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Identity()
        self.calls = []

    def decoder(self, x, feat_cache, feat_idx):
        self.calls.append(x.shape[2])
        before = feat_cache[0]
        history = x if before is None else torch.cat([before, x], dim=2)
        padded = torch.cat([torch.zeros_like(x[:, :, :1])] * 2 + [history], dim=2)
        count = x.shape[2]
        smooth = padded[:, :, -count:] + padded[:, :, -count - 1 : -1] + padded[:, :, -count - 2 : -2]
        feat_cache[0] = x[:, :, -2:] if before is None or count > 1 else torch.cat([before[:, :, -1:], x], dim=2)
        return smooth[:, :3] if before is None else smooth[:, :3].repeat_interleave(4, dim=2)


@pytest.mark.parametrize("chunking", [(7,), (3, 3, 1), (1,) * 7, (3, 4), (2, 5), (4, 3)], ids=str)
def test_wan_streams_feed_pairs_after_the_first_frame(chunking):
    raw = random(1, 16, 7, 4, 6)
    vae = FakeWanVae()
    video = torch.cat(list(decode_wan_stream(vae, raw.split(chunking, dim=2), num_caches=1)), dim=2)
    assert video.shape[2] == pixel_frames(7)
    assert vae.calls == [1, 2, 2, 2]
    expected = torch.cat(list(decode_wan_stream(FakeWanVae(), [raw], num_caches=1)), dim=2)
    assert torch.equal(video, expected)


def test_an_odd_last_frame_of_a_wan_stream_is_decoded():
    vae = FakeWanVae()
    parts = list(decode_wan_stream(vae, random(1, 16, 6, 4, 6).split(3, dim=2), num_caches=1))
    assert sum(part.shape[2] for part in parts) == pixel_frames(6) and vae.calls == [1, 2, 2, 1]
    assert list(decode_wan_stream(vae, [], num_caches=1)) == []
