"""References of a story: remembered to the end, not in the video, checked at --resume."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from context_forcing.memory.snapshot import load_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.video.generate import GenerateRequest, open_job
from context_forcing.video.journal import HEADER

MEADOW = "a meadow by day, the camera pans right"
REFERENCES = ["fox.png", {"image": "pictures/place.png", "prompt": "a desert at night"}]


def story_of(*seconds, references=(), change="keep"):
    segments = [{"prompt": MEADOW, "seconds": s, "change": change} for s in seconds]
    return {"size": [48, 32], "seed": 4, "segments": segments} | ({"references": references} if references else {})


def save_picture(path, colour, size=(200, 80)):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), colour, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Stories are here, and the pictures that they name; the working directory is another one."""
    save_picture(tmp_path / "fox.png", (200, 90, 30))
    save_picture(tmp_path / "pictures" / "place.png", (30, 90, 200))
    return tmp_path


@pytest.fixture
def generate(run, student, folder):
    """(story, name, options) -> exit code, stderr; writes NAME.mp4 and NAME.memory."""

    def generate(story, name="film", *options):
        (folder / "story.yaml").write_text(yaml.safe_dump(story))
        files = ["-o", folder / f"{name}.mp4", "--memory-out", folder / f"{name}.memory"]
        return run("generate", folder / "story.yaml", *files, "--student", student, "--scale", 1, *options)

    return generate


def film(folder, name):
    return load_file(folder / f"{name}.memory")["film"]


def test_they_are_remembered_and_are_not_in_the_video(generate, folder, frames_of, succeeded):
    message = succeeded(generate(story_of(3, references=REFERENCES)))
    succeeded(generate(story_of(3), "plain"))
    assert "sink 3 of 3 (2 references), slow 4 of 4" in " ".join(message.split())
    memory = load_memory(folder / "film.memory")
    assert memory.slots.sink == (-2, -1, 0) and [each.prompt for each in memory.references] == ["", "a desert at night"]
    assert film(folder, "film").shape == film(folder, "plain").shape
    assert not torch.allclose(film(folder, "film"), film(folder, "plain"), atol=1e-3)
    assert len(frames_of(folder / "film.mp4")[1]) == len(frames_of(folder / "plain.mp4")[1])


def test_splitting_and_saving_change_nothing(generate, folder, succeeded):
    succeeded(generate(story_of(4.5, 1.5, references=REFERENCES, change="cut"), "whole"))
    succeeded(generate(story_of(4.5, references=REFERENCES), "part"))
    succeeded(generate(story_of(1.5, change="cut"), "next", "--memory-in", folder / "part.memory"))
    assert torch.equal(film(folder, "next"), film(folder, "whole"))
    whole, chained = (load_memory(folder / f"{name}.memory") for name in ("whole", "next"))
    assert whole.slots == chained.slots and whole.slots.references == (-2, -1)


def test_a_report_shows_them(generate, run, student, folder, succeeded):
    succeeded(generate(story_of(3, references=REFERENCES), "film", "--report", folder / "during.png"))
    message = succeeded(run("report", folder / "film.memory", "-o", folder / "r.png", "--student", student))
    assert "(2 references)" in message and (folder / "r.png").read_bytes() == (folder / "during.png").read_bytes()
    message = succeeded(
        run("report", folder / "film.memory", "-o", folder / "r.png", "--student", student, "--attention")
    )
    assert "mean over noise levels: reference " in " ".join(message.split())


def test_a_journal_is_resumed_with_the_same_references_only(folder, student):
    """The pictures count, not their paths; a journal without references is as before."""

    def request(name, **fields):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(story_of(2, **fields)))
        source = StudentSource(student)
        return GenerateRequest(story=folder / f"{name}.yaml", output=folder / "film.mp4", student=source, device="cpu")

    save_picture(folder / "same.png", (200, 90, 30))
    first, same = request("first", references=["fox.png"]), request("same", references=["same.png"])
    plain, captioned = request("plain"), request("captioned", references=[{"image": "fox.png", "prompt": "a desert"}])
    with open_job(first) as job:
        header = json.loads((job.journal.folder / HEADER).read_text())
        assert header["references"] and "references" not in header["story"]
        job.journal.keep(0, torch.zeros(job.memory.chunk_shape))
    with open_job(dataclasses.replace(same, resume=True)) as job:
        assert len(job.journal.finished) == 1
    save_picture(folder / "same.png", (0, 0, 0))
    for other in (same, plain, captioned):
        refusal = pytest.raises(ValueError, match="was begun with another references; give the same as then")
        with refusal, open_job(dataclasses.replace(other, resume=True)):
            pass
    job.journal.close()
    with open_job(plain) as job:
        assert "references" not in json.loads((job.journal.folder / HEADER).read_text())


def test_a_resumed_video_is_the_same(folder, student):
    (folder / "story.yaml").write_text(yaml.safe_dump(story_of(3, 1.5, references=REFERENCES, change="cut")))
    request = GenerateRequest(
        story=folder / "story.yaml", output=folder / "film.mp4", student=StudentSource(student), device="cpu", scale=1
    )

    class Stop(Exception):
        pass

    def stop(finished, note):
        if finished == 3:
            raise Stop

    with pytest.raises(Stop), open_job(request) as job:
        job.run(stop)
    with open_job(dataclasses.replace(request, resume=True)) as job:
        assert len(job.journal.finished) == 3
        job.run()
    resumed = job.memory
    with open_job(dataclasses.replace(request, output=folder / "whole.mp4")) as job:
        job.run()
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), job.memory.tensors(), strict=True))
    assert (folder / "film.mp4").read_bytes() == (folder / "whole.mp4").read_bytes()


@pytest.mark.parametrize(
    "references, words",
    [
        (["none.png"], ["references: ", "none.png: there is no such file"]),
        (["text.png"], ["references: ", "text.png: does not decode"]),
        (["clip.gif"], ["references: ", "clip.gif: is a video; give a picture"]),
        (["fox.png"] * 4, ["references: 4 frames, the sink has 3; give fewer"]),
    ],
)
def test_what_is_no_reference_is_one_line(generate, folder, refused, references, words):
    (folder / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (48, 32), (60 * n, 0, 0)) for n in range(3)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=1000)
    refused(generate(story_of(1, references=references)), *words)
    assert not (folder / "film.mp4").exists() and not (folder / "film.mp4.journal").exists()


def test_a_video_that_has_begun_takes_none(generate, folder, refused, succeeded):
    succeeded(generate(story_of(0.75), "part"))
    options = ("--memory-in", folder / "part.memory")
    refused(generate(story_of(0.75, references=["fox.png"]), "next", *options), "references: the memory has 3 frames")
