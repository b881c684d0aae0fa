import pytest

from context_forcing.memory.snapshot import save_memory
from context_forcing.model.sampler import seeded_noise

STUDENT = "0123456789abcdef"
SIGMAS = (1.0, 0.6)
SIZES = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)


def _expected(config, num_frames, similarity):
    """Sink, slow, fast and decisions of a film of `num_frames`, from the rule alone (docs/method.md, Policies).

    No state is carried: the whole past is gone through again, frame by frame. `similarity(a, b)` of two frames.
    """
    film = list(range(num_frames))
    sink, after_sink = film[: config.sink], film[config.sink :]
    num_recent = config.fast - config.chunk
    left = after_sink[: max(0, len(after_sink) - num_recent)]
    fast = after_sink[len(left) :]
    slow, decisions = [], []
    for frame in left:
        score = None
        if config.slow == 0:
            keep = False
        elif config.policy == "fifo":
            keep = True
        elif config.policy == "uniform":
            keep = frame % config.uniform_stride == 0
        elif config.policy == "clean":
            if frame > 0:
                score = similarity(frame, frame - 1)
            keep = score is None or score < config.slow_similarity_threshold
        else:
            rivals = slow + (sink if config.novel_against_sink else [])
            if rivals:
                score = max(similarity(frame, rival) for rival in rivals)
            keep = score is None or score < config.slow_similarity_threshold
        evicted = None
        if keep:
            slow.append(frame)
            if len(slow) > config.slow:
                if config.eviction == "oldest" and config.policy != "cover":
                    evicted = min(slow)
                else:
                    told = lambda a: sum(sorted(similarity(a, b) for b in slow if b != a)[-2:])
                    evicted = max((told(a), -a) for a in slow)[1] * -1
                slow.remove(evicted)
        decisions.append((frame, keep, score, evicted))
    return sink, slow, fast, decisions


@pytest.fixture(scope="session")
def expected():
    """(config, num_frames, similarity) -> sink, slow, fast, decisions by brute force."""
    return _expected


@pytest.fixture(scope="module")
def continue_by(net, make_sampler):
    def go(memory, num_chunks, seed=3):
        noise = seeded_noise(seed, memory.latent_size)
        *_, memory = make_sampler(net, student=STUDENT).rollout(memory, num_chunks, sigmas=SIGMAS, noise=noise)
        return memory

    return go


@pytest.fixture(scope="module")
def memory(continue_by, empty_memory):
    memory = continue_by(empty_memory(**SIZES).begin('a \N{SNOWMAN} "quoted"\nprompt', 5), 5)
    assert memory.slots.slow and any(d.evicted is not None for d in memory.decisions)
    return memory


@pytest.fixture
def path(memory, tmp_path):
    save_memory(tmp_path / "memory.safetensors", memory)
    return tmp_path / "memory.safetensors"
