"""What fits is said before the first chunk; the figures are those of working_bytes."""

import logging

import pytest
import torch

from context_forcing.memory.stores import KV_PLACEMENTS
from context_forcing.model import fit
from context_forcing.model.fit import free_bytes, placements_that_fit, say_what_fits
from context_forcing.model.network import Network
from context_forcing.model.sampler import working_bytes

CPU = torch.device("cpu")


@pytest.fixture
def needed(net, empty_memory):
    network, memory = Network(net, CPU, torch.float32), empty_memory()
    return network, memory, {name: working_bytes(network, memory, name) for name in KV_PLACEMENTS}


def test_each_placement_is_where_its_size_says(needed):
    network, memory, sizes = needed
    for free in (0, *sizes.values(), max(sizes.values()) + 1):
        fits, line = placements_that_fit(network, memory, free)
        assert fits == [name for name in KV_PLACEMENTS if sizes[name] <= free]
        first, second = line.split("; fits: ")[1].split("; does not: ")
        assert all((name in first) == (name in fits) and (name in second) != (name in fits) for name in KV_PLACEMENTS)


def test_free_is_what_the_device_and_torchs_cache_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 150)
    assert free_bytes(torch.device("cuda")) == 750 and free_bytes(CPU) is None


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_warns_if_the_chosen_one_does_not_fit(needed, monkeypatch, caplog, share):
    network, memory, sizes = needed
    least, most = sizes["from RAM"], sizes["at once"]
    assert least < most
    free = {0.0: 0, 0.5: least, 1.0: most}[share]
    monkeypatch.setattr(fit, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO, "context_forcing"):
        say_what_fits(network, memory, "at once")
    first, *warnings = [record.getMessage() for record in caplog.records]
    assert first.startswith("memory: ") and "does not" in first
    words = {0.0: ["choose a smaller size"], 0.5: ["makes the same video"], 1.0: []}[share]
    assert len(warnings) == len(words) and all(word in line for word, line in zip(words, warnings))
