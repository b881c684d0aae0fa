"""What the page shows of a run, without ComfyUI: texts, and where in a graph the film will be saved."""

import time
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest

SAMPLER, BOARD, SAVE = "ContextForcingSampler", "ContextForcingStoryboard", "ContextForcingSaveVideo"


class Prompt:
    """The part of comfy_execution.graph.DynamicPrompt that nodes use. Ids with a dot are those of an expanded node."""

    def __init__(self, nodes):
        self.nodes = {
            node: {"class_type": kind, "inputs": {**values, **({"memory": [source, 0]} if source else {})}}
            for node, (kind, source, values) in nodes.items()
        }

    def all_node_ids(self):
        return set(self.nodes)

    def get_node(self, node):
        return self.nodes[node]

    def get_parent_node_id(self, node):
        return node.split(".")[0] if "." in node else None


@pytest.fixture
def page(node_module):
    nodes = {
        "1": (SAMPLER, None, {"seconds": 3.0}),
        "2": (SAMPLER, "1", {"seconds": 1.5}),
        "3": (SAMPLER, "1", {"seconds": 6}),
        "4": (SAMPLER, "3", {"seconds": ["9", 0]}),
        "5": (SAVE, "2", {}),
        "6": (BOARD, "4", {"text": ""}),
        "6.1": (SAMPLER, "4", {"seconds": 0.75}),
        "6.2": (SAMPLER, "6.1", {"seconds": 2.25}),
        "7": (SAVE, "6", {}),
        "8": ("ContextForcingMemoryReport", "6", {}),
    }
    return node_module("page").Page("prompt", "1", Prompt(nodes))


def test_seconds_that_follow(page):
    """Along the longest branch, into a storyboard; a connected length is not known yet."""
    assert page.seconds_after("1") == 6 + 0 + 0.75 + 2.25 and page.seconds_after("6.1") == 2.25
    assert page.seconds_after("2") == 0 and page.seconds_after("6.2") == 0


def test_where_a_memory_is_saved(page):
    assert set(page.save_nodes("1")) == {"5", "7"} and page.save_nodes("2") == ["5"]
    assert set(page.save_nodes("6.1")) == set(page.save_nodes("6.2")) == {"7"} and not page.save_nodes("8")


def test_a_storyboard_of_1200_segments(node_module):
    """In less time than a look at all nodes for each of them takes."""
    ids = [f"2.{number}" for number in range(1200)]
    chain = {node: (SAMPLER, before, {"seconds": 0.75}) for before, node in zip(["1", *ids], ids)}
    nodes = {"2": (BOARD, "1", {"text": ""}), **chain, "3": (SAVE, "2", {})}
    graph = Prompt({"1": ("AnyNode", None, {"width": 0}), **nodes})
    began = time.process_time()
    page = node_module("page").Page("prompt", ids[0], graph)
    assert page.seconds_after(ids[0]) == 1199 * 0.75 and page.save_nodes(ids[0]) == ["3"]
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "done, total, speed, text",
    [
        (8.25, 15, 21.4, "8.2 s of 15.0 s, 21 frames/s, 5 s left, memory reaches back 7.5 s"),
        (1, 61, 4, "1.0 s of 61.0 s, 4.0 frames/s, 4 min left, memory reaches back 7.5 s"),
        (15, 15, 21.4, "15.0 s of 15.0 s, 21 frames/s, memory reaches back 7.5 s"),
    ],
)
def test_the_text_of_a_run(node_module, done, total, speed, text):
    assert node_module("progress").describe_progress(done, total, speed, 16, 7.5) == text


def test_without_a_page_there_is_none(node_module, monkeypatch):
    module = node_module("page")
    context = SimpleNamespace(prompt_id="prompt", node_id="1")
    monkeypatch.setattr(module, "PromptServer", SimpleNamespace(instance=SimpleNamespace(client_id=None)))
    for given in (None, context):
        monkeypatch.setattr(module, "get_executing_context", lambda given=given: given)
        assert module.Page.current() is None
    module.PromptServer.instance.client_id = "browser"
    assert module.Page.current().node == "1"


def test_a_preview_without_ffmpeg_is_one_line_of_the_log(node_module, empty_memory, tmp_path, monkeypatch, caplog):
    """A finished segment is not lost: ComfyUI would drop what a node raises an error after."""

    def none_found():
        raise RuntimeError("No ffmpeg exe could be found.")

    module = node_module("progress")
    monkeypatch.setattr(module.Page, "current", lambda: None)
    progress = module.SegmentProgress(empty_memory(), 1, 16.0, None)
    progress._page, progress._viewers, progress._is_last = SimpleNamespace(), ["3"], False
    progress._pictures = [np.zeros((16, 16, 3), np.uint8)]
    monkeypatch.setattr(module.folder_paths, "get_temp_directory", lambda: str(tmp_path))
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none_found)
    assert progress.show_film(("before.mp4",), is_finished=True) == ("before.mp4",)
    assert [record.getMessage()[:45] for record in caplog.records] == ["preview of the film: ffmpeg: there is none (N"]
    assert not list(tmp_path.iterdir())
