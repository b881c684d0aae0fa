"""Student files: read back exactly with their card, or refused in one line."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from context_forcing.memory import MemoryConfig
from context_forcing.model.checkpoints.published import transformer_config
from context_forcing.model.checkpoints.student import DEMO_STUDENT, StudentSource
from context_forcing.model.codecs.demo_vae import DEMO_CODEC, load_demo_codec
from context_forcing.model.config import CARD_KEY, StudentCard
from context_forcing.model.fingerprint import fingerprint

CARD = StudentCard(
    name="tiny",
    base="demo",
    stage="test",
    steps=(1000.0, 500.0),
    shift=3.0,
    memory=MemoryConfig(sink=1, slow=2, fast=4, chunk=2, window=9, policy="clean", slow_similarity_threshold=0.9),
    fps=12,
    size=(48, 32),
    revision="abc",
    data="none",
    data_seed=4,
    train_steps=10,
    train_seconds=1.5,
)


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(text_len=512)


@pytest.fixture
def path(net, tmp_path, save_student):
    save_student(tmp_path / "student.safetensors", net, CARD)
    return tmp_path / "student.safetensors"


def rewrite(path, edit_tensors=lambda tensors: None, edit_metadata=lambda metadata: None):
    with safe_open(path, "pt") as f:
        metadata, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    edit_tensors(tensors)
    edit_metadata(metadata)
    save_file(tensors, path, metadata)


def refused(path):
    with pytest.raises(ValueError) as caught:
        StudentSource(path).open().load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(net, path):
    student = StudentSource(path).open()
    loaded, card = student.load(), student.card
    assert card == CARD and StudentSource(path).open().card == CARD
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(net.config)
    ours, theirs = net.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_says_to_comfyui_what_it_cannot_guess(path):
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    assert json.loads(metadata["config"])["transformer"] == {"num_heads": 2, "causal_ar": True}
    assert transformer_config(metadata)["num_heads"] == 2
    assert json.loads(metadata[CARD_KEY])["memory"]["policy"] == "clean"


def test_dtype(path):
    loaded = StudentSource(path).open().load(torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_built_in_student_and_codec():
    student = StudentSource().open()
    net, card = student.load(), student.card
    assert card.base == "demo" and DEMO_STUDENT.is_file() and DEMO_CODEC.is_file()
    assert net.config.text_dim == 4096 and card.memory.sink + card.memory.slow + card.memory.fast <= card.memory.window
    assert load_demo_codec().mean.shape == (16,)


def test_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "none.safetensors")


@pytest.mark.parametrize("part", [0, 5, 100, 0.5, 0.999])
def test_truncated(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    assert path.name in refused(path)


def test_not_a_wan_model(path):
    rewrite(path, lambda t: (t.clear(), t.update({"model.layers.0.weight": torch.zeros(4, 4)})))
    assert "not a Wan 2.1 model" in refused(path)


def test_image_to_video_and_other_channel_counts_are_refused(path):
    original = path.read_bytes()
    for edit in (
        lambda t: t.update({"patch_embedding.weight": torch.zeros(64, 36, 1, 2, 2)}),
        lambda t: t.update({"patch_embedding.weight": torch.zeros(64, 48, 1, 2, 2)}),
        lambda t: t.update({"img_emb.proj.0.weight": torch.zeros(64)}),
    ):
        path.write_bytes(original)
        rewrite(path, edit)
        assert "only text-to-video" in refused(path)


@pytest.mark.parametrize(
    "key, edit",
    [
        ("blocks.1.self_attn.q.weight", lambda t: t.pop("blocks.1.self_attn.q.weight")),
        ("blocks.1.extra", lambda t: t.update({"blocks.1.extra": torch.zeros(1)})),
        ("head.head.bias", lambda t: t.update({"head.head.bias": torch.zeros(63)})),
        ("blocks.0.ffn.2.weight", lambda t: t.update({"blocks.0.ffn.2.weight": torch.zeros(128, 64)})),
    ],
)
def test_missing_extra_and_reshaped_tensors(path, key, edit):
    rewrite(path, edit)
    assert key in refused(path)


def test_a_missing_block_is_refused(path):
    rewrite(path, lambda t: [t.pop(key) for key in list(t) if key.startswith("blocks.0.") and "ffn.0" not in key])
    assert "blocks.0." in refused(path)


@pytest.mark.parametrize("key", ["blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight"])
def test_tensors_with_too_few_dims(path, key):
    rewrite(path, lambda t: t.update({key: torch.tensor(1.0)}))
    assert key in refused(path)


@pytest.mark.parametrize("heads", [3, 64])
def test_heads_that_do_not_fit(path, heads):
    rewrite(path, edit_metadata=lambda m: m.update(config=json.dumps({"transformer": {"num_heads": heads}})))
    assert f"num_heads: {heads}" in refused(path)


def test_heads_that_are_no_number(path):
    rewrite(path, edit_metadata=lambda m: m.update(config=json.dumps({"transformer": {"num_heads": "two"}})))
    refused(path)


def edit_card(path, **fields):
    def edit(metadata):
        metadata[CARD_KEY] = json.dumps({**json.loads(metadata[CARD_KEY]), **fields})

    rewrite(path, edit_metadata=edit)


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(future=1), "future"),
        (dict(memory=dict(sinks=3)), "sinks"),
        (dict(memory=dict(chunk=0)), "chunk"),
        (dict(memory=dict(policy="newest")), "newest"),
    ],
)
def test_a_card_that_is_not_understood(path, fields, word):
    edit_card(path, **fields)
    assert word in refused(path)


@pytest.mark.parametrize(
    "fields",
    [dict(steps=5), dict(size=16), dict(size=[16]), dict(steps=[]), dict(steps=["a"]), dict(memory=3), dict(fps=0),
     dict(fps="16"), dict(shift=0), dict(size=[40, 32]), dict(memory=dict(sink="3"))],
    ids=str,
)  # fmt: skip
def test_a_card_with_impossible_values(path, fields):
    edit_card(path, **fields)
    refused(path)


@pytest.mark.parametrize("text", ["", "not json", "[]", "3"])
def test_a_card_that_is_no_card(path, text):
    rewrite(path, edit_metadata=lambda m: m.update({CARD_KEY: text}))
    refused(path)


@pytest.mark.parametrize("text", ["not json", '{"future": 1}'])
def test_refusals_of_a_card_name_the_file(path, text):
    rewrite(path, edit_metadata=lambda m: m.update({CARD_KEY: text}))
    assert path.name in refused(path)


def test_a_card_round_trips_through_json():
    assert StudentCard.from_json(CARD.to_json()) == CARD
    assert StudentCard.from_json("{}") == StudentCard()


def test_equal_weights_have_equal_fingerprints(net, make_net, path):
    name = fingerprint(net)
    assert name == fingerprint(make_net(text_len=512)) == fingerprint(StudentSource(path).open().load())
    assert len(name) == 16
    assert name != fingerprint(make_net(seed=1, text_len=512))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_student_has_one_name_in_every_precision(make_net, dtype):
    net = make_net()
    name = fingerprint(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.to(torch.float16).to(dtype)
    assert fingerprint(net) == name


def test_a_few_more_steps_make_another_student(make_net):
    """Every weight a thousandth off, as after a little training: another name. So with any one tensor turned round."""
    net = make_net()
    name = fingerprint(net)
    for key, parameter in net.named_parameters():
        kept = parameter.data.clone()
        parameter.data = -kept
        assert fingerprint(net) != name or not kept.any(), key
        parameter.data = kept
    assert fingerprint(net) == name
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 1e-3 * parameter.data.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    assert fingerprint(net) != name


@pytest.mark.parametrize("edit", ["missing", "extra", "reshaped"])
def test_a_damaged_codec_is_refused_in_one_line(tmp_path, edit):
    state = load_demo_codec().state_dict()
    if edit == "missing":
        state.pop("draw.bias")
    else:
        state["draw.bias" if edit == "reshaped" else "extra"] = torch.zeros(3)
    save_file(state, tmp_path / "codec.safetensors")
    with pytest.raises(ValueError) as caught:
        load_demo_codec(tmp_path / "codec.safetensors")
    assert "\n" not in str(caught.value)


def test_a_student_is_no_codec(path):
    with pytest.raises(ValueError, match="not a demo codec"):
        load_demo_codec(path)
