"""CPU threads for inference: few for a small network, and the user's own number wins."""

import pytest
import torch
from torch import nn

from context_forcing.model import device


@pytest.mark.parametrize(
    "parameters, environment, before, expected",
    [(10, None, 8, 1), (10, "4", 8, 8), (1000, None, 8, 7), (1000, None, 2, 2), (1000, "4", 3, 3)],
)
def test_cpu_threads(monkeypatch, parameters, environment, before, expected):
    """(parameters, OMP_NUM_THREADS, threads before) -> threads, on a machine with 8 cores."""
    threads = [before]
    monkeypatch.setattr(device, "SMALL_NETWORK", 100)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    for _ in range(2):
        device.use_cpu_threads(nn.Linear(parameters, 1, bias=False))
        assert threads[-1] == expected
