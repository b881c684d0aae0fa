"""The forward pass: a rollout over a memory is one causal pass, and what must not be seen changes nothing."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from context_forcing.memory import MemoryView
from context_forcing.model.attention import sdpa
from context_forcing.model.causal import TextContext, causal_forward, compiled, embed_text
from context_forcing.model.network import Network
from context_forcing.model.rope import rotary_table, rotate

GRID, HEAD_DIM, TOKENS = (2, 3), 32, 6
CPU = torch.device("cpu")
KEEP_ALL = dict(sink=3, slow=0, fast=18)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class BlockCausal:
    """Plain attention of a whole clip at positions 0 .. T - 1: a frame sees its own chunk and those before."""

    def __init__(self, num_frames, chunk):
        self.table = rotary_table(torch.arange(num_frames), *GRID, HEAD_DIM)
        chunk_of = (torch.arange(num_frames) // chunk).repeat_interleave(TOKENS)
        self.mask = chunk_of[None, :] <= chunk_of[:, None]
        self.new_kv = []

    def __call__(self, layer, q, k, v, inside):
        self.new_kv.append((k, v))
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (rotate(q, self.table), rotate(k, self.table), v))
        scores = (q @ k.mT) / HEAD_DIM**0.5
        out = scores.masked_fill(~self.mask, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).unflatten(1, (-1, TOKENS))


def flow_over(sampler, memory, x, t):
    """Flow of a chunk at timestep `t` against a memory."""
    attend = sampler.network.attend(sampler.view(memory), x.shape[2], memory.latent_size)
    return sampler.network.flow(x, t / 1000, sampler.text, attend)


def attention_to(net, view, num_frames, attention=sdpa):
    """Self-attention of a chunk over a view."""
    return Network(net, CPU, torch.float32, attention).attend(view, num_frames, (16, 4, 6))


@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_rollout_is_one_block_causal_pass(net, make_sampler, empty_memory, chunk):
    """Nothing is evicted: flows, keys and values of commit passes equal those of the whole clip at once."""
    sampler, clip = make_sampler(net), random(1, 16, 12, 4, 6)
    whole = BlockCausal(12, chunk)
    expected = causal_forward(net, clip, torch.zeros(1, 12), sampler.text, whole)

    memory, flows = empty_memory(**KEEP_ALL | dict(chunk=chunk)), []
    for part in clip.split(chunk, dim=2):
        flows.append(flow_over(sampler, memory, part, 0.0))
        memory = sampler.commit(memory, part)
    assert relative(torch.cat(flows, dim=2), expected) < 1e-5
    assert memory.slots.all == tuple(range(12))
    for frame, held in memory.store.frames.items():
        for layer, (k, v) in enumerate(whole.new_kv):
            assert relative(held.keys[layer], k[:, frame]) < 1e-5
            assert relative(held.values[layer], v[:, frame]) < 1e-5


def test_a_noisy_chunk_over_clean_ones_is_one_pass_with_a_time_per_frame(net, make_sampler, empty_memory):
    sampler, clip = make_sampler(net), random(1, 16, 9, 4, 6)
    memory = empty_memory(**KEEP_ALL)
    for part in clip[:, :, :6].split(3, dim=2):
        memory = sampler.commit(memory, part)
    timestep = torch.tensor([[0.0] * 6 + [937.5] * 3])
    expected = causal_forward(net, clip, timestep, sampler.text, BlockCausal(9, 3))[:, :, 6:]
    assert relative(flow_over(sampler, memory, clip[:, :, 6:], 937.5), expected) < 1e-5
    assert relative(flow_over(sampler, memory, clip[:, :, 6:], 0.0), expected) > 1e-3, "the time must matter"


def test_frames_of_a_chunk_see_each_other_in_both_directions(net, make_sampler, empty_memory):
    sampler, memory, x = make_sampler(net), empty_memory(), random(1, 16, 3, 4, 6)
    before = flow_over(sampler, memory, x, 500.0)
    x[:, :, 2] += 1
    assert relative(flow_over(sampler, memory, x, 500.0)[:, :, 0], before[:, :, 0]) > 1e-3


def test_a_future_frame_changes_nothing(net, make_sampler, empty_memory):
    sampler, clip = make_sampler(net), random(1, 16, 12, 4, 6)

    def keys_of_first_chunks(clip):
        memory = empty_memory(**KEEP_ALL)
        for part in clip.split(3, dim=2):
            memory = sampler.commit(memory, part)
        return torch.stack([memory.store.frames[frame].keys for frame in range(9)])

    before = keys_of_first_chunks(clip)
    clip[:, :, 9:] = 7
    assert torch.equal(keys_of_first_chunks(clip), before)


@pytest.mark.parametrize("changed, visible", [(0, True), (1, False), (2, False), (3, False), (4, True), (5, True)])
def test_a_forgotten_frame_changes_nothing(make_net, make_sampler, empty_memory, changed, visible):
    """One layer: keys come from a frame's own pixels, so that nothing of it can live on in later frames' keys."""
    sampler, clip = make_sampler(make_net(num_layers=1)), random(1, 16, 6, 4, 6)

    def flow(clip):
        memory = empty_memory(sink=1, slow=0, fast=4, chunk=2)
        for part in clip.split(2, dim=2):
            memory = sampler.commit(memory, part)
        assert memory.slots.all == (0, 4, 5)
        return flow_over(sampler, memory, random(1, 16, 2, 4, 6, seed=1), 750.0)

    before = flow(clip)
    clip[:, :, changed] += 1
    assert torch.equal(flow(clip), before) != visible


def test_keys_are_remembered_before_rotation(net, make_sampler, empty_memory):
    """The same pictures remembered at other absolute times give the same chunk: only ranks are seen."""
    make = lambda: empty_memory(sink=0, slow=0, fast=4, chunk=2)
    sampler, last = make_sampler(net), random(1, 16, 2, 4, 6, seed=9)
    short = sampler.commit(make(), last)
    long = make()
    for seed in range(4):
        long = sampler.commit(long, random(1, 16, 2, 4, 6, seed=seed))
    long = long.append(last, [short.store.frames[frame] for frame in short.slots.all])
    x = random(1, 16, 2, 4, 6, seed=1)
    assert long.num_frames == 10
    assert torch.equal(flow_over(sampler, short, x, 500.0), flow_over(sampler, long, x, 500.0))


@pytest.mark.parametrize("hidden", [0, 1, 2, 4])
def test_restrict_to_hides_frames_and_moves_none(net, make_sampler, empty_memory, hidden):
    sampler, memory = make_sampler(net), empty_memory(sink=0, slow=0, fast=6, chunk=2)
    for seed in range(2):
        memory = sampler.commit(memory, random(1, 16, 2, 4, 6, seed=seed))
    view = sampler.view(memory)
    assert view.num_frames == 4 and view.layers[0].keys.shape[1:3] == (4 + 2, TOKENS)

    def masked(q, k, v, bias=None):
        """The full view, its first frames struck out by hand."""
        if bias is None:
            bias = torch.zeros(1, 1, 1, k.shape[1])
            bias[..., : hidden * TOKENS] = -torch.inf
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    x, t = random(1, 16, 2, 4, 6, seed=5), torch.full((1, 2), 500.0)
    less = attention_to(net, dataclasses.replace(view, num_sink=hidden).restrict_to("no sink"), 2)
    by_hand = attention_to(net, view, 2, masked)
    got = causal_forward(net, x, t, sampler.text, less)
    assert relative(got, causal_forward(net, x, t, sampler.text, by_hand)) < 1e-5
    all_seen = causal_forward(net, x, t, sampler.text, attention_to(net, view, 2))
    assert (relative(got, all_seen) > 1e-3) == (hidden > 0)


def padded_text(net, text):
    """What Wan does: zero rows up to text_len, all attended to, no mask (docs/method.md, Text)."""
    embedded = net.text_embedding(F.pad(text, (0, 0, 0, net.text_len - text.shape[1])))
    heads = lambda x: x.unflatten(-1, (net.config.num_heads, -1))
    attn = [block.cross_attn for block in net.blocks]
    return TextContext(
        tuple(heads(a.norm_k(a.k(embedded))) for a in attn), tuple(heads(a.v(embedded)) for a in attn), None
    )


@pytest.mark.parametrize("text_len", [16, 512])
@pytest.mark.parametrize("used", [0, 1, 5, 15, 16])
@pytest.mark.parametrize("zero_rows_given", [False, True])
def test_zero_rows_of_text_are_merged_exactly(make_net, text_len, used, zero_rows_given):
    net = make_net(text_len=text_len)
    text = random(1, used, 32, seed=3)
    expected = padded_text(net, text)
    if zero_rows_given:
        text = F.pad(text, (0, 0, 0, text_len - used))
    merged = embed_text(net, text)
    assert merged.keys[0].shape[1] == min(used + 1, text_len)
    x, t = random(1, 16, 3, 4, 6), torch.full((1, 3), 500.0)
    attend = attention_to(net, MemoryView(), 3)
    flow = causal_forward(net, x, t, merged, attend)
    assert relative(flow, causal_forward(net, x, t, expected, attend)) < 1e-5


def test_padding_takes_part_in_attention(net):
    text = random(1, 5, 32)
    x, t = random(1, 16, 3, 4, 6), torch.full((1, 3), 500.0)
    attend = attention_to(net, MemoryView(), 3)
    padded = embed_text(net, text)
    bare = TextContext(tuple(k[:, :5] for k in padded.keys), tuple(v[:, :5] for v in padded.values), None)
    assert relative(causal_forward(net, x, t, bare, attend), causal_forward(net, x, t, padded, attend)) > 1e-3


def test_a_zero_row_between_words_keeps_its_place(net):
    text = random(1, 5, 32)
    text[:, 2] = 0
    x, t = random(1, 16, 3, 4, 6), torch.full((1, 3), 500.0)
    attend = attention_to(net, MemoryView(), 3)
    flow = causal_forward(net, x, t, embed_text(net, text), attend)
    assert relative(flow, causal_forward(net, x, t, padded_text(net, text), attend)) < 1e-5


def test_text_too_long(net):
    with pytest.raises(ValueError, match="17 rows.*16"):
        embed_text(net, random(1, 17, 32))


def test_text_groups_are_separate_passes(net):
    """Runs of frames with a text each, isolated from each other, equal passes of their own."""
    texts, clip = random(4, 5, 32), random(2, 16, 6, 4, 6)
    texts[1, 3:] = 0
    t = torch.tensor([[900.0] * 3 + [300.0] * 3]).expand(2, -1)
    alone = attention_to(net, MemoryView(), 3)

    def isolated(layer, q, k, v, inside):
        return torch.cat([alone(layer, *part, inside) for part in zip(*(x.split(3, dim=1) for x in (q, k, v)))], dim=1)

    flow = causal_forward(net, clip, t, embed_text(net, texts, num_groups=2), isolated)
    for b in range(2):
        for g in range(2):
            run = slice(3 * g, 3 * g + 3)
            text = embed_text(net, texts[2 * b + g : 2 * b + g + 1])
            own = causal_forward(net, clip[b : b + 1, :, run], t[b : b + 1, run], text, alone)
            assert relative(flow[b : b + 1, :, run], own) < 1e-5


def test_blocks_compile_once_whatever_the_memory_holds(make_net, make_sampler, empty_memory):
    """Three parts of a block and rotation, for all of twelve blocks, all memories, another sampler."""
    torch._dynamo.reset()
    counter, net = torch._dynamo.testing.CompileCounter(), make_net(num_layers=12)
    noise = lambda frame, step: random(1, 16, 4, 6, seed=frame)

    def rollout(sampler):
        memory = empty_memory(sink=1, slow=2, fast=4)
        *_, memory = sampler.rollout(memory, 4, sigmas=(1.0, 0.5), noise=noise)
        return torch.cat(memory.latent_chunks, dim=2)

    with torch.inference_mode():
        plain = rollout(make_sampler(net))
        for _ in range(2):
            made = rollout(make_sampler(net, run=compiled(backend=counter)))
            assert relative(made, plain) < 1e-5
            assert counter.frame_count == 4


def test_layers_get_three_dimensions(make_net, make_sampler, empty_memory):
    """ComfyUI's fast layers for fp8 take no more; others would be slow without a word."""
    net, seen = make_net(), []
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].ndim)))
    sampler = make_sampler(net)
    flow_over(sampler, empty_memory(), random(1, 16, 3, 4, 6), 500.0)
    inside = {module for block in net.blocks for module in block.modules()}
    assert {ndim for module, ndim in seen if module in inside} == {3}
