"""A student whose blocks wait in CPU memory: every pass enters through it, and nothing else changes."""

import dataclasses

import pytest
import torch

from context_forcing.memory import MemoryConfig
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import StudentCard
from context_forcing.model.offload import Offload
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import SegmentSpec, Story

CPU = torch.device("cpu")
STORY = Story(
    segments=(
        SegmentSpec(prompt="a meadow by day", seconds=2.25),
        SegmentSpec(prompt="a desert at night", seconds=1.5, change="recache"),
    )
)


@pytest.fixture
def student(make_net, tmp_path, save_student):
    """Three blocks: an odd number, so that a block is not always in the same place."""
    memory = MemoryConfig(sink=3, slow=4, fast=6)
    card = StudentCard(base="demo", steps=(1000.0, 500.0), memory=memory, size=(48, 32))
    save_student(tmp_path / "student.safetensors", make_net(text_dim=4096, text_len=512, num_layers=3), card)
    return tmp_path / "student.safetensors"


def test_results_are_those_without_bit_for_bit(student, same_memory):
    made = []
    for offload in (False, True):
        pipeline = Pipeline.load(StudentSource(student).open(), CPU, torch.float32, offload=offload)
        empty = pipeline.empty_memory()
        *_, memory = pipeline.generate(STORY.resolve(pipeline.card, empty), empty)
        made.append(memory)
    assert same_memory(*made)


def test_every_pass_over_a_block_runs_on_copies_of_its_weights(student):
    pipeline = Pipeline.load(StudentSource(student).open(), CPU, torch.float32, offload=True)
    own = {weight.data_ptr() for weight in pipeline.network.net.blocks.parameters()}
    used, call = [], pipeline.network.run

    def watched(module, function, *args):
        if module is pipeline.network.net:
            return call(module, function, *args)

        def inside(block, *args):
            weights = dict(block.named_parameters())
            assert len(weights) == 27 and not own & {weight.data_ptr() for weight in weights.values()}
            used.append(list(pipeline.network.net.blocks).index(block))
            return function(block, *args)

        return call(module, inside, *args)

    pipeline = dataclasses.replace(pipeline, network=dataclasses.replace(pipeline.network, run=watched))
    empty = pipeline.empty_memory()
    next(pipeline.generate(STORY.resolve(pipeline.card, empty), empty))
    # The prompt's keys, two denoising steps and the commit pass.
    assert used == [0, 1, 2] * 4
    assert own == {weight.data_ptr() for weight in pipeline.network.net.blocks.parameters()}, "they are back"


def test_two_blocks_are_on_the_device_and_the_next_is_fetched_ahead(make_net):
    net = make_net(num_layers=5)
    offload = Offload(net, CPU)
    prefetch = offload.prefetch
    room = {weight.data_ptr() for slot in prefetch.slots for weight in slot}
    order = [0, 1, 2, 3, 4, 0, 1, 3, 2]
    for number in order:
        block, after = net.blocks[number], net.blocks[(number + 1) % 5]
        seen = offload(block, lambda block: [weight.clone() for weight in block.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(seen, block.parameters()))
        assert net.blocks[prefetch.ahead] is after
        assert all(map(torch.equal, prefetch.slots[1], after.parameters()))
        assert {weight.data_ptr() for slot in prefetch.slots for weight in slot} == room


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too(student, same_memory):
    """The next block is copied on a stream of its own while one runs."""
    made = []
    for offload in (False, True):
        pipeline = Pipeline.load(StudentSource(student).open(), torch.device("cuda"), torch.float32, offload=offload)
        assert {weight.device.type for weight in pipeline.network.net.blocks.parameters()} == {
            "cpu" if offload else "cuda"
        }
        empty = pipeline.empty_memory()
        *_, memory = pipeline.generate(STORY.resolve(pipeline.card, empty), empty)
        made.append(memory.to("cpu", torch.float32))
    assert same_memory(*made)
