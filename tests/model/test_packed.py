"""Sink and slow frames in one byte a number: bounded errors, fewer bytes, the same memory in parts and whole."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.packed import LARGEST, TYPES, Packed, pack
from context_forcing.memory.references import Reference
from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.config import PRESETS
from context_forcing.model.network import Network
from context_forcing.model.sampler import KV_PLACEMENTS, SamplerOptions, seeded_noise, working_bytes
from context_forcing.model.wan import WanModel

KINDS = list(TYPES)
SMALL = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)


def roll(sampler, memory, num_chunks):
    for memory in sampler.rollout(memory, num_chunks, sigmas=(1.0, 0.6), noise=seeded_noise(5, memory.latent_size)):
        pass
    return memory


@pytest.fixture(scope="module")
def sampler_in(net, make_sampler):
    """(kv_dtype, placement) -> a sampler."""

    def sampler_in(kv_dtype="auto", kv_placement="at once"):
        options = SamplerOptions(kv_dtype=kv_dtype, kv_placement=kv_placement)
        return dataclasses.replace(make_sampler(net), options=options)

    return sampler_in


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_every_number_is_bounded(kv_dtype, per_channel, dtype):
    x = torch.randn(2, 1, 7, 3, 8) * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[..., 5] *= 40
    x[1, :, :, 2] = 0
    packed = pack(x.to(dtype), kv_dtype, per_channel)
    found, x = packed.unpack(), x.to(dtype).float()
    assert packed.numbers.dtype == TYPES[kv_dtype] and found.dtype == dtype and packed.shape == x.shape
    assert packed.scales.shape == ((2, 1, 1, 3, 8) if per_channel else (2, 1, 1, 3, 1))
    # int8: half a step. fp8 e4m3: 3 bits after the first, and the smallest number it has.
    bound = packed.scales / 2 if kv_dtype == "int8" else torch.maximum(x.abs() / 16, packed.scales * 2**-10)
    rounding = x.abs() * (2**-8 if dtype == torch.bfloat16 else 2**-22)
    assert ((found.float() - x).abs() <= bound * 1.001 + rounding).all()
    largest = packed.numbers.float().abs().amax((-3,) if per_channel else (-3, -1))
    assert ((largest == LARGEST[kv_dtype]) | (largest == 0)).all(), "the whole range is used"
    assert (found[1, :, :, 2] == 0).all()


def test_keys_with_outlier_channels_need_a_scale_per_channel():
    x = torch.randn(1, 1, 64, 2, 32)
    x[..., 3] *= 100
    error = {each: (pack(x, "int8", each).unpack() - x)[..., :3].norm().item() for each in (False, True)}
    assert error[True] < error[False] / 20


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_only_sink_and_slow_are_packed(sampler_in, empty_memory, kv_dtype):
    plain, memory = (roll(sampler_in(kind), empty_memory(**SMALL), 6) for kind in ("auto", kv_dtype))
    assert memory.slots.sink and memory.slots.slow and memory.slots.fast
    for frame, kv in memory.store.frame_kvs():
        kinds = {isinstance(part, Packed) for part in (kv.keys, kv.values)}
        assert kinds == {frame not in memory.slots.fast}
    different = (memory.latent_chunks[-1] - plain.latent_chunks[-1]).norm() / plain.latent_chunks[-1].norm()
    assert 1e-6 < different < 0.2 and torch.equal(memory.latent_chunks[0], plain.latent_chunks[0])
    assert memory.num_bytes < plain.num_bytes


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("policy", ["novel", "recall"])
def test_a_video_in_parts_is_the_same(sampler_in, empty_memory, same_memory, tmp_path, kv_dtype, policy):
    """Chained, from a file, in every placement; the memory before a branch stays as it is."""
    settings = SMALL | dict(policy=policy)
    whole = roll(sampler_in(kv_dtype), empty_memory(**settings), 7)
    half = roll(sampler_in(kv_dtype), empty_memory(**settings), 4)
    before = [tensor.clone() for tensor in half.tensors()]
    assert same_memory(roll(sampler_in(kv_dtype), half, 3), whole)
    roll(sampler_in(), half, 2)
    assert all(map(torch.equal, half.tensors(), before)), "branches do not touch"
    save_memory(tmp_path / "half", half)
    loaded = load_memory(tmp_path / "half")
    assert same_memory(loaded, half) and same_memory(roll(sampler_in(kv_dtype), loaded, 3), whole)
    for placement in KV_PLACEMENTS[1:]:
        assert same_memory(roll(sampler_in(kv_dtype, placement), half, 3), whole)
    assert same_memory(sampler_in(kv_dtype, "by layer").recache(whole), sampler_in(kv_dtype).recache(whole))


def test_references_too(sampler_in, empty_memory):
    memory = empty_memory(**SMALL | dict(sink=2, window=8))
    pinned = memory.with_references([Reference(latents=torch.randn(1, 16, 1, 4, 6))])
    kv = dict(sampler_in("int8").prepare(pinned).store.frame_kvs())[-1]
    assert isinstance(kv.keys, Packed) and isinstance(kv.values, Packed)


def test_a_scale_that_does_not_fit_is_damage(sampler_in, empty_memory, tmp_path):
    memory = roll(sampler_in("int8"), empty_memory(**SMALL), 2)
    frame, kv = next((frame, kv) for frame, kv in memory.store.frame_kvs() if isinstance(kv.keys, Packed))
    broken = dataclasses.replace(kv, keys=dataclasses.replace(kv.keys, scales=kv.keys.scales[:, :, :, :1]))
    store = dataclasses.replace(memory.store, frames={**memory.store.frames, frame: broken})
    save_memory(tmp_path / "broken", dataclasses.replace(memory, store=store))
    with pytest.raises(ValueError, match="damaged: the scales of keys"):
        load_memory(tmp_path / "broken")


def test_what_cannot_be_is_named(sampler_in, empty_memory):
    with pytest.raises(ValueError, match="^kv_dtype: 'int4' is not one of auto, int8, fp8"):
        sampler_in("int4")
    with pytest.raises(ValueError, match="^kv_dtype: .*released"):
        roll(sampler_in("fp8"), empty_memory(**SMALL | dict(policy="released", fast=3, window=6)), 1)


def test_bytes_of_real_students():
    """GB in bf16 at 832x480, docs/performance.md: 15 of 18 frames at half the size."""
    for name, frame_gb in {"wan2.1-1.3b": 6.04 / 21, "wan2.1-14b": 26.8 / 21}.items():
        with torch.device("meta"):
            network = Network(WanModel(PRESETS[name]), torch.device("meta"), torch.bfloat16)
        memory = empty_memory(MemoryConfig(), (16, 60, 104))
        saved = [
            working_bytes(network, memory, name) - working_bytes(network, memory, name, kv_dtype="int8")
            for name in KV_PLACEMENTS
        ]
        saved = [num_bytes / 1e9 for num_bytes in saved]
        assert saved == pytest.approx([7.5 * frame_gb, 7.5 * frame_gb, 0], abs=0.05)
