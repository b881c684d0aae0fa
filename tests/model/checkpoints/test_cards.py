"""Which card a published file gets, what the cards say, and what messages name them."""

from pathlib import Path

import pytest
import torch

from context_forcing.model.checkpoints.locate import locate_student
from context_forcing.model.checkpoints.published import PUBLISHED, _hint, override
from context_forcing.model.checkpoints.student import StudentSource

from .published import LIVEWAN_OPTIONS, SIZES, comfyui_causal, diffusers_folder, flat, pickled, prefixed, refused


def test_a_file_that_does_not_say_is_taken_as_self_forcings_with_a_note(state, tmp_path, caplog):
    path = pickled(tmp_path, {"generator": prefixed(state, "model.")}, "longlive_base.pt")
    student = StudentSource(path).open()
    assert student.card.name == "self-forcing" and student.card.memory.window == 21
    for words in (str(path), "self-forcing", "1000 750 500 250", "Its name suggests longlive", "context-forcing"):
        assert words in student.note
    assert "may not be a causal student" not in student.note
    assert "may not be a causal student" in StudentSource(flat(tmp_path, state)).open().note
    StudentSource(path).open().load()
    assert [record.getMessage() for record in caplog.records] == [student.note]


def test_what_a_folder_says_decides(state, tmp_path):
    """A Self-Forcing scheduler, Wan's bidirectional class, a causal class."""
    base = diffusers_folder(tmp_path / "base", state, "WanTransformer3DModel", "UniPCMultistepScheduler")
    assert "bidirectional Wan 2.1" in refused(base) and "wan2.1-base" in refused(base)
    assert "not a causal student" in StudentSource(base, card="wan2.1-base").open().note
    told = diffusers_folder(tmp_path / "told", state, "WanTransformer3DModel", "SelfForcingFlowMatchScheduler")
    assert not StudentSource(told).open().note and StudentSource(told).open().config.num_heads == SIZES["num_heads"]
    causal = diffusers_folder(tmp_path / "causal", state, "CausalWanTransformer3DModel", "Other")
    assert "has no card" in StudentSource(causal).open().note and "may not be" not in StudentSource(causal).open().note


def test_the_figures_of_the_newer_cards():
    """As their authors run them: steps, shift, remembered frames before a chunk, chunk (docs/students.md)."""
    figures = {}
    for name in ("self-gradient-forcing", "self-gradient-forcing-framewise", "livewan", "causal-forcing-framewise"):
        card = PUBLISHED[name].card
        memory, sigmas = card.memory, tuple(round(sigma, 4) for sigma in card.sigmas)
        figures[name] = sigmas, memory.sink, memory.fast - memory.chunk, memory.chunk, memory.window, memory.policy
    four = (1.0, 0.9375, 0.8333, 0.625)
    assert figures == {
        "self-gradient-forcing": (four, 3, 6, 3, 12, "fifo"),
        "self-gradient-forcing-framewise": (four, 4, 16, 1, 21, "fifo"),
        "livewan": ((1.0, 0.5), 21, 6, 3, 30, "fifo"),
        "causal-forcing-framewise": (four, 3, 5, 1, 21, "novel"),
    }


def test_a_file_is_recognised_by_what_is_in_it(state, tmp_path):
    """A mark in the file decides, the name does not; another card can be asked for."""
    path = comfyui_causal(tmp_path, state).rename(tmp_path / "longlive.safetensors")
    student = StudentSource(path).open()
    assert student.card_choice.reason == "recognised by ComfyUI's mark causal_ar in its metadata"
    for words in ("used as causal-forcing-framewise", "chunk 1", "Its name suggests longlive.", "Choose with card"):
        assert words in student.note
    asked = StudentSource(path, card="self-forcing").open()
    assert asked.card.name == "self-forcing" and not asked.note
    live = pickled(tmp_path, {"model": state, "step": 1, "args": LIVEWAN_OPTIONS})
    note = StudentSource(live).open().note
    assert "steps 1000 500, shift 1, chunk 3, window 30" in note and "clip of 81 frames" in note
    other = pickled(tmp_path, {"model": state, "step": 1, "args": {"lr": 2e-6}}, "other.pt")
    assert StudentSource(other).open().card.name == "self-forcing"


def test_a_rolling_forcing_student_is_named(state, tmp_path):
    path = pickled(tmp_path, {"generator_ema": prefixed(state, "model.")}, "longvideo.pt")
    student = StudentSource(path).open()
    assert student.card.name == "self-forcing" and "whose chunks are denoised together" in student.note


def test_a_missing_or_unknown_file_names_the_known_students(state, tmp_path):
    says = [
        refused(tmp_path / "none.safetensors"),
        refused(pickled(tmp_path, {"generator": {"encoder.weight": torch.zeros(2, 2)}})),
        refused(flat(tmp_path, state | {"head.modulation": torch.zeros(3)})),
    ]
    with pytest.raises(ValueError) as caught:
        locate_student("none.safetensors", tmp_path)
    for message in (*says, str(caught.value)):
        assert all(name in message for name in PUBLISHED) and "docs/students.md" in message
    assert "no such file" in says[0] and "not a Wan 2.1 model" in says[1] and "has shape (3,)" in says[2]


