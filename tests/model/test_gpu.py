"""CUDA: the same numbers as the CPU in float32, sane ones in bf16."""

import pytest
import torch

from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.demo_text import encode_demo_text
from context_forcing.model.sampler import KV_PLACEMENTS, SamplerOptions, seeded_noise
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import parse_story

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STORY = parse_story({"segments": [{"prompt": "A meadow. The camera pans right.", "seconds": 6}], "seed": 3})


def film(device, dtype):
    pipeline = Pipeline.load(StudentSource().open(), torch.device(device), dtype)
    memory = pipeline.empty_memory()
    for memory in pipeline.generate(STORY.resolve(pipeline.card, memory), memory):
        pass
    pixels = torch.cat(list(pipeline.decode(memory.latent_chunks)), dim=2).cpu()
    return torch.cat(memory.latent_chunks, dim=2), pixels


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


@torch.inference_mode()
def test_layouts_make_the_same_film_and_keep_the_memory_where_they_say():
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cuda"), torch.float32)
    memory = pipeline.empty_memory()
    text, films = encode_demo_text("A meadow. The camera pans right."), []
    for layout in KV_PLACEMENTS:
        sampler = pipeline.sampler(text, SamplerOptions(kv_placement=layout))
        for after in sampler.rollout(memory, 9, sigmas=pipeline.card.sigmas, noise=seeded_noise(3, memory.latent_size)):
            pass
        where = "cpu" if layout == "from RAM" else "cuda"
        assert {held.keys.device.type for held in after.store.frames.values()} == {where}
        films.append(torch.cat(after.latent_chunks, dim=2))
    for film_of_layout in films[1:]:
        assert (film_of_layout - films[0]).norm() / films[0].norm() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_keys_copied_from_ram_while_a_layer_computes_give_the_same_bits(kv_dtype):
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cuda"), torch.bfloat16)
    text, made = encode_demo_text("A meadow. The camera pans right."), []
    for layout in ("at once", "from RAM"):
        memory = pipeline.empty_memory()
        sampler = pipeline.sampler(text, SamplerOptions(kv_placement=layout, kv_dtype=kv_dtype))
        noise = seeded_noise(3, memory.latent_size)
        for memory in sampler.rollout(memory, 9, sigmas=pipeline.card.sigmas, noise=noise):
            pass
        assert {tensor.is_pinned() for tensor in memory.store.tensors()} == {layout == "from RAM"}
        made.append(memory)
    assert made[0].slots == made[1].slots
    assert all(map(torch.equal, made[0].latent_chunks, made[1].latent_chunks))
    at_rest = made[1].to("cpu")
    assert not any(tensor.is_pinned() for tensor in at_rest.store.tensors())


@torch.inference_mode()
def test_one_cuda_graph_of_a_pass_serves_all_later_chunks():
    """When the memory is full, sizes stay: buffers are filled again, and the captured pass is replayed.

    The capture fails if a pass makes the host wait.
    """
    pipeline = Pipeline.load(StudentSource().open(), torch.device("cuda"), torch.bfloat16)
    sampler, memory = pipeline.sampler(encode_demo_text("A meadow.")), pipeline.empty_memory(policy="fifo")
    chunk, noise = memory.config.chunk, seeded_noise(3, memory.latent_size)
    for memory in sampler.rollout(memory, 7, sigmas=pipeline.card.sigmas, noise=noise):
        pass
    x = torch.empty(memory.chunk_shape, device="cuda")
    static, graph = sampler.view(memory), torch.cuda.CUDAGraph()
    a_pass = lambda view: sampler.network.flow(
        x, 0.5, sampler.text, sampler.network.attend(view, chunk, memory.latent_size)
    )
    a_pass(static)
    torch.cuda.synchronize()
    attend = sampler.network.attend(static, chunk, memory.latent_size)
    with torch.cuda.graph(graph):
        flow = sampler.network.flow(x, 0.5, sampler.text, attend)
    for _ in range(3):
        assert static.num_frames == len(memory.slots.all) == memory.config.capacity
        view = sampler.view(memory)
        for buffer, new in zip(static.layers, view.layers, strict=True):
            buffer.keys.copy_(new.keys)
            buffer.values.copy_(new.values)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(flow, a_pass(view), rtol=1e-2, atol=1e-2)
        memory = sampler.generate_chunk(memory, pipeline.card.sigmas, noise)
