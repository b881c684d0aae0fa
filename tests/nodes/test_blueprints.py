"""The subgraph blueprints in a real ComfyUI: they are in its library, and what is inside runs."""

import json

import pytest
import torch

from .graph import FOLDER, film, succeeded
from .host import CHECKOUT, PACK, to_api

pytestmark = [pytest.mark.host, pytest.mark.slow]

NAMES = sorted(path.stem for path in (CHECKOUT / "subgraphs").glob("*.json"))
OUTSIDE = "-10"
"""Id of the node inside a subgraph that stands for its inputs."""
TWO_CHUNKS = "0:00 A meadow by day. The camera pans right.\n0:01.5"


def subgraph(name: str) -> dict:
    workflow = json.loads((CHECKOUT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (found,) = workflow["definitions"]["subgraphs"]
    assert [node["type"] for node in workflow["nodes"]] == [found["id"]]
    return found


def unpacked(name: str, values: dict, object_info: dict) -> tuple[dict, dict[str, list]]:
    """The nodes of a blueprint as a prompt, and where its outputs come from. `values` are what its inputs get."""
    inside = subgraph(name)
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in inside["links"]]
    prompt = to_api({"nodes": inside["nodes"], "links": links}, object_info)
    names = [entry["name"] for entry in inside["inputs"]]
    assert values.keys() <= set(names)
    sources = {link["id"]: [str(link["origin_id"]), link["origin_slot"]] for link in inside["links"]}
    prefix = lambda link: [f"{name} {link[0]}", link[1]]

    def outer(value):
        if not isinstance(value, list):
            return value
        return values[names[value[1]]] if value[0] == OUTSIDE else prefix(value)

    for node in prompt.values():
        node["inputs"] = {key: outer(value) for key, value in node["inputs"].items()}
    outputs = {entry["name"]: prefix(sources[entry["linkIds"][0]]) for entry in inside["outputs"]}
    return {f"{name} {node}": entry for node, entry in prompt.items()}, outputs


def test_they_are_in_the_library(host):
    entries = host.get("/global_subgraphs").items()
    served = {entry["name"]: key for key, entry in entries if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert sorted(served) == NAMES
    for name, key in served.items():
        data = json.loads(host.get(f"/global_subgraphs/{key}")["data"])
        assert [entry["name"] for entry in data["definitions"]["subgraphs"]] == [name]


def test_continue_and_branch_go_on_from_the_same_past(host, graph, demo, object_info):
    """One video is continued once, and branched from where the continuation ends."""
    start = graph.sampler(demo, graph.text(demo), graph.memory(demo), seconds=0.75)
    wires = {"model": [demo, 0], "clip": [demo, 1], "vae": [demo, 2]}
    values = {**wires, "memory": [start, 0], "text": TWO_CHUNKS, "seed": 7, "filename_prefix": "video/continued"}
    more, continued = unpacked("Continue a Long Video", values, object_info)
    futures = {"text_A": TWO_CHUNKS, "text_B": TWO_CHUNKS.replace("right", "left"), "seed_A": 7, "seed_B": 7}
    two, branched = unpacked("Branch a Long Video", {**wires, **futures, "memory": continued["memory"]}, object_info)
    graph.prompt |= more | two
    kept = {}
    for name in ("memory_A", "memory_B"):
        inputs = {"memory": branched[name], "filename_prefix": f"{FOLDER}/{name}", "form": "compact"}
        graph.prompt[name] = {"class_type": "ContextForcingSaveMemory", "inputs": inputs}
        kept[name] = name
    run = succeeded(host.run(graph.prompt))
    a, b = (film(host, run, name) for name in kept)
    assert a.shape[2] == b.shape[2] == 3 + 6 + 6
    assert torch.equal(a[:, :, :9], b[:, :, :9]) and not torch.equal(a[:, :, 9:], b[:, :, 9:])
    videos = [node for node, entry in graph.prompt.items() if entry["class_type"] == "ContextForcingSaveVideo"]
    assert len(videos) == 3 and set(videos) <= set(run.outputs)
