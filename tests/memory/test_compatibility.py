"""Files and fingerprints of released versions: they must never change."""

import dataclasses
import hashlib

import pytest
import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.layer_store import LayerSlots
from context_forcing.memory.snapshot import fingerprint_memory, load_memory, save_memory
from context_forcing.memory.stores import FrameKV

SIZE = (16, 2, 4)


def numbers(*shape, first=0):
    """Numbers whose sums are exact on every machine."""
    return (torch.arange(first, first + torch.Size(shape).numel()) * 7 % 17 - 8).reshape(shape) / 8


def of_frames():
    config = MemoryConfig(sink=1, slow=2, fast=4, chunk=2, window=9, policy="fifo")
    memory = empty_memory(config, SIZE).with_start_latents(numbers(1, 16, 1, 2, 4))
    memory = memory.begin("a meadow", 7, numbers(1, 3, 8))
    for chunk in range(5):
        keys = torch.stack([numbers(1, 2, 2, 1, 4, first=50 * chunk + layer) for layer in range(2)])
        values = torch.stack([numbers(1, 2, 2, 1, 4, first=layer) for layer in range(2)])
        new_kv = [FrameKV(keys[:, :, t], values[:, :, t]) for t in range(2)]
        memory = memory.append(numbers(1, 16, 2, 2, 4, first=chunk), new_kv)
    slots = dataclasses.replace(memory.slots, similarity_to_previous=(0.5, None))
    memory = dataclasses.replace(memory, store=dataclasses.replace(memory.store, slots=slots))
    return memory.begin("snow 'at' \"night\"", 8, numbers(1, 2, 8), "recache")


def of_layers():
    config = MemoryConfig(sink=2, slow=2, fast=4, chunk=2, policy="released", slow_similarity_threshold=0.9)
    memory, layers = empty_memory(config, SIZE).begin("a meadow", 7, numbers(1, 3, 8)), [LayerSlots(), LayerSlots()]
    for chunk in range(5):
        for step in range(2):
            keys, values = (numbers(1, 2, 2, 1, 4, first=9 * chunk + 5 * step + n) for n in range(2))
            layers = [layer.take(config, 2 * chunk, keys, values) for layer in layers]
        memory = memory.append(numbers(1, 16, 2, 2, 4, first=chunk), layers)
    return memory


MEMORIES = {
    "frames": (of_frames, "c5a6be14a0bbc3f0", "a83d0822698e2f0c35f757263ffe332d4de9c0298479ef8ca98e07f66a70d3e9"),
    "compact": (
        lambda: of_frames().compact(),
        "99e032cf867aa86b",
        "a21e22efddb89d68a39ea943506083fde76e7598db0f2c5b1329956c75993ca7",
    ),
    "layers": (of_layers, "8dff574205f5f1f6", "3bf6bae7a349465b203b1e0a1b75a07266917b97a5da97d1b14bb15cc2b0c548"),
    "empty": (
        lambda: empty_memory(MemoryConfig(), SIZE),
        "e09c03f4b44c8e85",
        "e78c4352d63bb59e8d5af138f32e4ca1602c81f525c770b44f1422748e5e7a78",
    ),
}
"""How a memory is made; its fingerprint, and the SHA-256 of its file."""


@pytest.mark.parametrize("make, fingerprint, sha256", MEMORIES.values(), ids=MEMORIES)
def test_fingerprints_and_files_stay(tmp_path, make, fingerprint, sha256):
    memory = make()
    assert fingerprint_memory(memory) == fingerprint
    save_memory(tmp_path / "memory", memory)
    content = (tmp_path / "memory").read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256
    save_memory(tmp_path / "again", load_memory(tmp_path / "memory"))
    assert (tmp_path / "again").read_bytes() == content
