"""The chunk loop: splitting changes nothing, cost and positions are bounded."""

import math

import pytest
import torch

import context_forcing.model.network as network_module
from context_forcing.memory import MemoryConfig
from context_forcing.memory.recall import MAX_READS
from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.config import StudentCard
from context_forcing.model.network import Network
from context_forcing.model.rope import rotary_table
from context_forcing.model.sampler import COMMIT_ATTENDS, SamplerOptions, chunks_for, seeded_noise, working_bytes
from context_forcing.model.sampler import make_sampler as make

SIGMAS = (1.0, 0.9375, 0.625)
SMALL = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)


def roll(sampler, memory, num_chunks, seed=5, sigmas=SIGMAS):
    for memory in sampler.rollout(memory, num_chunks, sigmas=sigmas, noise=seeded_noise(seed, memory.latent_size)):
        pass
    return memory


def film(memory):
    return torch.cat(memory.latent_chunks, dim=2)


RECALL = dict(SMALL, slow=3, fast=3, policy="recall")


@pytest.fixture(scope="module")
def six_chunks(net, make_sampler, empty_memory):
    memory = roll(make_sampler(net), empty_memory(**SMALL), 6)
    assert len(memory.slots.all) == memory.config.capacity
    return memory


@pytest.mark.parametrize("parts", [(2, 4), (1,) * 6, (5, 1)], ids=str)
def test_splitting_changes_nothing(net, make_sampler, empty_memory, same_memory, six_chunks, parts):
    memory = empty_memory(**SMALL)
    for part in parts:
        memory = roll(make_sampler(net), memory, part)
    assert same_memory(memory, six_chunks)


def test_saving_between_changes_nothing(net, make_sampler, empty_memory, same_memory, six_chunks, tmp_path):
    memory = empty_memory(**SMALL)
    for part in (1, 3, 2):
        memory = roll(make_sampler(net), memory, part)
        save_memory(tmp_path / "memory.safetensors", memory)
        memory = load_memory(tmp_path / "memory.safetensors")
    assert same_memory(memory, six_chunks)


def in_segments(net, make_sampler, memory, parts, between=lambda memory: memory):
    """A segment per part, each under a prompt of its own."""
    for prompt, part in enumerate(parts):
        text = torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(prompt))
        memory = memory.begin(f"prompt {prompt}", 5, text)
        for _ in range(part):
            memory = between(roll(make_sampler(net, text=text), memory, 1))
    return memory


@pytest.mark.parametrize("exact", [True, False], ids=["saved", "kept"])
def test_recall_chained_equals_one_run(net, make_sampler, empty_memory, same_memory, tmp_path, exact):
    def through_a_file(memory):
        save_memory(tmp_path / "memory.safetensors", memory)
        return load_memory(tmp_path / "memory.safetensors")

    one = in_segments(net, make_sampler, empty_memory(**RECALL), (4, 3, 3))
    parts = in_segments(net, make_sampler, empty_memory(**RECALL), (4, 3, 3), through_a_file if exact else lambda m: m)
    assert same_memory(one, parts)
    assert [recall.frame for recall in one.recalls] == list(range(2, 22, 2)) and one.recalls[-1].slow == one.slots.slow
    assert any(recall.num_reads for recall in one.recalls), "frames came back"
    assert not one.unread and list(dict(one.store.frame_kvs())) == list(one.slots.all)


def test_recall_costs_one_pass_more_on_average(net, make_sampler, empty_memory):
    passes, memory = [], empty_memory(**RECALL)
    sampler = make_sampler(net, on_pass=lambda: passes.append(1))
    for _ in range(20):
        before, memory = len(passes), roll(sampler, memory, 1)
        assert len(passes) - before == len(SIGMAS) + 1 + memory.recalls[-1].num_reads
        assert memory.recalls[-1].num_reads <= MAX_READS
        assert sum(recall.num_reads for recall in memory.recalls) <= len(memory.recalls)
    assert max(recall.num_reads for recall in memory.recalls) > 1


