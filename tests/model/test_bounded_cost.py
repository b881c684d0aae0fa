"""Promise 4: once the memory is full, a chunk costs the same however long the video is."""

import os
import statistics
import time

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.sampler import seeded_noise
from context_forcing.video.pipeline import Pipeline

EARLY, LATE = 12, 160


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
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

    # Memories are values, so both chunks can be made again and again, in turns: load on the machine hits both alike.
    seconds = {EARLY: [], LATE: []}
    for _ in range(15):
        for done, start in ((EARLY, early), (LATE, late)):
            began = time.perf_counter()
            sampler.generate_chunk(start, sigmas, noise)
            seconds[done].append(time.perf_counter() - began)
    ratio = statistics.median(seconds[LATE]) / statistics.median(seconds[EARLY])
    assert 0.9 < ratio < 1.1, ratio
