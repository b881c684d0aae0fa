import asyncio

import pytest

from context_forcing.model.sampler import seeded_noise

from .graph import Graph
from .host import ComfyUI, Host, find_comfyui, template, to_api


@pytest.fixture(scope="session")
def comfyui() -> ComfyUI:
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def host(comfyui, tmp_path_factory):
    """One server for all tests."""
    server = Host(comfyui, tmp_path_factory.mktemp("comfyui"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def object_info(host) -> dict:
    return host.get("/object_info")


@pytest.fixture
def graph():
    return Graph()


@pytest.fixture
def demo(graph):
    return graph.add("ContextForcingLoadDemo")


@pytest.fixture
def demo_chain(object_info) -> dict:
    """The first tutorial as a prompt."""
    return to_api(template("Tutorial 1"), object_info)


@pytest.fixture(scope="session")
def schemas(node_module) -> dict:
    """Schemas of the nodes by id, without ComfyUI."""
    nodes = asyncio.run(node_module("").ContextForcingExtension().get_node_list())
    schemas = [node.define_schema() for node in nodes]
    return {schema.node_id: schema for schema in schemas}


@pytest.fixture
def rollout(net, make_sampler):
    """(memory, chunks) -> the memory continued."""

    def run(memory, chunks=1):
        *_, memory = make_sampler(net).rollout(
            memory, chunks, sigmas=(1.0, 0.5), noise=seeded_noise(0, memory.latent_size)
        )
        return memory

    return run
