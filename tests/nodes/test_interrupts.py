"""Interrupts at random moments of queued prompts, a killed server, and many short runs, in a real ComfyUI."""

import os
import random
import threading
import time
from pathlib import Path

import pytest

from ..faults.drill import SEED, SOAK
from .graph import PROMPTS, film, load_memory_input, memory_file, succeeded
from .host import Host

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.skipif(not SOAK, reason="make soak")]
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def rss(host: Host) -> int:
    """Bytes of the server in memory."""
    return int(Path(f"/proc/{host.process.pid}/statm").read_text().split()[1]) * PAGE


def three_segments(graph, demo, seed):
    """Three samplers of two chunks, and Save Memory, which shows the film of all."""
    memory = graph.memory(demo)
    for prompt in PROMPTS:
        memory = graph.sampler(demo, graph.text(demo, prompt), memory, seconds=1.5, seed=seed)
    return graph.save_memory(memory, prefix=f"interrupts{seed}")


def test_interrupts_at_random_moments(host, graph, demo):
    """Every queued prompt ends, and repeated without an interrupt it has the same latents."""
    rng = random.Random(SEED)
    saved = three_segments(graph, demo, 900)
    began = time.monotonic()
    run = succeeded(host.run(graph.prompt))
    seconds, expected = time.monotonic() - began, film(host, run, saved)
    seeds = [inputs["inputs"] for inputs in graph.prompt.values() if "seed" in inputs["inputs"]]
    ends = []
    for number in range(8):
        for inputs in seeds:
            inputs["seed"] = 901 + number
        timer = threading.Timer(rng.uniform(0, seconds), lambda: host.post("/interrupt", {}))
        timer.start()
        ends.append(host.run(graph.prompt).end)
        timer.join()
        succeeded(host.run(graph.prompt))
    assert set(ends) <= {"execution_success", "execution_interrupted"}
    queue = host.get("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]
    for inputs in seeds:
        inputs["seed"] = 900
    assert film(host, succeeded(host.run(graph.prompt)), saved).equal(expected)


def test_a_killed_server_leaves_memories_that_go_on(comfyui, tmp_path, graph, demo):
    server = Host(comfyui, tmp_path)
    server.start()
    try:
        first = graph.sampler(demo, graph.text(demo), graph.memory(demo), seed=5)
        saved = graph.save_memory(first)
        file = memory_file(server, succeeded(server.run(graph.prompt)), saved)
        second = graph.sampler(demo, graph.text(demo), first, seed=5)
        whole = graph.save_memory(second, prefix="whole")
        expected = film(server, succeeded(server.run(graph.prompt)), whole)
        endless = graph.sampler(demo, graph.text(demo), first, seconds=300.0, seed=6)
        graph.save(endless)
        reply = server.post("/prompt", {"prompt": graph.prompt, "client_id": server.client_id})
        assert "prompt_id" in reply
        time.sleep(random.Random(SEED).uniform(0, 3))
        server.process.kill()
        server.process.wait()
        assert not list((tmp_path / "output").rglob("*.mp4"))
        server.start()
        again = type(graph)()
        loader = again.add("ContextForcingLoadDemo")
        kept = again.add("ContextForcingLoadMemory", file=load_memory_input(server, file))
        last = again.save_memory(again.sampler(loader, again.text(loader), kept, seed=5), prefix="again")
        assert film(server, succeeded(server.run(again.prompt)), last).equal(expected)
    finally:
        server.stop()


def test_short_runs_do_not_grow(host, graph, demo):
    sampler = graph.sampler(demo, graph.text(demo), graph.memory(demo))
    graph.save_memory(sampler, prefix="short")
    sizes = []
    for number in range(max(100, SOAK)):
        graph.prompt[sampler]["inputs"]["seed"] = 5000 + number
        succeeded(host.run(graph.prompt))
        sizes.append(rss(host))
    print(f"short runs: {len(sizes)}, server {sizes[19] / 1e6:.0f} MB after 20, {sizes[-1] / 1e6:.0f} MB at the end")
    assert sizes[-1] - sizes[19] < 40e6
