"""A file that is given in the place of another: the message says what it is, and which option takes it."""

import pytest
import yaml
from PIL import Image

from context_forcing.memory import MemoryConfig
from context_forcing.memory.memory import empty_memory
from context_forcing.memory.snapshot import save_memory

STORY = {"size": [48, 32], "segments": [{"prompt": "A meadow by day.", "seconds": 0.75}]}
MEMORY = "give the file of --memory-out"
MISTAKES = {
    "report nope": "nope: no such file",
    "report runs": f"runs: is a folder; {MEMORY}",
    "report runs -o x.png": f"runs: is a folder; {MEMORY}",
    "report a.yaml": f"a.yaml: not a memory file; {MEMORY}",
    "report a.yaml -o x.png": f"a.yaml: not a memory file; {MEMORY}",
    "report a.png": f"a.png: is a picture; {MEMORY}",
    "report tiny.safetensors": "tiny.safetensors: not a memory file, it has no context_forcing_memory header; give",
    "report a.memory": "--output: a.memory is drawn as a picture; give -o",
    "generate a.yaml -o b.mp4 --student tiny.safetensors --memory-in a.mp4": f"a.mp4: is a video; {MEMORY}",
    "generate a.mp4 -o b.mp4": "a.mp4: is a video; a story is a text file; did you mean --like?",
    "generate a.memory -o b.mp4": "a.memory: is a memory file; a story is a text file; did you mean --memory-in?",
    "generate a.yaml -o b.mp4 --student a.memory": "a.memory: is a memory file, not a model; give a file of weights",
    "convert a.memory -o b.safetensors": "a.memory: is a memory file, not a model; give a file of weights",
    "batch a.mp4": "a.mp4: is a video; give a text file",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_file_in_the_place_of_another_is_named(line, run, refused, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "tiny.safetensors").symlink_to(student)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(STORY))
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0 ftypisom\0\0\2\0isomiso2avc1mp41\0\0\0\x08free")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    save_memory(tmp_path / "a.memory", empty_memory(MemoryConfig(), (16, 4, 6)))
    refused(run(*line.split()), MISTAKES[line])


def test_looking_at_a_memory(run, tmp_path):
    save_memory(tmp_path / "a.memory", empty_memory(MemoryConfig(), (16, 4, 6)))
    assert run("convert", "--inspect", tmp_path / "a.memory")[0] == 2
    assert "is a memory file, not a model" in " ".join(run.out.split())


BAD_TEXTS = {
    "": "story: is empty; known keys are segments",
    "segments:\n  - prompt: A tower: red\n    seconds: 3": "put a text with a colon, such as a prompt, in quotes",
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_stories_that_are_not_yaml_yet(text, run, refused, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    refused(run("generate", tmp_path / "a.yaml", "-o", tmp_path / "a.mp4"), BAD_TEXTS[text])


@pytest.mark.parametrize(
    "setting, kind",
    [("steps=three", "a whole number"), ("shift=x", "a number"), ("data=3", "text"), ("recompute=3", "true or false")],
)
def test_settings_of_another_type(run, refused, setting, kind):
    name, value = setting.split("=")
    refused(run("train", "pretrain", setting, "--dry-run"), f"{name}: ", value, f"is not {kind}")


def test_a_policy_without_slow_frames_has_no_effect(run, student, tmp_path, succeeded, caplog):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(STORY))
    command = ("generate", tmp_path / "a.yaml", "--student", student, "--device", "cpu", "--slow", 0)
    succeeded(run(*command, "-o", tmp_path / "a.mp4"))
    assert "has no effect" not in caplog.text
    succeeded(run(*command, "-o", tmp_path / "b.mp4", "--policy", "recall"))
    assert "--policy: recall has no effect, this memory has no slow frames; give --slow" in caplog.text
