"""What the page is told about a storyboard: segments in whole chunks, or each wrong line with its reason."""

import asyncio
from types import SimpleNamespace

import pytest

TEXT = "# a comment\n0:00 A meadow.\n0:06 [recache blend=2 seed=7] Dusk.\n\n0:12"


@pytest.fixture(scope="module")
def outline(node_module):
    return node_module("storyboard_route").outline


def test_segments_have_lines_and_whole_chunks(outline):
    assert outline({"text": TEXT}) == {
        "chunk_seconds": 0.75,
        "changes": ["keep", "recache", "flush", "cut", "cut_new_sink"],
        "segments": [
            {"line": 2, "chunks": 8, "prompt": "A meadow.", "change": "keep", "blend": 0, "seed": None},
            {"line": 3, "chunks": 8, "prompt": "Dusk.", "change": "recache", "blend": 2, "seed": 7},
        ],
        "end_line": 5,
    }


@pytest.mark.parametrize(
    "student, seconds",
    [({"fps": 24, "chunk": 1}, 1 / 6), ({"card": "auto"}, 0.75), ({"card": "causal-forcing-framewise"}, 0.25)],
)
def test_a_chunk_is_that_of_the_student(outline, student, seconds):
    assert outline({"text": TEXT, **student})["chunk_seconds"] == pytest.approx(seconds)


def test_wrong_lines_have_their_reasons(outline):
    refused = outline({"text": "0:00 [slow] A meadow.\n0:06 Dusk.\n0:03 Night.\n0:12"})
    assert refused["reasons"] == {
        "1": "[slow] is not known; options are keep, recache, flush, cut, cut_new_sink, seed=N and blend=N",
        "3": "times must rise, and a line before it begins at 0:06",
    }
    assert refused["error"].startswith('line 1 ("0:00 [slow] A meadow."): [slow] is not known')
    short = outline({"text": "0:00 A meadow.\n0:00.1 Dusk.\n0:06"})
    assert short["reasons"] == {"1": "0.1 s is too short for a whole chunk (0.75 s); make it longer"}


def test_no_line_is_wrong_where_there_is_none(outline):
    assert outline({"text": ""}) == {
        "error": "storyboard: no prompt; write a line per segment, `0:00 A meadow.`, and the time of its end",
        "reasons": {},
    }


@pytest.mark.parametrize(
    "request_, name",
    [
        ({}, "text"),
        ({"text": TEXT, "fps": "x"}, "fps"),
        ({"text": TEXT, "chunk": 0}, "chunk"),
        ({"text": TEXT, "chunk": 0.5}, "chunk"),
        ({"text": TEXT, "chunk": 2.5}, "chunk"),
        ({"text": TEXT, "chunk": True}, "chunk"),
    ],
)
def test_other_values_are_refused(outline, request_, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        outline(request_)


@pytest.mark.parametrize(
    "body, message",
    [
        (b'["0:00 A meadow."]', "storyboard: not a JSON object"),
        (b"0:00 A meadow.", "storyboard: not JSON ("),
        (b"[" * 100_000, "storyboard: not JSON ("),
        (b"\xff", "'utf-8' codec can't decode"),
        (b'{"text": "0:06", "chunk": 0.5}', "chunk: 0.5 is not a whole number above 0 and below 10000"),
    ],
)
def test_a_body_that_is_not_understood_has_status_400(node_module, monkeypatch, body, message):
    module = node_module("storyboard_route")
    reply = SimpleNamespace(json_response=lambda data, status=200: (data, status))
    monkeypatch.setattr(module, "web", reply)

    async def read():
        return body

    (data, status) = asyncio.run(module.answer(SimpleNamespace(read=read)))
    assert status == 400 and data["error"].startswith(message)
