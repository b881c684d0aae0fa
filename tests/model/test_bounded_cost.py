"""Once the memory is full, a chunk costs the same operations and bytes however long the video is."""

import os
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.sampler import seeded_noise
from context_forcing.video.pipeline import Pipeline

EARLY, LATE = 12, 160


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@torch.inference_mode()
def test_chunk_160_costs_what_chunk_12_costs():
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cpu"), torch.float32)
    sampler = pipeline.sampler(encode_demo_text("A meadow. The camera pans right."))
    memory = pipeline.empty_memory(policy="fifo")
    noise = seeded_noise(0, memory.latent_size)
    sigmas = pipeline.card.sigmas
    at = {}
    for memory in sampler.rollout(memory, LATE, sigmas=sigmas, noise=noise):
        done = len(memory.latent_chunks)
        if done in (EARLY, LATE // 2, LATE):
            at[done] = memory, resident_bytes()
    early, late = at[EARLY][0], at[LATE][0]
    assert early.num_bytes == late.num_bytes
    film_bytes = sum(chunk.nbytes for chunk in late.latent_chunks[LATE // 2 :])
    assert at[LATE][1] - at[LATE // 2][1] < film_bytes + 8e6

    flops = []
    for start in (early, late):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sampler.generate_chunk(start, sigmas, noise)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