def test_a_frame_is_read_under_its_own_prompt_as_it_was_committed(net, make_sampler, empty_memory):
    """The first chunk was committed with nothing remembered. Read again with nothing remembered it is the same."""
    first = in_segments(net, make_sampler, empty_memory(**RECALL), (1,))
    later = in_segments(net, make_sampler, empty_memory(**RECALL), (1, 3))
    frame = first.slots.all[-1]
    reader = make_sampler(net, prompt=1, student=later.student)
    again = dict(reader.read(later.restrict_to(()).with_slow([frame])).store.frame_kvs())
    assert torch.equal(again[frame].keys, first.store.frames[frame].keys)
    assert torch.equal(again[frame].values, first.store.frames[frame].values)


def test_a_compact_memory_is_restored_under_the_prompts_of_its_frames(net, make_sampler, empty_memory):
    memory = in_segments(net, make_sampler, empty_memory(**RECALL), (1, 4))
    first = memory.restrict_to(()).with_slow(memory.slots.sink)
    for prompt in (0, 1):
        restored = dict(make_sampler(net, prompt=prompt).restore(first.compact()).store.frame_kvs())
        assert torch.equal(restored[0].keys, memory.store.frames[0].keys), "the sink, committed with nothing remembered"


def test_recache_replaces_the_prompts_of_all_frames(empty_memory):
    one, two, three = (torch.full((1, 5, 32), float(n)) for n in range(3))
    memory = empty_memory(**RECALL).begin("one", 1, one).begin("two", 1, two)
    assert [float(text.mean()) for text in memory.texts] == [0, 1]
    assert [float(text.mean()) for text in memory.begin("three", 1, three).texts] == [0, 1, 2]
    assert [float(text.mean()) for text in memory.begin("three", 1, three, "recache").texts] == [2, 2, 2]


@pytest.mark.parametrize("change", ["flush", "cut", "cut_new_sink"])
def test_recall_does_not_bring_back_what_a_cut_forgot(net, make_sampler, empty_memory, change):
    memory = in_segments(net, make_sampler, empty_memory(**RECALL), (5,))
    kept = set(memory.slots.sink) if change == "cut" else set(memory.slots.sink + memory.slots.fast)
    kept = set() if change == "cut_new_sink" else kept
    memory = roll(make_sampler(net, prompt=1), memory.begin("elsewhere", 5, memory.text, change), 4)
    assert all(frame >= 10 or frame in kept for recall in memory.recalls[5:] for frame in recall.slow)
    assert any(recall.slow for recall in memory.recalls[5:])


def test_a_first_chunk_has_steps_of_its_own(net, make_sampler, empty_memory):
    """The first chunk is the one of a sampler that uses these steps for all chunks; later chunks have fewer."""
    passes = []
    sampler = make_sampler(net, first_sigmas=SIGMAS, on_pass=lambda: passes.append(1))
    counts, memory = [], empty_memory(**SMALL)
    for _ in range(3):
        memory = roll(sampler, memory, 1, sigmas=SIGMAS[:1])
        counts.append(len(passes) - sum(counts))
    assert counts == [len(SIGMAS) + 1, 2, 2], "with the commit"
    assert torch.equal(memory.latent_chunks[0], roll(make_sampler(net), empty_memory(**SMALL), 1).latent_chunks[0])
    one = roll(make_sampler(net), roll(make_sampler(net), empty_memory(**SMALL), 1), 2, sigmas=SIGMAS[:1])
    assert torch.equal(film(memory), film(one))


def test_the_global_generator_is_neither_read_nor_moved(net, make_sampler, empty_memory, same_memory, six_chunks):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same_memory(roll(make_sampler(net), empty_memory(**SMALL), 6), six_chunks)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_futures_of_one_memory(net, make_sampler, empty_memory, same_memory, six_chunks):
    past = roll(make_sampler(net), empty_memory(**SMALL), 3)
    other = roll(make_sampler(net, prompt=1), past, 3)
    assert not torch.equal(film(other), film(six_chunks))
    assert torch.equal(film(other)[:, :, :6], film(six_chunks)[:, :, :6])
    assert same_memory(roll(make_sampler(net), past, 3), six_chunks)


