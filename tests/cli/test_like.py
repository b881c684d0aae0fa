"""What a video says about its making: printed, made again to the same frames, and not trusted."""

import json
import shutil
import subprocess
from dataclasses import fields

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from context_forcing.memory.fields import MAX_MESSAGE
from context_forcing.video.generate import GenerateRequest
from context_forcing.video.mp4 import write_video
from context_forcing.video.provenance import TAG, Provenance
from context_forcing.video.reading import MAX_TAGS, read_tags

MEADOW = "a meadow by day, the camera pans right"
SEGMENTS = [
    {"prompt": MEADOW, "seconds": 1.5},
    {"prompt": "a desert\nby night: [50%] = \\ \u2603", "seconds": 0.75, "change": "recache", "blend": 1, "seed": 9},
]
STORY = {"size": [48, 32], "seed": 4, "fps": 20, "segments": SEGMENTS}
OPTIONS = {
    "--seed": 6, "--policy": "clean", "--slow": 3, "--threshold": 0.9, "--commit-attends": "no sink", "--scale": 2,
    "--set": "shift=2.5 match_sink=0.5", "--dtype": "bf16",
}  # fmt: skip
SETTINGS = ("--policy", "--slow", "--threshold")
"""Options that --memory replaces."""


def words(options):
    return [word for each in options.items() for word in each]


@pytest.fixture
def generate(run, student, tmp_path):
    """(name, options; a story, or None with --like) -> exit code, stderr; writes NAME.mp4."""

    def generate(name, *options, story=STORY, student=student):
        path = [] if story is None else [tmp_path / "story.yaml"]
        for file in path:
            file.write_text(yaml.safe_dump(story))
        return run("generate", *path, "-o", tmp_path / f"{name}.mp4", "--student", student, *options)

    return generate


@pytest.fixture
def again(generate, tmp_path):
    """(name, options) -> exit code, stderr; makes film.mp4 again."""
    return lambda name, *options, **others: generate(
        name, "--like", tmp_path / "film.mp4", *options, story=None, **others
    )


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """The folder of a video that several tests read."""
    return tmp_path_factory.mktemp("made_once")


@pytest.fixture
def film(made_once, generate, tmp_path, succeeded):
    """film.mp4, made with OPTIONS."""
    if not (made_once / "film.mp4").exists():
        succeeded(generate("film", *words(OPTIONS)))
        shutil.copy(tmp_path / "film.mp4", made_once)
    return shutil.copy(made_once / "film.mp4", tmp_path / "film.mp4")


@pytest.fixture
def sums(tmp_path):
    """(name) -> ffmpeg's MD5 of every frame of NAME.mp4."""

    def sums(name):
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            tmp_path / f"{name}.mp4",
            "-f",
            "framemd5",
            "-",
        ]
        return subprocess.run(command, check=True, capture_output=True).stdout

    return sums


@pytest.fixture
def tagged(tmp_path):
    """(name, tags) -> NAME.mp4 with these tags and one grey picture."""

    def tagged(name, tags):
        write_video(tmp_path / f"{name}.mp4", [torch.zeros(1, 3, 4, 32, 32)], fps=8, metadata=tags)
        return tmp_path / f"{name}.mp4"

    return tagged


def made_of(path):
    return json.loads(read_tags(path)[TAG])


def save_picture(path, colour):
    Image.fromarray(np.full((32, 48, 3), colour, np.uint8)).save(path)
    return path


def test_a_video_is_made_again_to_the_same_frames(film, generate, again, sums, tmp_path, succeeded):
    succeeded(generate("plain"))
    err = succeeded(again("again", "--kv-placement", "by layer", "--offload"))
    assert sums("again") == sums("film") != sums("plain") and "not the same" not in err
    assert made_of(tmp_path / "again.mp4") == made_of(film)


@pytest.mark.parametrize(
    "option, value, differs",
    [
        ("--seed", 5, "story"),
        ("--slow", 2, "memory"),
        ("--memory", "infinity-rope", "memory"),
        ("--commit-attends", "itself", "commit_attends (no sink, here itself)"),
        ("--scale", 1, "scale (2, here 1)"),
        ("--dtype", "fp32", "dtype (bf16, here fp32)"),
        ("--set", "shift=4", "overrides, card"),
    ],
)
def test_options_win_and_are_named(option, value, differs, film, generate, again, sums, tmp_path, caplog, succeeded):
    """The video is the one that the story and the options make with this option in the place of its own."""
    succeeded(again("again", option, value))
    assert caplog.text.rstrip().endswith(f"not the same as then: {differs}")
    kept = {name: each for name, each in OPTIONS.items() if option != "--memory" or name not in SETTINGS}
    succeeded(generate("given", *words({**kept, option: value})))
    assert sums("again") == sums("given")
    assert made_of(tmp_path / "again.mp4") == made_of(tmp_path / "given.mp4") != made_of(film)


