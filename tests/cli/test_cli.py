"""The command: films from stories, bit for bit the same however they are split; refusals in one line."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.snapshot import save_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import StudentCard
from context_forcing.model.fingerprint import fingerprint
from context_forcing.model.sampler import COMMIT_ATTENDS
from context_forcing.video.provenance import TAG, git_revision
from context_forcing.video.reading import read_tags

SEGMENT = {"prompt": "a meadow by day, the camera pans right", "seconds": 0.75}
STORY = {"size": [48, 32], "seed": 4, "segments": [SEGMENT]}
CHUNK = 0.75
"""Seconds."""


@pytest.fixture
def generate(run, student, tmp_path):
    """(story, output name, options) -> exit code, stderr."""

    def generate(story, output="film.mp4", *options, student=student):
        path = tmp_path / "story.yaml"
        path.write_text(story if isinstance(story, str) else yaml.safe_dump(story))
        return run("generate", path, "-o", tmp_path / output, "--student", student, *options)

    return generate


def story_of(*seconds):
    return {**STORY, "segments": [{**SEGMENT, "seconds": s} for s in seconds]}


def test_a_storyboard_is_the_story_of_its_lines(generate, run, student, tmp_path, succeeded):
    """The same memory, to the bit, as the YAML that says the same; a line that does not parse is named."""
    other = {"prompt": "a desert", "change": "cut", "seed": 7, "seconds": CHUNK}
    succeeded(generate({"segments": [SEGMENT, other]}, "yaml.mp4", "--memory-out", tmp_path / "yaml.memory"))
    board = tmp_path / "board.txt"
    board.write_text(f"0:00 {SEGMENT['prompt']}\n0.75 [cut seed=7] a desert\n1.5\n")
    arguments = ("generate", board, "-o", tmp_path / "txt.mp4", "--student", student)
    succeeded(run(*arguments, "--memory-out", tmp_path / "txt.memory"))
    by_yaml, by_lines = load_file(tmp_path / "yaml.memory"), load_file(tmp_path / "txt.memory")
    assert by_yaml.keys() == by_lines.keys() and all(torch.equal(by_yaml[key], by_lines[key]) for key in by_yaml)

    board.write_text("0:00 a meadow\n0:0x a desert\n0:09\n")
    code, err = run(*arguments)
    assert code == 2 and 'line 2 ("0:0x a desert")' in " ".join(err.split())


def test_a_chunk_is_nine_frames_at_scale(tmp_path, generate, frames_of, succeeded):
    err = succeeded(generate(STORY, "film.mp4", "--scale", 3))
    size, frames = frames_of(tmp_path / "film.mp4")
    assert size == (144, 96) and len(frames) == 9
    assert "9 frames" in " ".join(err.split()) and "rounded" not in err
    pixels = torch.frombuffer(bytearray(frames[4]), dtype=torch.uint8).view(96, 144, 3).float()
    blocks = pixels.unfold(0, 6, 6).unfold(1, 6, 6).flatten(-2)
    assert blocks.std(dim=-1).mean() < 0.25 * pixels.std(), "an art pixel is 2 pixels, enlarged 3 times"


def test_default_scale_brings_small_pictures_to_360(tmp_path, generate, frames_of, succeeded):
    succeeded(generate(STORY))
    assert frames_of(tmp_path / "film.mp4")[0] == (48 * 12, 32 * 12)


def test_the_built_in_student(tmp_path, generate, frames_of, succeeded):
    succeeded(generate({"segments": [SEGMENT]}, "demo.mp4", student="demo"))
    size, frames = frames_of(tmp_path / "demo.mp4")
    assert size == (768, 384) and len(frames) == 9


def test_splitting_changes_nothing(generate, tmp_path, frames_of, succeeded):
    """9 s at once, and three times 3 s: the same film and the same pictures."""
    films = {}
    for name, seconds in {"one": (9,), "three": (3, 3, 3)}.items():
        memory = tmp_path / f"{name}.safetensors"
        succeeded(generate(story_of(*seconds), f"{name}.mp4", "--memory-out", memory, "--scale", 2))
        films[name] = load_file(memory), frames_of(tmp_path / f"{name}.mp4")
    (one, one_video), (three, three_video) = films["one"], films["three"]
    assert one["film"].shape[2] == 36 and len(one_video[1]) == 141
    assert one.keys() == three.keys() and all(torch.equal(one[key], three[key]) for key in one)
    assert one_video == three_video


@pytest.mark.slow
def test_new_processes_with_a_save_between_change_nothing(student, tmp_path, frames_of):
    """Every process as a user starts it: bits depend on the number of threads, which pytest's own process has set."""

    def generate_anew(story, name, *options):
        (tmp_path / "story.yaml").write_text(yaml.safe_dump(story))
        command = [sys.executable, "-c", "from context_forcing.cli import main; main()", "generate", "story.yaml"]
        command += ["-o", f"{name}.mp4", "--student", student, "--memory-out", f"{name}.safetensors", "--scale", "2"]
        done = subprocess.run([*map(str, command), *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    generate_anew(story_of(9), "whole")
    for part in range(3):
        generate_anew(story_of(3), part, *(["--memory-in", f"{part - 1}.safetensors"] if part else []))
    a, b = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "2.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert frames_of(tmp_path / "whole.mp4") == frames_of(tmp_path / "2.mp4")


def test_the_film_depends_on_seed_prompt_and_memory_settings(generate, tmp_path, succeeded):
    def film(story, *options):
        memory = tmp_path / "memory.safetensors"
        succeeded(generate(story, "film.mp4", "--memory-out", memory, "--scale", 1, *options))
        return load_file(memory)["film"]

    base = film(story_of(6))
    assert torch.equal(film(story_of(6)), base)
    assert not torch.equal(film(story_of(6), "--seed", 5), base)
    assert torch.equal(film({**story_of(6), "seed": 5}, "--seed", 4), base)
    assert not torch.equal(film(story_of(6), "--slow", 0), base)
    assert not torch.equal(film(story_of(6), "--policy", "uniform"), base)
    window = film(story_of(6), "--memory", "longlive")
    assert not torch.equal(window, base)
    assert torch.equal(film(story_of(6), "--memory", "slow-fast", "--slow", "4"), film(story_of(6), "--slow", "4"))
    assert not torch.equal(film(story_of(6), "--threshold", -1), base)
    assert not torch.equal(film({**STORY, "segments": [{"prompt": "snow at night", "seconds": 6}]}), base)


def test_sampler_options(generate, tmp_path, succeeded):
    """Where keys and values are does not change the latents; what the commit pass attends to does."""

    def latents(*options):
        path = tmp_path / "memory.safetensors"
        succeeded(generate(story_of(3), "film.mp4", "--memory-out", path, "--scale", 1, *options))
        return load_file(path)["film"]

    base = latents()
    for placement in ("at once", "by layer", "from RAM"):
        assert torch.equal(latents("--kv-placement", placement), base)
    assert torch.equal(latents("--attention", "sdpa", "--commit-attends", "all"), base)
    assert not torch.equal(latents("--commit-attends", "no sink"), base)
    assert not torch.equal(latents("--commit-attends", "fast only"), base)


def test_what_the_commit_pass_attends_to(generate, tmp_path, succeeded):
    """The command line's choice, else the story's, else the card's; the command prints it."""

    def latents(attends, story, *options):
        path = tmp_path / "memory.safetensors"
        err = succeeded(generate({**story_of(4.5), **story}, "film.mp4", "--memory-out", path, "--scale", 1, *options))
        assert f"commit pass attends to: {attends}" in " ".join(err.split())
        return load_file(path)["film"]

    option = lambda attends: ("--commit-attends", attends)
    expected = {attends: latents(attends, {}, *option(attends)) for attends in COMMIT_ATTENDS}
    assert len({tuple(film.flatten().tolist()) for film in expected.values()}) == len(COMMIT_ATTENDS)
    card, story = ("--set", "commit_attends=no sink"), {"commit_attends": "itself"}
    assert torch.equal(latents("all", {}), expected["all"])
    assert torch.equal(latents("no sink", {}, *card), expected["no sink"])
    assert torch.equal(latents("itself", story, *card), expected["itself"])
    assert torch.equal(latents("all", story, *card, *option("all")), expected["all"])


def test_the_video_says_what_made_it(generate, run, student, tmp_path, succeeded):
    succeeded(generate({**story_of(0.75), "seed": 5}))
    made = json.loads(read_tags(tmp_path / "film.mp4")[TAG])
    opened = StudentSource(student).open()
    assert made["revision"] == git_revision() and made["student_file"] == student.name
    assert made["student"] == fingerprint(opened.load())
    assert made["card"]["steps"] == [1000.0, 500.0] and made["story"]["segments"][0]["seconds"] == 0.75
    assert made["story"]["seed"] == 5 and made["memory"]["slow"] == 4 and made["scale"] == 12
    assert str(tmp_path) not in json.dumps(made)


def test_rounding_is_logged(tmp_path, generate, caplog, frames_of, succeeded):
    caplog.set_level("INFO", "context_forcing")
    succeeded(generate(story_of(0.75, 1.0)))
    assert "segments[1]: 1 s rounded up to 1.5 s" in caplog.text and "segments[0]" not in caplog.text
    assert len(frames_of(tmp_path / "film.mp4")[1]) == 9 + 24


def test_unknown_words_are_logged(generate, caplog, succeeded):
    err = succeeded(generate({**STORY, "segments": [{"prompt": "a dragon over a meadow", "seconds": 0.75}]}))
    assert "dragon" in err + caplog.text


def test_report_is_drawn(generate, tmp_path, succeeded):
    err = succeeded(generate(story_of(3), "film.mp4", "--report", tmp_path / "report.png"))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "12 latent frames (3 s)" in " ".join(err.split())


def test_a_saved_memory_is_reported(generate, run, student, tmp_path, succeeded):
    """Like `generate --report`; with attention, also where the next chunk looks; without its student, no frames."""
    kept = tmp_path / "kept.memory"
    succeeded(generate(story_of(3), "film.mp4", "--memory-out", kept, "--report", tmp_path / "during.png"))
    heights = {}
    for name, options in {
        "after": ["--student", student], "looking": ["--student", student, "--attention"], "stranger": [],
    }.items():  # fmt: skip
        out = tmp_path / f"{name}.png"
        err = succeeded(run("report", kept, "-o", out, *options))
        assert "12 latent frames (3 s), memory reaches back 1.5 s" in err
        assert ("attention of the next chunk, mean over noise levels: sink " in err) == (name == "looking")
        assert ("made by another student" in err) == (name == "stranger")
        heights[name] = Image.open(out).height
    assert (tmp_path / "after.png").read_bytes() == (tmp_path / "during.png").read_bytes()
    assert heights["stranger"] < heights["after"] < heights["looking"]


REPORT_MISTAKES = {
    "no such memory": ("none.memory", ["-o", "r.png"], "none.memory: no such file"),
    "no memory": ("text.memory", ["-o", "r.png"], "text.memory: not a memory file; give"),
    "no png": ("kept.memory", ["-o", "r.jpg"], "--output: r.jpg does not end in .png"),
    "no folder": ("kept.memory", ["-o", "nowhere/r.png"], "--output: nowhere/r.png"),
    "no fps": ("kept.memory", ["-o", "r.png", "--fps", "0"], "--fps: 0 is not a number above 0"),
    "another's attention": ("kept.memory", ["-o", "r.png", "--attention"], "made by another student"),
    "nothing to look at": ("empty.memory", ["-o", "r.png", "--attention"], "it has no segment"),
}


def test_what_cannot_be_reported_is_one_line(generate, run, tmp_path, monkeypatch, succeeded):
    succeeded(generate(story_of(0.75), "film.mp4", "--memory-out", tmp_path / "kept.memory"))
    save_memory(tmp_path / "empty.memory", empty_memory(MemoryConfig(), (16, 4, 6)))
    (tmp_path / "text.memory").write_text("no memory")
    monkeypatch.chdir(tmp_path)
    for name, (memory, options, words) in REPORT_MISTAKES.items():
        code, err = run("report", memory, *options)
        assert code == 2 and words in err and "Traceback" not in err, (name, err)
        assert not list(tmp_path.rglob("r.*")), name


BAD_STORIES = {
    "unknown key": ({**STORY, "length": 3}, "length"),
    "unknown segment key": ({**STORY, "segments": [{**SEGMENT, "second": 3}]}, "segments[0]"),
    "zero seconds": (story_of(0), "segments[0].seconds: 0"),
    "negative seconds": (story_of(-1), "segments[0].seconds: -1"),
    "NaN seconds": (story_of(float("nan")), "segments[0].seconds: nan"),
    "text seconds": (story_of("three"), "segments[0].seconds: 'three'"),
    "size not a multiple of 16": ({**STORY, "size": [50, 32]}, "width 50"),
    "empty segments": ({**STORY, "segments": []}, "segments"),
    "not YAML": ("segments: [", "not YAML"),
}


@pytest.mark.parametrize("story, word", BAD_STORIES.values(), ids=BAD_STORIES.keys())
def test_bad_stories_are_one_line_and_write_nothing(generate, tmp_path, story, word, refused):
    refused(generate(story, "film.mp4", "--memory-out", tmp_path / "memory.safetensors"), word, "story.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["story.yaml"]


BAD_OPTIONS = {
    "output not mp4": (["-o", "film.avi"], ["output", "film.avi", ".mp4"]),
    "output folder missing": (["-o", "missing/film.mp4"], ["output", "missing/film.mp4"]),
    "bad policy": (["--policy", "newest"], ["policy", "newest"]),
    "bad memory": (["--memory", "goldfish"], ["memory", "goldfish", "longlive"]),
    "bad attention": (["--attention", "best"], ["attention", "best", "sage"]),
    "bad commit": (["--commit-attends", "none"], ["commit_attends", "none", "fast only"]),
    "bad placement": (["--kv-placement", "disk"], ["kv_placement", "disk", "from RAM"]),
    "bad device": (["--device", "tpu"], ["device", "tpu"]),
    "bad dtype": (["--dtype", "fp16"], ["dtype", "fp16"]),
    "too much slow": (["--slow", "100"], ["window", "100"]),
    "negative slow": (["--slow", "-1"], ["slow", "-1"]),
    "bad threshold": (["--threshold", "1.5"], ["slow_similarity_threshold", "1.5"]),
    "NaN threshold": (["--threshold", "nan"], ["slow_similarity_threshold", "nan"]),
    "memory over itself": (
        ["--memory-in", "m.safetensors", "--memory-out", "m.safetensors"],
        ["--memory-out", "another"],
    ),
    "compact of nothing": (["--compact"], ["--compact", "--memory-out"]),
    "no such student": (["--student", "none.safetensors"], ["none.safetensors", "no such file"]),
    "no such memory": (["--memory-in", "none.safetensors"], ["none.safetensors", "no such file"]),
    "memory folder missing": (["--memory-out", "missing/memory"], ["--memory-out", "missing"]),
    "report folder missing": (["--report", "missing/report.png"], ["--report", "missing"]),
    "scale too large": (["--scale", "65"], ["--scale", "65", "from 1 to 64"]),
    "report no png": (["--report", "report.txt"], ["--report", "report.txt", ".png"]),
}


@pytest.mark.parametrize("options, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_one_line_and_write_nothing(generate, tmp_path, monkeypatch, options, words, refused):
    monkeypatch.chdir(tmp_path)
    refused(generate(STORY, "film.mp4", *options), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["story.yaml"]


def test_a_seed_too_large(generate, tmp_path):
    code, _ = generate(STORY, "film.mp4", "--seed", 2**64)
    assert code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["story.yaml"]


def test_a_missing_story(run, tmp_path, refused):
    refused(run("generate", tmp_path / "none.yaml", "-o", tmp_path / "film.mp4"), "none.yaml")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_student(generate, tmp_path, refused):
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    refused(generate(STORY, student=other), "other.safetensors", "not a Wan 2.1 model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "story.yaml"]


def test_a_student_without_the_demos_codec(generate, make_net, tmp_path, save_student, refused):
    other = tmp_path / "other.safetensors"
    save_student(other, make_net(text_dim=4096, text_len=512), StudentCard(base="wan2.1-1.3b"))
    refused(generate(STORY, student=other), "a Wan 2.1 student needs a text encoder and a VAE", "--text-encoder")


def test_a_memory_is_continued_as_it_was_made(generate, tmp_path, make_net, refused, succeeded):
    memory = tmp_path / "memory.safetensors"
    succeeded(generate(STORY, "film.mp4", "--memory-out", memory))
    refused(generate({**STORY, "size": [32, 48]}, "next.mp4", "--memory-in", memory), "size", "[32, 48]")
    refused(generate(STORY, "next.mp4", "--memory-in", memory, "--slow", 3), "slow: 3")
    refused(generate(STORY, "next.mp4", "--memory-in", memory, "--policy", "fifo"), "policy: fifo")
    refused(generate(STORY, "next.mp4", "--memory-in", memory, student="demo"), "memory.safetensors", "student")
    memory.write_bytes(memory.read_bytes()[:1000])
    refused(generate(STORY, "next.mp4", "--memory-in", memory), "memory.safetensors")
    assert not (tmp_path / "next.mp4").exists()


@pytest.fixture
def interrupt_after_two_chunks(monkeypatch):
    from context_forcing.video.pipeline import Pipeline

    original = Pipeline.generate

    def interrupted(self, *args, **kwargs):
        for i, memory in enumerate(original(self, *args, **kwargs)):
            if i == 2:
                raise KeyboardInterrupt
            yield memory

    monkeypatch.setattr(Pipeline, "generate", interrupted)


def stopped(generate, *options):
    try:
        code, *_ = generate(story_of(0.75, 0.75, 6), "film.mp4", *options)
    except KeyboardInterrupt:
        code = 130
    assert code != 0


def test_an_interrupt_leaves_no_half_film(generate, tmp_path, interrupt_after_two_chunks):
    stopped(generate)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.part"))


def test_an_interrupt_leaves_the_finished_segments(generate, tmp_path, interrupt_after_two_chunks):
    memory = tmp_path / "memory.safetensors"
    stopped(generate, "--memory-out", memory)
    assert load_file(memory)["film"].shape[2] == 6


def test_an_older_film_survives_a_refusal(generate, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"precious")
    code, *_ = generate(STORY, "film.mp4", "--policy", "newest")
    assert code == 2 and (tmp_path / "film.mp4").read_bytes() == b"precious"


@pytest.mark.slow
def test_train_smoke_then_generate(run, generate, tmp_path, frames_of, succeeded):
    succeeded(run("train", "vae", "--config", "smoke", f"out={tmp_path / 'vae'}"))
    codec = tmp_path / "vae" / "demo_codec.safetensors"
    assert codec.is_file()
    succeeded(run("train", "pretrain", "--config", "smoke", f"out={tmp_path / 'student'}", f"codec={codec}"))
    succeeded(generate({"segments": [SEGMENT]}, student=tmp_path / "student" / "student.safetensors"))
    assert len(frames_of(tmp_path / "film.mp4")[1]) == 9


def test_what_a_released_memory_does_not_support_is_refused_first(generate, tmp_path):
    story = STORY | {"segments": [SEGMENT, SEGMENT | {"prompt": "a desert by day", "change": "cut"}]}
    released = ("--policy", "released", "--slow", "3")
    code, err = generate(story, "film.mp4", *released)
    assert code == 2 and "change: cut" in err and not list(tmp_path.glob("film.mp4*"))
    code, err = generate(STORY, "film.mp4", *released, "--memory-out", tmp_path / "memory", "--compact")
    assert code == 2 and "compact" in err and not list(tmp_path.glob("film.mp4*"))
    code, err = generate(STORY, "film.mp4", *released, "--memory-out", tmp_path / "memory")
    assert code == 0 and (tmp_path / "film.mp4").exists() and (tmp_path / "memory").exists(), err