def test_seed_and_prompt_matter(net, make_sampler, empty_memory, six_chunks):
    assert not torch.equal(film(roll(make_sampler(net), empty_memory(**SMALL), 6, seed=6)), film(six_chunks))
    assert not torch.equal(film(roll(make_sampler(net, prompt=2), empty_memory(**SMALL), 6)), film(six_chunks))


def test_noise_is_a_function_of_seed_frame_and_step():
    noise = seeded_noise(3, (16, 4, 6))
    first = noise(7, 2)
    noise(8, 2), noise(7, 0)
    assert torch.equal(noise(7, 2), first) and torch.equal(seeded_noise(3, (16, 4, 6))(7, 2), first)
    others = [noise(8, 2), noise(6, 2), noise(7, 1), noise(2, 7), seeded_noise(4, (16, 4, 6))(7, 2)]
    assert all(not torch.equal(other, first) for other in others)


def test_noise_is_asked_for_by_absolute_frame_and_step(net, make_sampler, empty_memory):
    memory, asked = empty_memory(**SMALL), []
    draw = seeded_noise(5, memory.latent_size)

    def noise(frame, step):
        asked.append((step, frame))
        return draw(frame, step)

    for _ in range(3):
        *_, memory = make_sampler(net).rollout(memory, 1, sigmas=SIGMAS, noise=noise)
    assert asked == [(step, 2 * c + t) for c in range(3) for step in range(3) for t in range(2)]


def test_noise_is_standard_normal_and_independent():
    noise = seeded_noise(0, (16, 8, 16))
    drawn = torch.stack([noise(frame, step).flatten() for frame in range(20) for step in range(4)])
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    assert (drawn.corrcoef() - torch.eye(80)).abs().max() < 0.15


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_any_seed_of_a_node(seed):
    assert seeded_noise(seed, (16, 2, 2))(10**6, 49).isfinite().all()


@pytest.mark.parametrize(
    "seconds, fps, chunk, chunks",
    [(3, 16, 3, 4), (9, 16, 3, 12), (0.76, 16, 3, 2), (0.75, 16, 3, 1), (0.01, 16, 3, 1), (60, 16, 3, 80),
     (1, 16, 1, 4), (2.25, 16, 3, 3), (0.1 + 0.2 + 0.45, 16, 3, 1), (1, 24, 3, 2), (1.01, 24, 3, 3)],
)  # fmt: skip
def test_seconds_round_up_to_chunks(seconds, fps, chunk, chunks):
    assert chunks_for(seconds, fps, chunk) == chunks


@pytest.mark.parametrize("seconds", [0, -1, -0.001, math.nan, math.inf, -math.inf])
def test_no_seconds(seconds):
    with pytest.raises(ValueError, match="^seconds: "):
        chunks_for(seconds, 16, 3)


def test_absurd_seconds():
    with pytest.raises(ValueError, match="^seconds: "):
        chunks_for(1e308, 16, 3)


def test_slow_memory_changes_what_follows_its_first_use(net, make_sampler, empty_memory):
    """Until a frame is evicted both see the same; from then on they do not."""
    sizes = dict(sink=1, fast=4, chunk=2, window=16, policy="fifo")
    with_slow = film(roll(make_sampler(net), empty_memory(slow=11, **sizes), 5))
    without = film(roll(make_sampler(net), empty_memory(slow=0, **sizes), 5))
    # Chunk 0 fills frames 0, 1; chunk 1 leaves 0 | 2, 3: frame 1 goes to slow, or is forgotten, before chunk 2.
    assert torch.equal(with_slow[:, :, :4], without[:, :, :4])
    assert not torch.equal(with_slow[:, :, 4:6], without[:, :, 4:6])


