"""UMT5: equal to transformers', every published file loads, prompts are read as Wan reads them, others are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from context_forcing.model.causal import embed_text
from context_forcing.model.codecs.umt5 import FROM_WAN, UMT5Encoder, clean_text, distance_buckets, load_umt5

pytest.importorskip("sentencepiece")
pytest.importorskip("ftfy")

CPU = torch.device("cpu")
PROMPT = "a meadow by day, the camera pans right"


@pytest.fixture
def file(models_dir):
    return models_dir / "text_encoders" / "umt5.safetensors"


@pytest.fixture
def rows(file):
    return load_umt5(file, CPU).encode([PROMPT])[0]


def test_the_full_size_has_umt5_xxls_tensors():
    """242 tensors of google/umt5-xxl's encoder, 5.68 billion numbers."""
    with torch.device("meta"):
        state = UMT5Encoder(256384, 4096, 4096, 64, 32, 10240, 24).state_dict()
    assert len(state) == 2 + 24 * 10 and sum(value.numel() for value in state.values()) == 5_680_910_336
    assert state["encoder.block.23.layer.1.DenseReluDense.wo.weight"].shape == (4096, 10240)


def test_transformers_agrees(file, umt5_state):
    """Padded to 512 and masked, as Wan calls it; also for prompts in which distances grow beyond 128."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=256, d_model=4096, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    theirs = transformers.UMT5EncoderModel(config).eval()
    theirs.load_state_dict(umt5_state, strict=False)
    ours = load_umt5(file, CPU)
    for prompt in (PROMPT, "snow at night " * 80):
        tokens = ours.tokens(prompt)
        padded = torch.tensor([tokens + [0] * (512 - len(tokens))])
        with torch.inference_mode():
            expected = theirs(padded, attention_mask=padded.ne(0)).last_hidden_state[0, : len(tokens)]
        (found,) = ours.encode([prompt])
        assert found.shape == (len(tokens), 4096) and expected.std() > 0.3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_buckets_are_t5s():
    buckets = distance_buckets(300, 32)
    assert buckets[0, :8].tolist() == [0, *range(17, 24)] and buckets[7, :8].tolist() == [*range(7, -1, -1)]
    assert buckets[0, 128:].eq(31).all() and buckets[299, :172].eq(15).all()
    assert buckets.min() == 0 and buckets.max() == 31


def test_prompts_together_are_prompts_apart(file):
    encoder = load_umt5(file, CPU)
    prompts = [PROMPT, "", "fog over a desert"]
    together = encoder.encode(prompts)
    assert [len(one) for one in together][1] == 1, "an empty prompt is its end"
    for prompt, one in zip(prompts, together):
        assert torch.equal(one, encoder.encode([prompt])[0])


def test_padding_is_left_to_the_student(net, rows):
    """Rows without padding, and rows with zeros behind: the same keys."""
    rows = rows[None, :12, :32]
    text, padded = embed_text(net, rows), embed_text(net, torch.cat([rows, torch.zeros(1, 4, 32)], dim=1))
    assert all(torch.equal(a, b) for a, b in zip(text.keys, padded.keys))


def test_text_is_cleaned_cut_and_ended(file, spiece, caplog):
    import sentencepiece

    encoder = load_umt5(file, CPU)
    plain = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode
    assert clean_text(" a  &amp;amp; b\n\tthe camÃ©ra ") == "a & b the caméra"
    assert encoder.tokens(" a\n  meadow&#44; ") == [*plain("a meadow,"), 1]
    assert not caplog.records
    long = "night " * 600
    assert encoder.tokens(long) == [*plain(clean_text(long))[:511], 1]
    assert "only the first 511 are used" in caplog.text


def test_wans_own_file_with_its_tokenizer_beside(umt5_state, spiece, rows, tmp_path):
    to_wan = {ours: wan for wan, ours in FROM_WAN.items()}
    outer = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    state = {}
    for key, value in umt5_state.items():
        name = key.removesuffix(".weight")
        if name not in outer:
            _, _, number, name = name.split(".", 3)
        wan = outer[name] if name in outer else f"blocks.{number}.{to_wan[name]}"
        state[f"{wan}.weight"] = value
    assert "blocks.1.ffn.gate.0.weight" in state and "blocks.0.pos_embedding.embedding.weight" in state
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    refused(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", "no tokenizer inside")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    assert torch.equal(load_umt5(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", CPU).encode([PROMPT])[0], rows)


def test_a_diffusers_folder_in_parts(umt5_state, spiece, rows, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    names = list(umt5_state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: umt5_state[name] for name in held}, folder / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece)
    for path in (folder, tmp_path):
        assert torch.equal(load_umt5(path, CPU).encode([PROMPT])[0], rows)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lists model-00002-of-00002.safetensors, which is not there"):
        load_umt5(folder, CPU)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_fp8(file, rows, tmp_path, spelling):
    """Both spellings of ComfyUI: the weights times their factors."""
    state, scaled, exact = load_file(file), {}, {}
    for key, value in state.items():
        if value.ndim == 2 and "layer" in key and "relative" not in key:
            scale = value.abs().max() / 448
            scaled[key] = (value / scale).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            scaled[f"{layer}.{spelling}"] = scale
            if spelling == "weight_scale":
                conf = json.dumps({"format": "float8_e4m3fn"}).encode()
                scaled[f"{layer}.comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
            exact[key] = scaled[key].float() * scale
        else:
            scaled[key] = exact[key] = value
    if spelling == "scale_weight":
        scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(scaled, tmp_path / "scaled.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    found = load_umt5(tmp_path / "scaled.safetensors", CPU).encode([PROMPT])[0]
    assert torch.equal(found, load_umt5(tmp_path / "exact.safetensors", CPU).encode([PROMPT])[0])
    assert 0 < (found - rows).norm() / rows.norm() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_weights_stay_as_they_are_stored_and_are_reckoned_with_in_float32(file, rows, tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}
    save_file(state, tmp_path / "half.safetensors")
    encoder = load_umt5(tmp_path / "half.safetensors", CPU)
    assert all(weight.dtype == dtype for weight in encoder.net.parameters())
    found = encoder.encode([PROMPT])[0]
    assert found.dtype == torch.float32 and 0 < (found - rows).norm() / rows.norm() < 0.2


def test_a_tokenizer_json_is_read_too(umt5_state, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *PROMPT.split()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.enable_truncation(3)
    save_file(umt5_state, tmp_path / "umt5.safetensors")
    (tmp_path / "tokenizer").mkdir()
    model.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert load_umt5(tmp_path / "umt5.safetensors", CPU).tokens("the camera sings day,") == [7, 8, 2, 6, 1]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    refused(tmp_path / "umt5.safetensors", "tokenizer.json: not the JSON of a tokenizer")


BLOCK1 = "encoder.block.1.layer."
REFUSED = {
    "a CLIP": (lambda s: {"text_model.embeddings": torch.zeros(2)}, "not a UMT5 encoder, shared.weight is missing"),
    "a T5": (
        lambda s: {k: v for k, v in s.items() if not (k.startswith(BLOCK1) and "relative" in k)},
        "a T5 without relative positions in every layer",
    ),
    "a smaller one": (lambda s: {**s, "shared.weight": torch.zeros(8, 64)}, "has width 64, Wan 2.1 takes 4096"),
    "a tensor missing": (
        lambda s: {k: v for k, v in s.items() if k != BLOCK1 + "1.DenseReluDense.wi_1.weight"},
        f"first {BLOCK1}1.DenseReluDense.wi_1.weight",
    ),
    "a decoder": (lambda s: {**s, "lm_head.weight": torch.zeros(2, 2)}, "first lm_head.weight"),
    "int8": (lambda s: {**s, BLOCK1 + "1.layer_norm.weight": torch.ones(4096).char()}, "is stored as torch.int8"),
    "other quantisation": (
        lambda s: {**s, "shared.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
        "shared is quantised as nvfp4",
    ),
    "no tokenizer": (lambda s: {**s, "spiece_model": torch.ones(9).byte()}, "not a SentencePiece model"),
    "more words than weights": (lambda s: {**s, "shared.weight": torch.zeros(3, 4096)}, "more words than the weights"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED.keys())
def test_others_are_refused_in_one_line(file, tmp_path, change, words):
    save_file(change(load_file(file)), tmp_path / "umt5.safetensors")
    refused(tmp_path / "umt5.safetensors", words)


def refused(path, words):
    with pytest.raises(ValueError) as error:
        load_umt5(path, CPU).encode([PROMPT])
    said = str(error.value)
    assert words in said and "\n" not in said, said


@pytest.mark.parametrize("library", ["ftfy", "sentencepiece", "tokenizers"])
def test_missing_libraries_are_named(file, monkeypatch, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    refused(file, f"{library} is not installed; pip install 'context-forcing[wan]'")
