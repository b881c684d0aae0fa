"""The storyboard strip: its edits of the text, and what a user sees of it in ComfyUI's page, in both renderers."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from context_forcing.video.storyboard import chunk_story, parse_storyboard

from ..nodes.conftest import comfyui, host  # noqa: F401

HERE = Path(__file__).parent
TEXT = """\
# a comment stays
0:00   A meadow.  The camera stays.
  0:03 [blend=2 recache] Dusk: 3 [sic] birds # a hash

7.6[seed=7 cut]\u00a0A desert.\r
0:10.1 [keep] [a bracket] A road.
0:12
# an end
"""
node = pytest.mark.skipif(not shutil.which("node"), reason="no node")


@pytest.fixture(scope="module")
def outline(node_module):
    return node_module("storyboard_route").outline


def edited(outline, *edits, text=TEXT, **student):
    """The texts after edits, each [function, *arguments], of a text; computed by the page's module."""
    request = {"text": text, "outline": outline({"text": text, **student}), "edits": edits}
    done = subprocess.run(
        ["node", HERE / "edit.mjs"], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def segments(text, fps=16, chunk=3):
    story = chunk_story(parse_storyboard(text), fps, chunk)
    return [(round(s.seconds * fps / 4 / chunk), s.prompt, s.change, s.blend, s.seed) for s in story.segments]


@node
@pytest.mark.parametrize("fps, chunk", [(16, 3), (16, 1), (15, 3), (24, 3), (30, 1)])
def test_a_dragged_border_changes_lengths_as_the_parser_counts_them(outline, fps, chunk):
    before = segments(TEXT, fps, chunk)
    cases = [(i, chunks, only) for i in range(len(before)) for chunks in (1, 2, 9, 40) for only in (False, True)]
    texts = edited(outline, *(["withDuration", *case] for case in cases), fps=fps, chunk=chunk)
    for (i, chunks, only), text in zip(cases, texts):
        lengths = [segment[0] for segment in before]
        if only and i + 1 < len(before):
            chunks = min(chunks, lengths[i] + lengths[i + 1] - 1)
            lengths[i + 1] -= chunks - lengths[i]
        lengths[i] = chunks
        assert segments(text, fps, chunk) == [(n, *segment[1:]) for n, segment in zip(lengths, before)]
        assert [line for line in text.split("\n") if line.startswith("#") or not line] == [
            "# a comment stays", "", "# an end", ""
        ]  # fmt: skip


@node
def test_an_unchanged_edit_keeps_every_character(outline):
    assert edited(outline, ["withDuration", 1, segments(TEXT)[1][0]]) == [TEXT]


@node
def test_a_click_on_an_option_changes_one_line(outline):
    before = segments(TEXT)
    cases = [
        (i, option)
        for i in range(4)
        for option in ({"change": "flush"}, {"change": "keep"}, {"blend": 0}, {"blend": 3})
    ]
    for (i, option), text in zip(cases, edited(outline, *(["withOptions", *case] for case in cases))):
        expected = dict(zip(("chunks", "prompt", "change", "blend", "seed"), before[i])) | option
        assert segments(text) == [*before[:i], tuple(expected.values()), *before[i + 1 :]]
        changed = [a != b for a, b in zip(text.split("\n"), TEXT.split("\n"))]
        assert sum(changed) <= 1


@node
def test_a_branch_has_the_later_segments_from_zero(outline):
    before = segments(TEXT)
    texts = edited(outline, *(["tail", i] for i in range(5)))
    assert [segments(text) for text in texts[:4]] == [before[i:] for i in range(4)]
    assert segments(texts[4]) == [(before[3][0], before[3][1], "keep", 0, None)]


@node
def test_modules_of_the_page():
    done = subprocess.run(["node", "--test", *HERE.glob("*.test.mjs")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def no_browser() -> str | None:
    """Why the page cannot be driven; None if it can."""
    if not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists():
        return "no Chromium; install it or set CHROMIUM"
    folder = os.environ.get("PLAYWRIGHT_CORE")
    if not shutil.which("node") or not folder or not (Path(folder) / "node_modules" / "playwright-core").is_dir():
        return "set PLAYWRIGHT_CORE to a folder in which `npm install playwright-core` was run"


@pytest.mark.browser
@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(no_browser() is not None, reason=str(no_browser()))
@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_the_strip_in_the_page(host, renderer, tmp_path):  # noqa: F811
    command = ["node", HERE / "strip.mjs", f"http://{host.address}", renderer, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; pictures in {tmp_path}"
