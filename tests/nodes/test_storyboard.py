"""A storyboard in a real ComfyUI: it equals a chain of samplers, and every line is cached."""

import base64
import io

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from .graph import PROMPTS, Graph, failure, film, interrupt_at, memory_file, only, succeeded, text_shown
from .host import template, to_api

pytestmark = [pytest.mark.host, pytest.mark.slow]

EIGHT = [
    "0:00 A meadow under a clear sky by day. The camera stays.",
    "0:00.75 A meadow under a clear sky by day. The camera pans right.",
    "0:01.5 [recache] A meadow under a clear sky at dusk. The camera pans right.",
    "0:02.25 A meadow under a clear sky at dusk. The camera stays.",
    "0:03 A meadow under a clear sky at dusk. The camera pans left.",
    "0:03.75 [cut seed=9] A desert by day. The camera stays.",
    "0:04.5 A desert by day. The camera pans left.",
    "0:05.25 A desert at night. The camera pans left.",
    "0:06",
]


def add_storyboard(graph, demo, text, seed=7, **settings) -> str:
    inputs = {"model": [demo, 0], "clip": [demo, 1], "memory": [graph.memory(demo), 0], "text": text, "seed": seed}
    return graph.add("ContextForcingStoryboard", **inputs, **settings)


def tensors(host, run, node) -> dict:
    """All tensors of the memory that Save Memory wrote."""
    return load_file(memory_file(host, run, node))


