"""A video that was stopped, killed or begun from something: nothing is lost, and what comes out is the same."""

import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.base import normalise
from context_forcing.model.codecs.demo_vae import load_demo_codec
from context_forcing.video.frames import to_pixels
from context_forcing.video.generate import GenerateRequest, open_job
from context_forcing.video.journal import HEADER
from context_forcing.video.reading import read_runs

MEADOW = "A meadow under a clear sky by day. The camera pans right."
DUSK = "A meadow under a clear sky at dusk. The camera stays."


def command(folder, name, *options):
    base = [sys.executable, "-c", "from context_forcing.cli import main; main()", "generate", "story.yaml"]
    return [*base, "-o", f"{name}.mp4", "--scale", "1", "--memory-out", f"{name}.memory", *map(str, options)]


def generate(folder, name, *options):
    done = subprocess.run(command(folder, name, *options), cwd=folder, capture_output=True, text=True, timeout=600)
    return done.returncode, " ".join(done.stderr.split())


def write_story(folder, *segments, seed=3):
    (folder / "story.yaml").write_text(yaml.safe_dump({"seed": seed, "segments": list(segments)}))


def segment(prompt, seconds, **settings):
    return {"prompt": prompt, "seconds": seconds, **settings}


def film(path):
    return load_file(path)["film"]


