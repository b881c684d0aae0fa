"""Sets encoded with Wan's VAE and text encoder, against diffusers and transformers."""

import json
import shutil

import pytest
import torch

from context_forcing.model.codecs.base import WAN_MEAN, WAN_STD
from context_forcing.train.data.encode import EncodeSettings, SetEncoder, load_encoder
from context_forcing.train.data.manifest import read_manifest
from context_forcing.train.data.shards import EncodedSet
from context_forcing.train.presets import load_config
from context_forcing.video.reading import read_runs

from .videos import CAPTION, CLIP, run, tensors


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"ftfy is not installed; pip install 'context-forcing\[wan\]'"):
        load_encoder(EncodeSettings(model=str(tmp_path)), with_vae=False)


VOCABULARY = "a meadow by day the camera pans right & snow at night".split()


def make_tiny_wan(folder):
    """Wan's VAE and UMT5 as libraries write them, tiny and random."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    vae.save_pretrained(folder / "vae")
    sizes = dict(vocab_size=32, d_model=4096, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder / "text_encoder")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *VOCABULARY])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory):
    for library in ("diffusers", "transformers", "ftfy"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder)
    return folder


WAN = dict(frames=4, size=(64, 48))


@pytest.mark.slow
def test_wan_latents_and_text_are_what_the_libraries_give(tiny_wan, whole_videos, tmp_path):
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    run(whole_videos, tmp_path / "set", EncodeSettings(model=str(tiny_wan), **WAN))
    manifest = read_manifest(tmp_path / "set")
    assert len(manifest.entries) == 6 and manifest.header.model == tiny_wan.name
    latents, text = tensors(tmp_path / "set", manifest.entries[1])

    vae = AutoencoderKLWan.from_pretrained(tiny_wan / "vae").eval()
    runs = list(read_runs(whole_videos / "a.mp4", CLIP, (64, 48), 16))
    pixels = torch.from_numpy(runs[1].copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    torch.testing.assert_close(latents.float(), ((raw - mean) / std)[0], atol=1e-3, rtol=1e-3)

    umt5 = UMT5EncoderModel.from_pretrained(tiny_wan / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_wan / "tokenizer")
    padded = tokenizer(CAPTION, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = umt5(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state[0]
    length = int(padded.attention_mask.sum())
    assert len(text) == length < 512
    torch.testing.assert_close(text.float(), rows[:length], atol=2e-3, rtol=2e-3)
    negative = EncodedSet(tmp_path / "set", 0).negative(load_config("local", "wan2.1-1.3b").negative_prompt)
    assert negative.shape[1] > 1, "Wan's own negative prompt is in the set"
    assert EncodedSet(tmp_path / "set", 0).sample(5)[0].shape == (1, 16, 4, 6, 8)
    assert len(load_encoder(EncodeSettings(model=str(tiny_wan)), False).text("day " * 600)) == 512


@pytest.mark.slow
def test_a_wan_folder_with_something_else_in_it_is_refused(tiny_wan, whole_videos, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import UMT5Config, UMT5EncoderModel

    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            SetEncoder(whole_videos, tmp_path / "set", EncodeSettings(model=str(folder), **WAN))
        assert not (tmp_path / "set").exists()

    other = shutil.copytree(tiny_wan, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "quant_conv.weight"}, weights)
    refused(other, "tensors missing, extra or of another shape, first conv1.weight")
    save_file(state, weights)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 16}))
    refused(other, "latents_mean is not that of Wan 2.1's VAE")
    (other / "vae" / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(other, "not a complete safetensors file")
    save_file(state, weights)
    small = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(small).save_pretrained(other / "text_encoder")
    refused(other, "text_encoder: has width 32, Wan 2.1 takes 4096")
    shutil.rmtree(other / "tokenizer")
    refused(other, "has no folder tokenizer")
