"""`context-forcing bench`: a film end to end, drift, the table and the JSON file."""

import json

import pytest


def test_a_student_is_measured(run, succeeded, student, tmp_path):
    path = tmp_path / "bench.json"
    options = ("--options", "dtype=fp32,bf16", "--chunks", 2, "--warmup", 1, "--no-ports", "--drift", "--seconds", 3)
    succeeded(run("bench", "--student", student, *options, "--json", path))
    for words in ("dtype=bf16", "48x32", "13: 3 sink, 4 slow, 6 fast", "sdpa", "end to end", "drift"):
        assert words in run.out, words
    (found,) = json.loads(path.read_text())["sizes"]
    film, _ = found["films"]
    assert film["frames"] == 12 and len(film["chunks"]) == 2 and film["text_seconds"] > 0
    assert len(film["overlapped"]) == 2 and min(film["overlapped"]) > 0 and film["end_seconds"] > 0
    assert film["frames_per_second"] == pytest.approx(12 / (sum(film["overlapped"]) / 2))
    assert all({*spent["wall"]} == {"denoise", "commit", "decode", "encode"} for spent in film["chunks"])
    (drift,) = found["drift"]
    assert len(drift["difference"]) == 4 and len(drift["motion"]) == len(drift["reference_motion"]) == 3
    assert 0 < drift["difference"][0] < 1 and min(drift["motion"]) > 0
    assert [loop["name"] for loop in found["speed"]] == ["dtype=fp32", "dtype=bf16"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--frame", "32x32,wide"), "--frame: '32x32,wide' is not WIDTHxHEIGHT"),
        (("--layers", 2), "--layers: a student has all of its layers"),
        (("--device", "tpu"), "device: 'tpu' is not one of auto, cuda, cpu"),
        (("--drift",), "drift: there is one setup"),
    ],
)
def test_what_cannot_be_measured(run, refused, options, words):
    refused(run("bench", *options), words)