def lines_run(run, board) -> list[int]:
    """Numbers, from 1, of the lines whose samplers ran. A line has two nodes, a prompt and a sampler."""
    numbers = [int(node.rsplit(".", 1)[1]) for node in run.executed if node.startswith(f"{board}.")]
    return sorted(number // 2 for number in numbers if number % 2 == 0)


def test_it_equals_a_chain(host, graph, demo):
    board = add_storyboard(
        graph,
        demo,
        f"0 {PROMPTS[0]}\n2.1 [recache blend=2] {PROMPTS[1]}\n0:05.3 [cut seed=9] {PROMPTS[2]}\n0:07",
        kv_dtype="int8",
    )
    saved, text = graph.save_memory(board), graph.show_text(board)
    run = succeeded(host.run(graph.prompt))
    result = tensors(host, run, saved)
    assert text_shown(run, text).split("\n") == [
        f"0:00 {PROMPTS[0]}",
        f"0:02.25 [recache blend=2] {PROMPTS[1]}",
        f"0:05.25 [cut seed=9] {PROMPTS[2]}",
        "0:06.75",
    ]

    host.post("/free", {"unload_models": True, "free_memory": True})
    chain = Graph()
    # Another layout, so that no sampler finds the storyboard's segments.
    again = {"kv_dtype": "int8", "layout": "by layer"}
    demo = chain.add("ContextForcingLoadDemo")
    memory = chain.memory(demo)
    for prompt, seconds, seed, change, blend in (
        (PROMPTS[0], 2.25, 7, "keep", 0),
        (PROMPTS[1], 3.0, 7, "recache", 2),
        (PROMPTS[2], 1.5, 9, "cut", 0),
    ):
        again["change"], again["blend"] = change, blend
        memory = chain.sampler(demo, chain.text(demo, prompt), memory, seconds, seed, **again)
    saved = chain.save_memory(memory)
    expected = tensors(host, succeeded(host.run(chain.prompt)), saved)
    assert expected["film"].shape[2] == 27 and result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert torch.int8 in {tensor.dtype for tensor in result.values()}


def test_an_edited_line_runs_with_the_later_ones_alone(host, graph, demo):
    lines = [*EIGHT]
    # A seed of its own, so that no line is in the cache. (What /free empties, it may empty after the next run.)
    board = add_storyboard(graph, demo, "\n".join(lines), seed=23)
    saved = graph.save_memory(board)
    first = succeeded(host.run(graph.prompt))
    assert lines_run(first, board) == [1, 2, 3, 4, 5, 6, 7, 8]
    films = [film(host, first, saved)]

    for number, line, run_again in (
        (5, "0:03 A meadow under a foggy sky at dusk. The camera stays.", [5, 6, 7, 8]),
        (8, "0:05.25 Snow under a clear sky.", [8]),
        (7, "0:04.5 [seed=3] A desert by day. The camera pans left.", [7, 8]),
        (9, "0:06.75", [8]),
    ):
        lines[number - 1] = line
        graph.prompt[board]["inputs"]["text"] = "\n".join(lines)
        run = succeeded(host.run(graph.prompt))
        assert lines_run(run, board) == run_again
        made = {node for line in run_again for node in (f"{board}.0.0.{2 * line - 1}", f"{board}.0.0.{2 * line}")}
        # A line that is only longer, or has another seed, has its prompt's embedding already.
        assert {board, saved} < run.executed <= {board, saved} | made
        assert run.cached == set(graph.prompt) - {board, saved}
        films.append(film(host, run, saved))
        frames = 3 * (run_again[0] - 1)
        assert torch.equal(films[-1][:, :, :frames], films[-2][:, :, :frames])
        assert not torch.equal(films[-1][:, :, frames:], films[-2][:, :, frames:])

    again = succeeded(host.run(graph.prompt))
    assert again.cached == set(graph.prompt) and not again.executed


def test_an_interrupt_keeps_the_finished_lines(host, graph, demo):
    board = add_storyboard(graph, demo, "\n".join(EIGHT), seed=21)
    graph.save_memory(board)
    run = host.run(graph.prompt, interrupt_at(host, "executing", f"{board}.0.0.6"))
    assert run.end == "execution_interrupted" and run.all(run.end)[0]["node_id"] == board
    assert lines_run(run, board) == [1, 2, 3]
    assert lines_run(succeeded(host.run(graph.prompt)), board) == [3, 4, 5, 6, 7, 8]


def test_storyboards_chain(host, graph, demo):
    """The second goes on where the first ended; an edit of it leaves the first alone."""
    first = add_storyboard(graph, demo, f"0 {PROMPTS[0]}\n1.5", seed=22)
    inputs = {"model": [demo, 0], "clip": [demo, 1], "memory": [first, 0], "seed": 22}
    second = graph.add("ContextForcingStoryboard", **inputs, text=f"0 {PROMPTS[1]}\n1.5")
    whole = add_storyboard(graph, demo, f"0 {PROMPTS[0]}\n1.5 {PROMPTS[1]}\n3", seed=22, layout="by layer")
    parts, whole = graph.save_memory(second), graph.save_memory(whole)
    run = succeeded(host.run(graph.prompt))
    parts, whole = tensors(host, run, parts), tensors(host, run, whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)

    graph.prompt[second]["inputs"]["text"] = f"0 {PROMPTS[2]}\n1.5"
    run = succeeded(host.run(graph.prompt))
    assert first in run.cached and lines_run(run, second) == [1] and not lines_run(run, first)


def test_progress_and_previews_show_on_the_storyboard(host, graph, demo):
    text = f"0 {PROMPTS[0]}\n1.5 {PROMPTS[1]}\n2.25"
    board = add_storyboard(graph, demo, text, seed=23)
    graph.save_memory(board)
    run = succeeded(host.run(graph.prompt))
    for line, chunks in ((1, 2), (2, 1)):
        sampler = f"{board}.0.0.{2 * line}"
        assert run.progress(sampler) >= {(i, chunks) for i in range(1, chunks + 1)}
        states = [data["nodes"][sampler] for data in run.all("progress_state") if sampler in data["nodes"]]
        assert {state["display_node_id"] for state in states} == {board}
        assert sum(node == sampler for node, _ in run.previews) == chunks


def test_a_bad_line_is_named(host, graph, demo):
    """As an error of the run: of one from validation the page shows no reason."""
    board = add_storyboard(graph, demo, "0:00 A meadow.\n0:06 [wipe] A desert.\nsnow\n0:12")
    graph.save_memory(board)
    error = failure(host, graph)
    assert error["node_id"] == board and error["exception_type"] == "ValueError"
    for words in ('line 2 ("0:06 [wipe] A desert.")', "[wipe] is not known", 'line 3 ("snow")', "begin with a time"):
        assert words in error["exception_message"]


def test_a_bad_line_over_a_wire_is_named(host, graph, demo):
    text = graph.add("PrimitiveStringMultiline", value="0:00 A meadow.\n0:06 [wipe] A desert.\n0:12")
    board = add_storyboard(graph, demo, [text, 0])
    graph.save_memory(board)
    error = failure(host, graph)
    assert error["node_id"] == board and error["exception_type"] == "ValueError"
    assert 'line 2 ("0:06 [wipe] A desert."): [wipe] is not known' in error["exception_message"]


def test_a_line_without_a_chunk_is_named(host, graph, demo):
    board = add_storyboard(graph, demo, "0:00 A meadow.\n0:03 A desert.\n0:03.2 Snow.\n0:06")
    graph.save_memory(board)
    error = failure(host, graph)
    assert error["node_id"] == board
    assert 'line 2 ("0:03 A desert."): 0.2 s is too short' in error["exception_message"]


def test_demo_storyboard_makes_the_video(host, object_info):
    prompt = to_api(template("Tutorial 2"), object_info)
    run = succeeded(host.run(prompt))
    (shown,) = run.outputs[only(prompt, "ContextForcingSaveVideo")]["images"]
    assert host.output_path(shown).stat().st_size > 10_000
    made = text_shown(run, only(prompt, "PreviewAny")).split("\n")
    assert len(made) == 8 and made[-1] == "0:21"


def test_a_branch_has_the_memory_after_its_segment(host, graph, demo):
    """No segment is made again for it, and what follows equals one storyboard."""
    lines = [f"0 {PROMPTS[0]}", f"0.75 {PROMPTS[1]}", f"1.5 {PROMPTS[2]}", "2.25"]
    board = add_storyboard(graph, demo, "\n".join(lines), seed=24)
    graph.save_memory(board)
    succeeded(host.run(graph.prompt))

    graph.prompt[board]["inputs"]["branch_after"] = 2
    inputs = {"model": [demo, 0], "clip": [demo, 1], "memory": [board, 2], "seed": 24}
    branch = graph.add("ContextForcingStoryboard", **inputs, text=f"0 {PROMPTS[0]}\n0.75")
    saved = graph.save_memory(branch)
    run = succeeded(host.run(graph.prompt))
    assert not lines_run(run, board) and lines_run(run, branch) == [1]

    other = Graph()
    demo = other.add("ContextForcingLoadDemo")
    text = "\n".join([*lines[:2], f"1.5 {PROMPTS[0]}", "2.25"])
    whole = add_storyboard(other, demo, text, seed=24, layout="by layer")
    whole = other.save_memory(whole)
    branched, expected = tensors(host, run, saved), tensors(host, succeeded(host.run(other.prompt)), whole)
    assert all(torch.equal(branched[name], expected[name]) for name in expected)


def test_two_storyboards_with_the_same_lines_make_them_once(host, graph, demo):
    """Of a second branch, which repeats lines: its segments are those of the first storyboard, and equal to the bit."""
    memory = graph.memory(demo)
    wires = {"model": [demo, 0], "clip": [demo, 1], "memory": [memory, 0], "seed": 26}
    lines = [f"0 {PROMPTS[0]}", f"0.75 {PROMPTS[1]}", f"1.5 {PROMPTS[2]}", "2.25"]
    other = "\n".join([*lines[:2], f"1.5 {PROMPTS[0]}", "2.25"])
    graph.save_memory(graph.add("ContextForcingStoryboard", **wires, text="\n".join(lines)))
    branch = graph.add("ContextForcingStoryboard", **wires, text=other)
    saved = graph.save_memory(branch)
    run = succeeded(host.run(graph.prompt))
    assert len(run.previews) == 4, "the two first segments are made once"
    told = [data for data in run.all("executed") if "context_forcing_segment" in (data["output"] or {})]
    assert len(told) == 6, "the page is told about all segments"

    graph.prompt[branch]["inputs"]["layout"] = "by layer"
    again = succeeded(host.run(graph.prompt))
    assert len(again.previews) == 3, "a sampler with other inputs makes its own"
    found, made = tensors(host, run, saved), tensors(host, again, saved)
    assert all(torch.equal(found[name], made[name]) for name in made)


def test_a_branch_after_no_segment_is_refused(host, graph, demo):
    board = add_storyboard(graph, demo, f"0 {PROMPTS[0]}\n0.75", branch_after=2)
    graph.save_memory(board)
    assert failure(host, graph)["exception_message"].startswith("branch_after: 2 is too large, there are 1 segments")


def test_the_page_is_told_about_every_segment(host, graph, demo):
    """A thumbnail, its place, and what is remembered after it."""
    board = add_storyboard(graph, demo, f"0 {PROMPTS[0]}\n1.5 {PROMPTS[1]}\n2.25", seed=25)
    graph.save_memory(board)
    executed = succeeded(host.run(graph.prompt)).all("executed")
    told = [data for data in executed if "context_forcing_segment" in (data["output"] or {})]
    assert [data["node"] for data in told] == [f"{board}.0.0.2", f"{board}.0.0.4"]
    one, two = (data["output"]["context_forcing_segment"][0] for data in told)
    assert (one["begins"], one["ends"], two["begins"], two["ends"]) == (0, 6, 6, 9)
    assert (two["fps"], two["chunk"]) == (16, 3) and two["remembered"]["fast"][-1] == 8
    picture = Image.open(io.BytesIO(base64.b64decode(two["thumbnail"].removeprefix("data:image/jpeg;base64,"))))
    assert max(picture.size) == 192


def test_the_page_asks_the_server_for_segments(host):
    answer = host.post("/context_forcing/storyboard", {"text": "0:00 A meadow.\n0:06"})
    assert [segment["chunks"] for segment in answer["segments"]] == [8]
    assert host.post("/context_forcing/storyboard", {"text": "x"})["reasons"]["1"].startswith("it must begin")
    assert "text: " in host.post("/context_forcing/storyboard", {"text": 1})["error"]