def test_the_base_is_what_the_weights_are(state, tmp_path):
    path = flat(tmp_path, state)
    assert StudentSource(path, card="krea-14b").open().card.base == "wan2.1"
    assert StudentSource(path, card="krea-14b", overrides=("base=demo",)).open().card.base == "demo"


def test_the_released_weights_commit_over_fast_frames(state, tmp_path):
    """The best published choice (docs/memory.md); a note says so, and every other student attends to all."""
    student = StudentSource(flat(tmp_path, state), card="context-forcing").open()
    assert student.card.commit_attends == "fast only" and "commit pass attends to fast frames only" in student.note
    assert [name for name, known in PUBLISHED.items() if known.card.commit_attends != "all"] == ["context-forcing"]
    overridden = StudentSource(flat(tmp_path, state), card="context-forcing", overrides=("commit_attends=all",))
    assert overridden.open().card.commit_attends == "all"


@pytest.mark.parametrize(
    "text, words",
    [("stepps=3", "stepps: unknown key"), ("steps", "key=value"), ("memory.sinks=3", "sinks"), ("shift=a", "shift"),
     ("steps=500,1000", "must decrease"), ("memory.fast=99", "window"), ("chunk=two", "chunk")],
)  # fmt: skip
def test_what_cannot_be_replaced(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        override(PUBLISHED["self-forcing"].card, [text])
    assert str(caught.value).startswith("set: ") and "\n" not in str(caught.value)


def test_known_cards():
    """docs/students.md, Published files: chunk, steps, window, base."""
    cards = {name: known.card for name, known in PUBLISHED.items()}
    framewise = {name for name, card in cards.items() if card.memory.chunk == 1}
    assert framewise == {
        "causal-forcing-framewise", "causal-forcing-2step", "causal-forcing-1step", "self-gradient-forcing-framewise",
    }  # fmt: skip
    assert cards["causal-forcing-2step"].steps == (1000, 500) and cards["causal-forcing-1step"].steps == (1000,)
    assert all(cards[f"causal-forcing-{n}step"].first_steps == (1000, 750, 500, 250) for n in (1, 2))
    sizes = {name: (c.memory.sink, c.memory.slow, c.memory.fast, c.memory.window) for name, c in cards.items()}
    assert sizes["longlive"] == (3, 0, 9, 12) and sizes["infinite-forcing"] == (1, 0, 5, 6)
    assert sizes["context-forcing"] == (3, 12, 6, 21) and sizes["self-forcing"] == (3, 12, 6, 21)
    assert cards["context-forcing"].memory.policy == "released" and cards["self-forcing"].memory.policy == "novel"
    assert {name: card.shift for name, card in cards.items() if card.shift != 5} == {"wan2.1-base": 8, "livewan": 1}
    assert {name: card.match_sink for name, card in cards.items() if card.match_sink} == {"livewan": 1}
    assert [name for name, card in cards.items() if card.solver != "renoise"] == ["wan2.1-base"]
    assert cards["krea-14b"].base == "wan2.1-14b"
    assert {name for name, known in PUBLISHED.items() if known.weights == "generator"} == {
        "causal-forcing", "longlive", "memflow",
    }  # fmt: skip


def test_the_documentation_lists_every_card():
    """Chunk, steps and shift of docs/students.md, Published files, are those of the cards."""
    text = Path(__file__).parents[3].joinpath("docs/students.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:6] for row in text.split("## What decides")[0].splitlines() if row.startswith("| `")]
    listed = {name.strip(" `"): (int(chunk), int(steps.split(",")[0])) for name, _, chunk, steps, _ in rows}
    cards = {name: known.card for name, known in PUBLISHED.items()}
    assert listed == {name: (card.memory.chunk, len(card.steps)) for name, card in cards.items()}


@pytest.mark.parametrize("path, name", [
    ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
    ("causal-forcing++/framewise-2step.pt", "causal-forcing-2step"),
    ("causal-forcing++/framewise-1step.pt", "causal-forcing-1step"),
    ("chunkwise/causal_forcing.pt", "causal-forcing"),
    ("SFWan2.1-T2V/x.pt", "self-forcing"),
    ("causal_forcing-framewise.safetensors", "causal-forcing-framewise"),
    ("framewise/ar/model.pt", "self-gradient-forcing-framewise"),
    ("chunkwise/ar/model.pt", "self-gradient-forcing"),
    ("sgf_plus_framewise.safetensors", "self-gradient-forcing-framewise"),
    ("Self_Gradient_Forcing_Plus/chunkwise/model.pt", "self-gradient-forcing"),
    ("checkpoints/t14b_b64/latest.pt", "livewan"),
])  # fmt: skip
def test_a_path_suggests_the_kind_before_its_family(path, name):
    assert f"suggests {name}." in _hint(Path("/somewhere") / path, PUBLISHED["wan2.1-base"])
    assert not _hint(Path("/somewhere") / path, PUBLISHED[name])
