"""CUDA: the same numbers as the CPU in float32, sane ones in bf16."""

import pytest
import torch

from context_forcing.model.pipeline import Pipeline
from context_forcing.model.story import parse_story

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STORY = parse_story({"segments": [{"prompt": "A meadow. The camera pans right.", "seconds": 6}], "seed": 3})


def film(device, dtype):
    pipeline = Pipeline.load(None, torch.device(device), dtype)
    memory = pipeline.empty_memory()
    for memory in pipeline.tell(STORY, memory):
        pass
    pixels = torch.cat(list(pipeline.decode(memory.film)), dim=2).cpu()
    return torch.cat(memory.film, dim=2), pixels


def test_float32_equals_the_cpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    cpu, cpu_pixels = film("cpu", torch.float32)
    cuda, cuda_pixels = film("cuda", torch.float32)
    assert (cuda - cpu).norm() / cpu.norm() < 1e-3
    assert (cuda_pixels - cpu_pixels).abs().mean() < 1e-2


def test_bf16_makes_the_same_video_at_first():
    cpu, _ = film("cpu", torch.float32)
    cuda, pixels = film("cuda", torch.bfloat16)
    assert torch.isfinite(pixels).all()
    first = slice(0, 3)
    similarity = torch.cosine_similarity(cuda[:, :, first].flatten(), cpu[:, :, first].flatten(), dim=0)
    assert similarity > 0.95