@pytest.mark.slow
def test_kill_9_at_ten_moments_of_two_minutes(tmp_path):
    """Every time as a user would: the same command with --resume. The same file at the end, to the byte."""
    dusk, desert = segment(DUSK, 20, change="recache", blend=2), "A desert at night. The camera pans left."
    segments = (segment(MEADOW, 40), dusk, segment(MEADOW, 20, change="flush"), segment(desert, 40, change="cut"))
    write_story(tmp_path, *segments)
    code, message = generate(tmp_path, "whole")
    assert code == 0, message
    rng, chunks = random.Random(1), tmp_path / "killed.mp4.journal"
    moments = sorted(rng.sample(range(1, 159), 10))
    for moment in moments:
        resume = ["--resume"] if chunks.exists() else []
        process = subprocess.Popen(command(tmp_path, "killed", *resume), cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not (chunks / f"chunk-{moment:06d}.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed.mp4").exists()
    code, message = generate(tmp_path, "killed", "--resume")
    assert code == 0, message
    assert (tmp_path / "killed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert (tmp_path / "killed.memory").read_bytes() == (tmp_path / "whole.memory").read_bytes()
    assert film(tmp_path / "whole.memory").shape[2] == 3 * (54 + 27 + 27 + 54) and not chunks.exists()


@pytest.mark.slow
def test_resume_wants_the_same_video(tmp_path, save_student):
    write_story(tmp_path, segment(MEADOW, 90))
    code, message = generate(tmp_path, "film", "--resume")
    assert code == 2 and "there is no journal film.mp4.journal; start without --resume" in message
    process = subprocess.Popen(command(tmp_path, "film"), cwd=tmp_path, stderr=subprocess.DEVNULL)
    journal = tmp_path / "film.mp4.journal"
    while not (journal / "chunk-000001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    code, message = generate(tmp_path, "film")
    assert code == 2 and "holds an unfinished video; continue it with --resume" in message
    code, message = generate(tmp_path, "film", "--resume", "--slow", "3")
    assert code == 2 and "another memory" in message
    student = StudentSource().open()
    net, card = student.load(), student.card
    save_student(tmp_path / "slower.safetensors", net, dataclasses.replace(card, steps=(1000.0, 500.0)))
    code, message = generate(tmp_path, "film", "--resume", "--student", "slower.safetensors")
    assert code == 2 and "another card" in message
    write_story(tmp_path, segment(MEADOW, 3))
    code, message = generate(tmp_path, "film", "--resume")
    assert code == 2 and "another story" in message


@pytest.mark.slow
def test_a_compact_memory_goes_on(tmp_path):
    write_story(tmp_path, segment(MEADOW, 12))
    for name, form in (("exact", []), ("small", ["--compact"])):
        code, message = generate(tmp_path, name, *form)
        assert code == 0, message
    small, exact = load_file(tmp_path / "small.memory"), load_file(tmp_path / "exact.memory")
    assert set(small) == {"film", "text", "text.0"} and torch.equal(small["film"], exact["film"])
    for name in ("exact", "small"):
        code, message = generate(tmp_path, f"{name}2", "--memory-in", tmp_path / f"{name}.memory")
        assert code == 0, message
    a, b = film(tmp_path / "exact2.memory")[:, :, 48:51], film(tmp_path / "small2.memory")[:, :, 48:51]
    assert 0 < (a - b).abs().mean() < 0.35 * a.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_a_video_begins_with_what_it_is_given(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (1 if kind == "picture" else 14, 4, 8, 3), np.uint8)
    frames = pixels.repeat(16, 1).repeat(16, 2)
    if kind == "picture":
        path = tmp_path / "start.png"
        Image.fromarray(frames[0]).save(path)
    else:
        path = tmp_path / "start.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path), (128, 64), fps=16, macro_block_size=1, output_params=["-crf", "0"]
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
    write_story(tmp_path, segment(MEADOW, 1.5))
    code, message = generate(tmp_path, "film", "--start", path)
    assert code == 0, message
    assert ("1 of 14 frames left out" in message) == (kind == "clip")
    (seen,) = read_runs(path, 64, (128, 64), 16)
    with torch.inference_mode():
        expected = normalise(load_demo_codec().encode(to_pixels(seen[: 1 if kind == "picture" else 13])))
    made = film(tmp_path / "film.memory")
    assert made.shape[2] == (6 if kind == "picture" else 9)
    torch.testing.assert_close(made[:, :, : expected.shape[2]], expected, rtol=0, atol=0)
    code, message = generate(tmp_path, "more", "--start", path, "--memory-in", tmp_path / "film.memory")
    assert code == 2 and "a start image or clip needs an empty memory" in message
    code, message = generate(tmp_path, "more", "--start", Path(__file__))
    assert code == 2 and "does not decode" in message


def test_a_changing_story_is_checked(tmp_path):
    for settings, words in (
        ({"change": "melt"}, "segments[0].change: 'melt'"),
        ({"blend": -1}, "segments[0].blend: -1"),
    ):
        write_story(tmp_path, segment(MEADOW, 1, **settings))
        code, message = generate(tmp_path, "film")
        assert code == 2 and words in message and not json.dumps(message).count("Traceback")


def test_a_journal_is_not_resumed_with_another_commit_pass(tmp_path, student):
    """The choice in effect counts, wherever it is made; a journal without one attended to all."""
    write_story(tmp_path, segment(MEADOW, 2))
    with_field = {**yaml.safe_load((tmp_path / "story.yaml").read_text()), "commit_attends": "no sink"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(with_field))
    tiny, card = StudentSource(student), StudentSource(student, overrides=("commit_attends=no sink",))
    request = GenerateRequest(story=tmp_path / "story.yaml", output=tmp_path / "film.mp4", student=tiny, device="cpu")
    other = tmp_path / "other.yaml"
    plain, no_sink = (
        [
            request,
            dataclasses.replace(request, story=other, commit_attends="all"),
            dataclasses.replace(request, student=card, commit_attends="all"),
        ],
        [
            dataclasses.replace(request, commit_attends="no sink"),
            dataclasses.replace(request, story=other),
            dataclasses.replace(request, student=card),
        ],
    )
    for same, others in ((plain, no_sink), (no_sink, plain)):
        with open_job(same[0]) as job:
            header = json.loads((job.journal.folder / HEADER).read_text())
            assert header.get("commit attends") == (None if same is plain else "no sink")
            assert not {"commit_attends", "match_sink"} & {*header["card"], *header["story"]}, (
                "as in journals of version 0.1"
            )
            x0 = torch.zeros(job.memory.chunk_shape)
            job.journal.keep(0, x0)
        for request in same:
            with open_job(dataclasses.replace(request, resume=True)) as job:
                assert len(job.journal.finished) == 1
        for request in others:
            refusal = pytest.raises(ValueError, match="was begun with another commit attends; give the same as then")
            with refusal, open_job(dataclasses.replace(request, resume=True)):
                pass
        job.journal.close()