def test_files_are_named_and_must_be_given_again(generate, again, sums, student, tmp_path, caplog, refused, succeeded):
    folder = tmp_path / "private"
    folder.mkdir()
    first, fox, mill = (save_picture(folder / f"{name}.png", 40 * i) for i, name in enumerate(("first", "fox", "mill")))
    lora = folder / "style.safetensors"
    save_file({"head.head.lora_A.weight": torch.ones(2, 64), "head.head.lora_B.weight": torch.ones(64, 2)}, lora)
    pictures = [str(fox), {"image": str(mill), "prompt": "a mill"}]
    given = {"--start": first, "--lora": f"{lora}:0.5"}
    succeeded(generate("film", *words(given), story={**STORY, "references": pictures}))
    made = made_of(tmp_path / "film.mp4")
    assert "private" not in json.dumps(made) and made["loras"][0]["name"] == "style.safetensors:0.5"
    references = ("--reference", fox, "--reference", mill)
    for option, file in (("--start", made["start"]), ("--lora", made["loras"][0])):
        others = words({name: value for name, value in given.items() if name != option})
        refused(again("again", *others, *references), option, file["name"], file["sha256"][:12])
    refused(again("again", *words(given), *references[:2]), "--reference: 1 given", "fox.png", "mill.png")
    refused(generate("again", *references), "--reference")
    assert not (tmp_path / "again.mp4").exists()
    succeeded(again("again", *words(given), *references))
    assert sums("again") == sums("film") and "not the same" not in caplog.text
    succeeded(again("other", *words({**given, "--start": mill}), *references))
    assert sums("other") != sums("film") and caplog.text.rstrip().endswith("not the same as then: start")


def test_a_continued_video_needs_its_memory(generate, again, sums, tmp_path, refused, succeeded):
    memory = tmp_path / "part.memory"
    succeeded(generate("part", "--memory-out", memory, "--slow", 2))
    succeeded(generate("film", "--memory-in", memory))
    refused(again("again"), "--memory-in", "part.memory")
    succeeded(again("again", "--memory-in", memory))
    assert sums("again") == sums("film") != sums("part")


def test_another_student_is_refused(film, generate, again, save_tiny_student, tmp_path, refused, succeeded):
    other = save_tiny_student(tmp_path / "other.safetensors", edit=lambda net: net.head.head.weight.data.neg_())
    succeeded(generate("theirs", student=other))
    mine, theirs = (made_of(tmp_path / f"{name}.mp4")["student"] for name in ("film", "theirs"))
    assert mine != theirs
    refused(again("again", student=other), "--student", mine, theirs, "student.safetensors")
    refused(again("again", student="demo"), "--student", mine)
    assert not list(tmp_path.glob("*again*.mp4*"))


def test_another_revision_or_machine_is_said(film, again, tagged, caplog, succeeded):
    made = made_of(film)
    tagged("film", {TAG: json.dumps({**made, "revision": "0123abc", "machine": "an abacus"})})
    succeeded(again("again"))
    assert f"as then: revision (0123abc, here {made['revision']}), machine (an abacus, here" in caplog.text


def test_report_prints_what_made_a_video(film, run, tmp_path, refused, succeeded):
    succeeded(run("report", film))
    text, made = " ".join(run.out.split()), made_of(film)
    for each in (made["revision"], made["student"], "student.safetensors", "policy clean", "seed 6", MEADOW):
        assert each in text.replace("- ", "-")
    refused(run("report", film, "-o", tmp_path / "film.png"), "--output")
    refused(run("report", tmp_path / "part.memory"), "part.memory: no such file")


