"""What once escaped the drill, each as its smallest example."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.memory import empty_memory as empty
from context_forcing.memory.fields import MAX_BRIEF, brief, one_line
from context_forcing.memory.files import read_text
from context_forcing.model.checkpoints.containers import open_container
from context_forcing.model.segment import generate_segment
from context_forcing.train.data.sources import list_sources
from context_forcing.train.evaluation.evaluate import MAX_GAP, MAX_ROLLOUTS, EvaluatedStudent, Plan
from context_forcing.train.presets import load_config
from context_forcing.video.jobs import parse_jobs
from context_forcing.video.storyboard import parse_storyboard

from .drill import bounded, is_line


def line_of(action):
    """The line of a refusal, as a command prints it."""
    with pytest.raises(ValueError) as caught, bounded("escapes"):
        action()
    line = one_line(caught.value)
    assert is_line(line), line
    return line


def test_a_setting_that_contains_itself():
    assert line_of(lambda: load_config("pretrain", "smoke", ["batch=&a [*a]"])).startswith("batch: [[[")


@pytest.mark.parametrize("name", ["", ":"])
def test_a_setting_without_a_name(name):
    assert line_of(lambda: load_config("pretrain", "smoke", [f"{name}=0"])).startswith(f"'{name}': unknown key")


def test_a_file_with_a_blank_name():
    assert line_of(lambda: open_container(" ")) == "'': no such file"


@pytest.mark.parametrize("spec", [".99999999f", "9999999999", ">{seed}", "c", "%"])
def test_a_pattern_that_is_a_name_of_any_size(spec):
    line = line_of(lambda: parse_jobs({"output": f"{{seed:{spec}}}.mp4", "stories": ["a.yaml"]}))
    assert line.startswith("output: ") and "write {seed:04}" in line


@pytest.mark.parametrize("pattern", ["{seed:04}.mp4", "{number:3}-{story}.mp4", "{seed:02d}.MP4"])
def test_a_pattern_with_a_width(pattern):
    assert parse_jobs({"output": pattern, "stories": ["a.yaml"]}).output == pattern


def test_a_line_that_commands_the_terminal():
    assert line_of(lambda: parse_storyboard("\x1b[2Jx")).startswith('line 1 ("[2Jx"): it must begin with a time')


def test_what_a_message_quotes_can_be_printed():
    assert brief("a\x1b[2J\u2028\udce9b") == "a [2J b" and len(brief("\x1b" + "x" * 999)) == MAX_BRIEF


def test_a_name_of_any_length_for_load_memory(node_module, tmp_path, monkeypatch):
    module = node_module("save_load")
    monkeypatch.setattr(module.folder_paths, "annotated_filepath", lambda name: (name, str(tmp_path)))
    answer = module.ContextForcingLoadMemory.validate_inputs("x" * 5000)
    assert is_line(f"file: {answer}") and "does not exist; select a file" in answer


@pytest.mark.parametrize("field, value", [("gaps", (2**48,)), ("rollouts", 10**9), ("long_rollouts", 10**9)])
def test_an_evaluation_of_any_size(field, value):
    assert max(MAX_GAP, MAX_ROLLOUTS) < 10**6
    students = (EvaluatedStudent(name="demo", path=None, policies=("novel",)),)
    assert field in line_of(lambda: Plan(students=students, **{field: value}))


def test_a_field_that_is_too_large_for_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(f"path,caption\na.mp4,{'x' * 200_000}\n")
    assert "a.csv: line 2 is not a row (field larger than" in line_of(lambda: list_sources(tmp_path / "a.csv"))


def test_a_text_that_is_too_large(tmp_path):
    (tmp_path / "story.yaml").write_bytes(b"#" * (2**20 + 1))
    assert line_of(lambda: read_text(tmp_path / "story.yaml", most=2**20)).endswith(
        "more than 1 MiB of text; make it smaller"
    )
    assert len(read_text(tmp_path / "story.yaml")) == 2**20 + 1


def test_line_ends_of_any_system(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt", "utf-8-sig") == "a\nb\nc\n"


def test_a_memory_with_a_text_of_another_width(net, make_sampler, empty_memory):
    """Nobody knows the width of a student when a memory is read."""
    text, other = torch.ones(1, 5, 32), torch.ones(1, 5, 7)

    def go(memory, **how):
        sampler = lambda text: make_sampler(net, text=text)
        how = dict(prompt="x", seed=1, num_chunks=2, sigmas=(1.0,)) | how
        return [*generate_segment(sampler, memory, text, **how)][-1]

    memory = dataclasses.replace(go(empty_memory()), text=other)
    assert line_of(lambda: go(memory, blend=1)).startswith("blend: embeddings of widths 7 and 32")
    assert line_of(lambda: go(memory.compact())).startswith("text: embeddings of width 7, the student's is 32")


@pytest.mark.parametrize("size, words", [((16, 5, 6), "height 40 is not"), ((8, 4, 6), "8 latent channels")], ids=str)
def test_a_memory_of_a_size_that_no_student_has(net, make_sampler, size, words):
    assert words in line_of(lambda: make_sampler(net).prepare(empty(MemoryConfig(), size)))
