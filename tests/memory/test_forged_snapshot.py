"""A memory of a stranger whose digest is right: anybody can compute one. What cannot be is refused all the same."""

import pytest
import torch

from context_forcing.memory.snapshot import load_memory, save_memory

from .conftest import SIZES
from .test_snapshot import refused, rewrite


@pytest.mark.parametrize("pair", [[0, 1, 0.5], [1, 1, 0.5], [9, 3, 0.5], [3, 9, float("nan")], [3, 9, 2]], ids=repr)
def test_forged_similarities_are_refused(path, memory, pair):
    slow = memory.slots.slow
    older, newer = (slow[0] if n == 3 else slow[1] if n == 9 else n for n in pair[:2])
    rewrite(path, lambda header: header.update(similarities=[[older, newer, pair[2]]]), forge=True)
    assert "similarities has an impossible value" in refused(path)


FORGERIES = {
    "unknown form": (lambda h: h.update(form="loose"), "form"),
    "negative chunk": (lambda h: h.update(chunks=[12, -2]), "chunks"),
    "frame twice": (lambda h: h["slots"]["slow"].__setitem__(0, h["slots"]["sink"][0]), "slots"),
    "no likeness": (lambda h: h["slots"].update(likeness=[]), "likeness"),
    "unknown slots": (lambda h: h["slots"].update(medium=[]), "slots"),
    "student as number": (lambda h: h.update(student=5), "student"),
    "scene as text": (lambda h: h.update(scene_begins="no"), "scene_begins"),
    "size as fraction": (lambda h: h.update(latent_size=[16, 4.0, 6]), "latent_size"),
    "chunk as fraction": (lambda h: h.update(chunks=[2.0] * 5), "chunks"),
    "prompt as number": (lambda h: h["segments"][0].__setitem__(1, 5), "segments"),
    "prompt as nothing": (lambda h: h["segments"][0].__setitem__(1, None), "segments"),
    "seed as text": (lambda h: h["segments"][0].__setitem__(2, "one"), "segments"),
    "unknown change": (lambda h: h["segments"][0].__setitem__(3, "fade"), "segments"),
    "segment as text": (lambda h: h["segments"][0].__setitem__(0, "zero"), "segments"),
    "decision as text": (lambda h: h["decisions"][0].__setitem__(1, "yes"), "decisions"),
    "decided frame as text": (lambda h: h["decisions"][0].__setitem__(0, "3"), "decisions"),
    "similarity as text": (lambda h: h["decisions"][0].__setitem__(2, "high"), "decisions"),
    "similarity NaN": (lambda h: h["decisions"][0].__setitem__(2, float("nan")), "decisions"),
    "evicted as list": (lambda h: h["decisions"][0].__setitem__(3, [1]), "decisions"),
    "likeness as text": (lambda h: h["slots"]["likeness"].__setitem__(0, "high"), "likeness"),
    "slot as fraction": (lambda h: h["slots"]["slow"].__setitem__(0, 1.5), "slow"),
    "size without end": (lambda h: h.update(latent_size=[16, 2**62, 2**62]), "latent_size"),
    "more chunks": (lambda h: h.update(chunks=[1] * 10), "chunks"),
    "more slow frames": (lambda h: h["config"].update(slow=1, window=7), "slots"),
    "more fast frames": (lambda h: h["config"].update(fast=3), "slots"),
    "similarity above 1": (lambda h: h["decisions"][0].__setitem__(2, 10**400), "decisions"),
}