def test_what_the_commit_pass_sees(net, make_sampler, empty_memory):
    """Chunk 0 has no memory to see; later keys depend on the choice, and with them the film."""
    start = roll(make_sampler(net), empty_memory(**SMALL), 3)
    keys = {}
    for choice in COMMIT_ATTENDS:
        memory = roll(make_sampler(net, commit_attends=choice), start, 1)
        assert torch.equal(film(memory), film(roll(make_sampler(net), start, 1))), "denoising sees everything"
        keys[choice] = memory.store.frames[7].keys
        first = roll(make_sampler(net, commit_attends=choice), empty_memory(**SMALL), 1)
        assert torch.equal(
            first.store.frames[1].keys, roll(make_sampler(net), empty_memory(**SMALL), 1).store.frames[1].keys
        )
    assert len({tuple(k.flatten()[-50:].tolist()) for k in keys.values()}) == len(COMMIT_ATTENDS)


def kv_of(memory, frames):
    return [getattr(memory.store.frames[frame], part) for frame in frames for part in ("keys", "values")]


def close(some, others):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(some, others, strict=True))


def test_itself_writes_what_an_empty_memory_would(net, make_sampler, empty_memory):
    """Raw keys and values depend on relative positions only, so the chunk's place is of no account."""
    start, x0 = roll(make_sampler(net), empty_memory(**SMALL), 3), torch.randn(1, 16, 2, 4, 6)
    alone = kv_of(make_sampler(net).commit(empty_memory(**SMALL), x0), (0, 1))
    for choice in COMMIT_ATTENDS:
        written = kv_of(make_sampler(net, commit_attends=choice).commit(start, x0), (6, 7))
        assert close(written, alone) == (choice == "itself")


def test_itself_holds_for_a_recache(net, make_sampler, empty_memory):
    """Every chunk is computed without the others: of chunks of one frame, under one prompt, nothing changes."""
    sizes = dict(sink=1, slow=2, fast=3, chunk=1, window=6, slow_similarity_threshold=0.999)
    for choice in COMMIT_ATTENDS:
        sampler = make_sampler(net, commit_attends=choice)
        memory = roll(sampler, empty_memory(**sizes), 9)
        frames = memory.slots.all
        assert len(frames) == 5 and frames[-1] == 8, "some frames are forgotten"
        assert close(kv_of(sampler.recache(memory), frames), kv_of(memory, frames)) == (choice == "itself")
    again = make_sampler(net, prompt=1, commit_attends="itself").recache(memory)
    for frame in frames:
        first = make_sampler(net, prompt=1).commit(empty_memory(**sizes), memory.latents_of((frame,)))
        assert close(kv_of(again, (frame,)), kv_of(first, (0,)))


def test_the_card_says_what_the_commit_pass_attends_to_unless_the_options_do(net, make_sampler):
    network, text = make_sampler(net).network, torch.randn(1, 5, net.config.text_dim)
    card = StudentCard(commit_attends="no sink")
    assert make(network, card, text).commit_attends == "no sink"
    assert make(network, card, text, SamplerOptions(commit_attends="all")).commit_attends == "all"
    assert make(network, StudentCard(), text).commit_attends == "all"


@pytest.mark.parametrize("kind", [SamplerOptions, StudentCard])
def test_unknown_choice_of_the_commit_pass(kind):
    with pytest.raises(ValueError, match="^commit_attends: 'sink' is not one of all, no sink, fast only, itself$"):
        kind(commit_attends="sink")


@pytest.mark.parametrize("sizes", [SMALL, dict(sink=0, slow=3, fast=3, chunk=1, window=6, policy="fifo")], ids=str)
def test_rotary_positions_stay_in_the_window(net, make_sampler, empty_memory, monkeypatch, sizes):
    used = []

    def recorded(positions, *args):
        used.append(positions)
        return rotary_table(positions, *args)

    monkeypatch.setattr(network_module, "rotary_table", recorded)
    memory = roll(make_sampler(net), empty_memory(**sizes), 25, sigmas=(1.0,))
    highest = max(int(positions.max()) for positions in used if len(positions))
    assert highest == memory.config.window - 1
    assert min(int(positions.min()) for positions in used if len(positions)) == 0
    assert memory.num_frames > 3 * memory.config.window


