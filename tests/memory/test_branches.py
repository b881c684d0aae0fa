"""Several futures of one memory hold the past once."""

import subprocess
import sys

import pytest

SCRIPT = """
import gc, os, sys
import torch
from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.stores import FrameKV

def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

FRAME = 4 * 2**20  # bytes of keys, and of values, of a frame
def go_on(memory, chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(chunks):
        # Pages that are written count: every frame is as new to the policy as its noise.
        kv = lambda: torch.randn(4, 1, 8, 2, FRAME // 4 // 16 // 4, generator=generator)
        memory = memory.append(torch.zeros(1, 16, 3, 4, 4), [FrameKV(kv(), kv()) for _ in range(3)])
    return memory

trunk = go_on(empty_memory(MemoryConfig(), (16, 4, 4)), 8, 0)
before = resident()
futures = [go_on(trunk, 3, seed) for seed in (1, 2, 3)]
grown = resident() - before
unique = lambda memories: {t.data_ptr(): t.nbytes for memory in memories for t in memory.store.tensors()}
new = sum(unique([trunk, *futures]).values()) - sum(unique([trunk]).values())
print(trunk.num_bytes, new, grown)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_three_futures_hold_the_past_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    trunk, new, grown = map(int, done.stdout.split())
    assert trunk == 18 * 8 * 2**20
    assert new == 3 * 9 * 8 * 2**20, "nine new frames each, all else shared"
    assert grown < 1.5 * new, "and nothing beside it; three copies of the past would be 2.9 times that"