@pytest.mark.parametrize("edit, name", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_header_with_a_right_digest(path, edit, name):
    rewrite(path, edit, forge=True)
    assert f"{name} has an impossible value" in refused(path, "")


def test_frames_that_the_film_does_not_have(path):
    original = path.read_bytes()
    for edit in (
        lambda h: h["decisions"][0].__setitem__(0, 5000),
        lambda h: h["decisions"][0].__setitem__(3, 5000),
        lambda h: h["segments"][0].__setitem__(0, 5000),
        lambda h: h["segments"].append([0, "earlier", 1, "keep"]) or h["segments"][0].__setitem__(0, 2),
    ):
        path.write_bytes(original)
        rewrite(path, edit, forge=True)
        assert "in the film" in refused(path) or "the film does not have" in refused(path)


@pytest.mark.parametrize("number", [1, -1, 2.5, "0", True], ids=repr)
def test_a_text_that_is_not_in_the_file_is_refused(empty_memory, tmp_path, number):
    """The number of a segment's text comes from the header, and is looked up among the texts of the file."""
    text, path = torch.ones(1, 5, 32), tmp_path / "recall.safetensors"
    memory = empty_memory(**SIZES | {"policy": "recall"}).begin("one", 1, text)
    save_memory(path, memory)
    assert load_memory(path).texts[0].equal(text)
    rewrite(path, lambda header: header.update(texts=[number]), forge=True)
    assert ("damaged header" if repr(number) == "1" else "texts has an impossible value") in refused(path, "")


@pytest.fixture(scope="module")
def of_layers(continue_by, empty_memory):
    sizes = dict(sink=2, slow=2, fast=4, chunk=2, window=8, policy="released", slow_similarity_threshold=0.9999)
    memory = continue_by(empty_memory(**sizes).begin("a prompt", 5), 5)
    assert [len(layer.frames) for layer in memory.store.layers] == [8, 8]
    return memory


def in_layer(change):
    return lambda header: change(header["layers"][1])


FORGED_LAYERS = {
    "frames as text": (in_layer(lambda layer: layer.__setitem__(0, ["0"] * 8)), "layers has an impossible value"),
    "frames beyond the film": (in_layer(lambda layer: layer[0].__setitem__(3, 10**9)), "the film does not have"),
    "negative frame": (in_layer(lambda layer: layer[0].__setitem__(3, -1)), "layers has an impossible value"),
    "fewer frames": (in_layer(lambda layer: layer[0].pop()), "layers has an impossible value"),
    "more slow frames": (in_layer(lambda layer: layer.__setitem__(1, 3)), "layers has an impossible value"),
    "slow frames as truth": (in_layer(lambda layer: layer.__setitem__(1, True)), "layers has an impossible value"),
    "no layers": (lambda h: h.update(layers=[]), "layers has an impossible value"),
    "layers as number": (lambda h: h.update(layers=2), "layers has an impossible value"),
    "fewer slots": (lambda h: h["config"].update(slow=0), "layers has an impossible value"),
    "a scene": (lambda h: h.update(scene_begins=True), "scene_begins has an impossible value"),
}


@pytest.mark.parametrize("edit, words", FORGED_LAYERS.values(), ids=FORGED_LAYERS.keys())
def test_forged_layers_with_a_right_digest(of_layers, tmp_path, edit, words):
    path = tmp_path / "layers.safetensors"
    save_memory(path, of_layers)
    rewrite(path, edit, forge=True)
    assert words in refused(path, "")


@pytest.mark.parametrize("shape", [(1, 3), (64,), (2, 64), (0,)], ids=str)
def test_a_forged_descriptor_with_a_right_digest(of_layers, tmp_path, shape):
    path = tmp_path / "layers.safetensors"
    save_memory(path, of_layers)
    rewrite(path, edit_tensors=lambda tensors: tensors.update({"descriptor.1": torch.zeros(shape)}), forge=True)
    assert "tensors of layer 1 do not fit" in refused(path, "")


FLOATS_8 = (
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),
)


@pytest.mark.parametrize(
    "dtype", [*FLOATS_8, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64], ids=str
)
@pytest.mark.parametrize("name", ["film", "text", "text.0", "given", "keys.9", "values.0"])
def test_numbers_of_another_kind_with_a_right_digest(path, name, dtype):
    """Also those that torch does not calculate with."""

    def forge(tensors):
        tensors[name] = tensors.get(name, torch.ones(1, 5, 32)).to(dtype)

    rewrite(path, edit_tensors=forge, forge=True)
    assert f"damaged: {name} holds " in refused(path)


def test_eight_bits_and_their_scales(memory, tmp_path):
    """One byte a number has scales, keys as values; half precision has none, and all of it is of one kind."""
    path, packed = tmp_path / "packed.safetensors", memory.packed("int8")
    first, last = (f"keys.{frame}" for frame in (memory.slots.sink[0], memory.slots.fast[-1]))

    def after(edit):
        save_memory(path, packed)
        rewrite(path, edit_tensors=edit, forge=True)
        return refused(path)

    save_memory(path, packed)
    assert load_memory(path).store.slots == memory.slots
    assert f"{first} holds I8" in after(lambda tensors: tensors.pop(f"{first}.scales"))
    assert f"{first} holds F32" in after(lambda tensors: tensors.update({first: tensors[first].float()}))
    assert "differ in dtype" in after(
        lambda tensors: tensors.update({first: tensors[first].float()}) or tensors.pop(f"{first}.scales")
    )
    assert "differ in dtype" in after(lambda tensors: tensors.update({last: tensors[last].half()}))
    half = lambda tensors: tensors.update({f"{first}.scales": tensors[f"{first}.scales"].half()})
    assert f"{first}.scales holds F16" in after(half)


@pytest.mark.parametrize("name", ["text", "given"])
def test_forged_tensors_with_a_right_digest(path, name):
    rewrite(path, edit_tensors=lambda tensors: tensors.update({name: torch.zeros(3, 3)}), forge=True)
    assert f"{name} has an impossible value" in refused(path)