def test_cost_is_flat_once_full(net, make_sampler, empty_memory):
    memory, seen, bytes_held = empty_memory(**SMALL | dict(policy="fifo")), [], []

    def attention(q, k, v, bias=None):
        seen[-1].append(k.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
        ).transpose(1, 2)

    sampler = make_sampler(net, attention=attention)
    for _ in range(20):
        seen.append([])
        memory = roll(sampler, memory, 1)
        bytes_held.append(memory.num_bytes)
    assert len({tuple(keys) for keys in seen[5:]}) == 1 and len(set(bytes_held[5:])) == 1
    assert max(max(keys) for keys in seen) == memory.config.window * 6


def test_on_pass_comes_before_every_pass_and_can_stop_it(net, make_sampler, empty_memory):
    passes = []
    roll(make_sampler(net, on_pass=lambda: passes.append(1)), empty_memory(**SMALL), 2)
    assert len(passes) == 2 * (len(SIGMAS) + 1)

    def interrupt():
        if len(passes) == 8 + 6:
            raise InterruptedError
        passes.append(1)

    done = []
    memory = empty_memory(**SMALL)
    with pytest.raises(InterruptedError):
        for memory in make_sampler(net, on_pass=interrupt).rollout(
            memory, 3, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)
        ):
            done.append(memory)
    assert len(done) == 1, "what is finished is kept"


def test_film_is_float32_on_the_cpu_whatever_the_network_runs_in(make_net, make_sampler, empty_memory):
    net = make_net().bfloat16()
    sampler = make_sampler(net, text=torch.randn(1, 5, 32), dtype=torch.bfloat16)
    memory = roll(sampler, empty_memory(**SMALL), 3)
    assert film(memory).dtype == torch.float32 and film(memory).isfinite().all()
    assert {held.keys.dtype for held in memory.store.frames.values()} == {torch.bfloat16}


def test_working_bytes_grow_with_the_memory_not_the_video(net, empty_memory, six_chunks):
    network, half = (Network(net, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
    small = working_bytes(network, six_chunks)
    assert small == working_bytes(network, empty_memory(**SMALL))
    assert small >= six_chunks.num_bytes
    assert working_bytes(network, empty_memory()) > small > working_bytes(half, six_chunks)


def test_other_sizes_need_no_change(net, make_sampler):
    from context_forcing.memory import empty_memory
    from context_forcing.model.units import latent_size

    config = MemoryConfig(sink=1, slow=1, fast=3, chunk=2, window=6)
    memory = roll(make_sampler(net), empty_memory(config, latent_size(48, 32)), 3, sigmas=(1.0,))
    assert film(memory).shape == (1, 16, 6, 4, 6)
    memory = roll(make_sampler(net), empty_memory(config, latent_size(16, 80)), 3, sigmas=(1.0,))
    assert film(memory).shape == (1, 16, 6, 10, 2)
    assert memory.store.frames[0].keys.shape[2] == 5
    with pytest.raises(ValueError, match="^size: width 40 "):
        empty_memory(config, latent_size(40, 32))


def test_euler_follows_the_flow_and_draws_noise_once(net, make_sampler, empty_memory):
    sampler, memory = make_sampler(net, solver="euler"), empty_memory(**SMALL)
    noise, drawn = seeded_noise(5, memory.latent_size), []

    def counted(frame, step):
        drawn.append(step)
        return noise(frame, step)

    made = film(sampler.generate_chunk(memory, SIGMAS, counted))
    assert set(drawn) == {0}

    attend = sampler.network.attend(sampler.view(memory), memory.config.chunk, memory.latent_size)
    x = torch.stack([noise(frame, 0) for frame in range(memory.config.chunk)], dim=2)
    for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0)):
        x = x + (following - sigma) * sampler.network.flow(x, sigma, sampler.text, attend)
    assert torch.allclose(made, x, atol=1e-5)


def test_another_solver_makes_another_film(net, make_sampler, empty_memory):
    films = [film(roll(make_sampler(net, solver=solver), empty_memory(**SMALL), 1)) for solver in ("renoise", "euler")]
    assert not torch.allclose(*films)
    with pytest.raises(ValueError, match="^solver: "):
        StudentCard(solver="heun")
