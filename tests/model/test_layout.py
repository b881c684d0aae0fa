"""How a memory is laid out for the network changes what it costs, not what is made; what it costs is known before."""

import pytest
import torch

from context_forcing.benchmark.clock import peak_bytes
from context_forcing.memory import MemoryConfig
from context_forcing.memory import empty_memory as new_empty_memory
from context_forcing.memory.config import MEMORY_PRESETS
from context_forcing.model.config import PRESETS
from context_forcing.model.network import Network
from context_forcing.model.sampler import COMMIT_ATTENDS, KV_PLACEMENTS, seeded_noise, working_bytes
from context_forcing.model.wan import WanModel

SMALL = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)


def roll(sampler, memory, num_chunks, sigmas=(1.0, 0.6)):
    for memory in sampler.rollout(memory, num_chunks, sigmas=sigmas, noise=seeded_noise(5, memory.latent_size)):
        pass
    return memory


@pytest.mark.parametrize("commit_attends", COMMIT_ATTENDS)
@pytest.mark.parametrize("layout", KV_PLACEMENTS[1:])
def test_layouts_make_the_same_memory(net, make_sampler, empty_memory, same_memory, layout, commit_attends):
    first, other = (
        make_sampler(net, commit_attends=commit_attends, kv_placement=choice) for choice in (KV_PLACEMENTS[0], layout)
    )
    expected = roll(first, empty_memory(**SMALL), 6)
    made = roll(other, empty_memory(**SMALL), 6)
    assert same_memory(made, expected)
    assert same_memory(other.recache(made), first.recache(expected))


def test_an_unknown_layout_is_named(net, make_sampler):
    with pytest.raises(ValueError, match="^kv_placement: 'everywhere' is not one of at once, by layer, from RAM"):
        make_sampler(net, kv_placement="everywhere")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["slow-fast", "released"])
@pytest.mark.parametrize("layout", KV_PLACEMENTS)
@pytest.mark.parametrize("num_layers, dtype", [(8, torch.bfloat16), (24, torch.bfloat16), (8, torch.float32)])
def test_working_bytes_are_what_a_chunk_takes(make_net, make_sampler, name, layout, num_layers, dtype):
    """Feed-forward and window in the proportions of Wan 2.1."""
    latent_size = (16, 16, 24)
    net = make_net(dim=128, ffn_dim=448, num_layers=num_layers, text_len=64).to(dtype)
    sampler = make_sampler(net, text=torch.randn(1, 20, 32), dtype=dtype, kv_placement=layout)
    config = MEMORY_PRESETS[name]
    memory = roll(sampler, new_empty_memory(config, latent_size), 14, (1.0,))
    held = [len(layer.frames) for layer in memory.store.layers] if config.per_layer else [len(memory.slots.all)]
    assert set(held) == {config.num_slots if config.per_layer else config.capacity}, "it is full"
    noise = seeded_noise(1, latent_size)
    # Text keys, and a memory that is not in RAM, are there before the chunk and count too.
    there = sampler.text.num_bytes + (memory.num_bytes if layout != "from RAM" else 0)
    taken = there + peak_bytes(torch.device("cpu"), lambda: sampler.generate_chunk(memory, (1.0, 0.5), noise))
    predicted = working_bytes(sampler.network, memory, layout, sampler.text)
    assert predicted == pytest.approx(taken, rel=0.05)
    longest = sampler.network.embed_text(torch.randn(1, 64, 32))
    assert working_bytes(sampler.network, memory, layout) - predicted == longest.num_bytes - sampler.text.num_bytes > 0


def test_working_bytes_of_real_students():
    """GB in bf16 at 832x480: keys and values of 21 frames are 6.04 and 26.8."""
    expected = {"wan2.1-1.3b": (12.5, 6.7, 1.7), "wan2.1-14b": (54.6, 28.4, 6.1)}
    for name, sizes in expected.items():
        with torch.device("meta"):
            network = Network(WanModel(PRESETS[name]), torch.device("meta"), torch.bfloat16)
        memory = new_empty_memory(MemoryConfig(), (16, 60, 104))
        found = [working_bytes(network, memory, layout) / 1e9 for layout in KV_PLACEMENTS]
        assert found == pytest.approx(sizes, abs=0.06)
        # 18 frames twice and 3 of the chunk twice; 18 and 3; 3: the rest is the work of one layer, or of two.
        frame = {"wan2.1-1.3b": 6.04 / 21, "wan2.1-14b": 26.8 / 21}[name]
        for size, frames in zip(found, (42, 21, 3)):
            assert 0 < size - frames * frame < 2.3


def test_a_student_whose_weights_and_keys_are_in_ram_takes_less_than_8_gb():
    """At 832x480 in bf16: two blocks, what is not a block, and working_bytes."""
    for name in ("wan2.1-1.3b", "wan2.1-14b"):
        with torch.device("meta"):
            net = WanModel(PRESETS[name]).to(torch.bfloat16)
        network = Network(net, torch.device("meta"), torch.bfloat16)
        memory = new_empty_memory(MemoryConfig(), (16, 60, 104))
        size = lambda module: sum(weight.nbytes for weight in module.parameters())
        weights = size(net) - size(net.blocks) + 2 * size(net.blocks[0])
        assert weights + working_bytes(network, memory, "from RAM") < 8e9