def test_foreign_videos(run, again, tagged, tmp_path, refused, succeeded):
    """A graph is in ComfyUI's videos; others say nothing."""
    film = tagged("film", {"workflow": "{}", "prompt": "{}"})
    succeeded(run("report", film))
    assert "ComfyUI" in run.out and "drop the file" in " ".join(run.out.split())
    refused(again("again"), "ComfyUI")
    film = tagged("film", {"title": "a film"})
    for result in (run("report", film), again("again")):
        refused(result, f"film.mp4: has no tag {TAG}")
    film.write_text("not a video")
    refused(run("report", film), "film.mp4: does not decode")
    refused(run("report", tmp_path / "none.mp4"), "there is no such file")
    refused(run("generate", "-o", tmp_path / "again.mp4"), "STORY", "--like")
    refused(run("generate", tmp_path / "story.yaml", "--like", film, "-o", tmp_path / "again.mp4"), "STORY", "--like")


def test_a_playlist_is_not_followed(run, tmp_path, refused):
    playlist = tmp_path / "film.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n")
    refused(run("report", playlist), "film.mp4: does not decode")


TAMPERED = {
    "not JSON": lambda made: "{",
    "deep": lambda made: "[" * 5000,
    "a list": lambda made: "[]",
    "too many tags": lambda made: "x" * MAX_TAGS,
    "missing": lambda made: {name: value for name, value in made.items() if name != "student"},
    "unknown": lambda made: {**made, "x\x1b[31m" * 10_000: 1},
    "long": lambda made: {**made, "revision": "y" * 10_000},
    "text": lambda made: {**made, "device": 3},
    "device": lambda made: {**made, "device": "\x1b[31m" * 30},
    "scale": lambda made: {**made, "scale": 10**400},
    "scale is true": lambda made: {**made, "scale": True},
    "memory": lambda made: {**made, "memory": {**made["memory"], "slow": "12"}},
    "memory of text": lambda made: {**made, "memory": "x" * 10_000},
    "window": lambda made: {**made, "memory": {**made["memory"], "window": 10**9, "sink": 10**8}},
    "card": lambda made: {**made, "card": {**made["card"], "solver": []}},
    "deep card": lambda made: json.dumps({**made, "card": "@"}).replace('"@"', "[" * 960 + "]" * 960),
    "no card": lambda made: {**made, "card": None},
    "steps": lambda made: {**made, "card": {**made["card"], "steps": [[1]]}},
    "overrides": lambda made: {**made, "overrides": "shift=3"},
    "an override": lambda made: {**made, "overrides": ["shift=" + "9" * 199]},
    "loras": lambda made: {**made, "loras": [{"name": "/etc/passwd", "sha256": "0" * 64}]},
    "start": lambda made: {**made, "start": {"name": "../" * 60, "sha256": "z" * 200}},
    "start of nothing": lambda made: {**made, "start": {}},
    "references": lambda made: {**made, "story": {**made["story"], "references": ["/etc/passwd"]}},
    "student": lambda made: {**made, "student": "0" * 200},
    "published": lambda made: {**made, "published": "/etc/passwd"},
    "weights": lambda made: {**made, "weights": "critic"},
    "attention": lambda made: {**made, "attention": "os.system"},
    "seconds": lambda made: {**made, "story": {**made["story"], "segments": [{"prompt": "", "seconds": 1e300}]}},
    "prompt": lambda made: {**made, "story": {**made["story"], "segments": [{"prompt": ["p" * 9999], "seconds": 1}]}},
    "seed": lambda made: {**made, "story": {**made["story"], "seed": -1}},
    "no story": lambda made: {**made, "story": []},
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_tampered_tags_are_refused_in_one_line(tamper, film, again, tagged, tmp_path, refused):
    raw = tamper(made_of(film))
    tagged("film", {TAG: raw if isinstance(raw, str) else json.dumps(raw)})
    result = again("again")
    refused(result)
    assert len(result[1].strip()) <= MAX_MESSAGE + len("error: ") and "\x1b" not in result[1]
    assert not list(tmp_path.glob("*again*.mp4*"))


def test_every_option_is_in_the_tag_or_changes_no_frame():
    """A new option must be added to the tag or here."""
    no_frame = {"output", "offload", "kv_placement", "memory_out", "compact", "resume", "report", "models_dir"}
    elsewhere = {"like", "seed", "settings"}  # The seeds are in the story, the settings in the memory.
    renamed = {"vae": "vae_file", "decoder": "decoder_file", "text_encoder": "text_encoder_file"}
    named = {field.name for field in fields(Provenance)}
    for option in {field.name for field in fields(GenerateRequest)} - no_frame - elsewhere:
        assert renamed.get(option, option) in named, option
