"""A chunk that is not finite is refused, by the name of where that began; nothing of it is kept."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from context_forcing.memory.memory import all_finite
from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.causal import compiled, sinusoid
from context_forcing.model.finite import NotFiniteError
from context_forcing.model.flow import TIMESTEPS
from context_forcing.model.network import Network
from context_forcing.model.offload import Offload
from context_forcing.model.sampler import KV_PLACEMENTS, seeded_noise
from context_forcing.model.segment import generate_segment
from context_forcing.train.stages.student import Student

CPU = torch.device("cpu")
NAN = float("nan")
SIGMAS = (1.0, 0.9375, 0.625)
CLEAN = dict(sink=1, slow=2, fast=4, chunk=2, window=7, slow_similarity_threshold=0.999)
RELEASED = dict(CLEAN, policy="released", slow=1, window=6)


@pytest.fixture
def bad_net(make_net):
    """Three layers, for a test to break."""
    return make_net(num_layers=3)


@pytest.fixture
def begun(make_net, make_sampler, empty_memory):
    """(**settings) -> a memory of two whole chunks, by the same network unbroken."""

    def begun(**settings):
        sampler = make_sampler(make_net(num_layers=3))
        return roll(sampler, empty_memory(**(settings or CLEAN)), 2)

    return begun


def roll(sampler, memory, num_chunks=1):
    for memory in sampler.rollout(memory, num_chunks, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)):
        pass
    return memory


def refusal(sampler, memory, num_chunks=1):
    """What is said."""
    with pytest.raises(NotFiniteError) as error:
        roll(sampler, memory, num_chunks)
    assert "\n" not in str(error.value)
    return str(error.value)


def poison(memory, frame):
    """NaN in a key of one remembered frame."""
    held = memory.store.frames[frame]
    keys = held.keys.clone()
    keys[1, 0, 0, 0, 0] = NAN
    frames = memory.store.frames | {frame: dataclasses.replace(held, keys=keys)}
    return dataclasses.replace(memory, store=dataclasses.replace(memory.store, frames=frames))


def poison_when(net, module, sigma):
    """NaN in what a module makes, in passes at one noise level only."""
    told = sinusoid(torch.full((1, 1), TIMESTEPS * sigma), net.config.freq_dim).float()
    at = []
    net.time_embedding.register_forward_pre_hook(lambda _, args: at.append(torch.allclose(args[0][:, -1:], told)))
    module.register_forward_hook(lambda _, args, out: out * NAN if at[-1] else None)


@pytest.mark.parametrize(
    "weight, names",
    [
        ("blocks.2.ffn.0.weight", "the output of layer blocks.2"),
        ("blocks.2.self_attn.k.weight", "the keys of layer blocks.2"),
        ("blocks.2.modulation", "the queries of layer blocks.2"),
        ("blocks.2.cross_attn.v.bias", "the prompt in layer blocks.2"),
        ("text_embedding.0.weight", "the prompt in layer blocks.0"),
        ("patch_embedding.bias", "the output of layer patch_embedding"),
        ("time_embedding.2.weight", "the output of layer time_projection"),
        ("head.head.weight", "the output of layer head"),
    ],
)
def test_a_weight_is_named(bad_net, make_sampler, begun, same_memory, weight, names):
    before = begun()
    copy = dataclasses.replace(before, store=dataclasses.replace(before.store, frames=dict(before.store.frames)))
    bad_net.get_parameter(weight).data.flatten()[3] = NAN
    said = refusal(make_sampler(bad_net), before)
    assert said.startswith("chunk 3 (latent frames 4-5), step 1 (noise level 1): ")
    assert f": NaN or infinity in {names} and in the weight {weight}; the student file or a LoRA is damaged" in said
    assert same_memory(before, copy) and before.num_frames == 4


@pytest.mark.parametrize("settings", [CLEAN, RELEASED], ids=["clean", "released"])
@pytest.mark.parametrize("how", [*KV_PLACEMENTS, "offload", "compiled"])
def test_however_it_runs(bad_net, make_sampler, empty_memory, settings, how):
    bad_net.blocks[2].ffn[0].weight.data[0, 0] = float("inf")
    options = {"kv_placement": how} if how in KV_PLACEMENTS else {}
    if how == "compiled":
        options["run"] = compiled(backend="eager")
    elif how == "offload":
        options["run"] = Offload(bad_net, CPU)
    sampler = make_sampler(bad_net, **options)
    said = refusal(sampler, empty_memory(**settings))
    assert said.startswith("chunk 1 (latent frames 0-1), step 1 ") and "blocks.2.ffn.0.weight" in said


@pytest.mark.parametrize("settings", [CLEAN, RELEASED], ids=["clean", "released"])
@pytest.mark.parametrize("solver", ["renoise", "euler"])
def test_what_begins_at_a_later_step(bad_net, make_sampler, begun, settings, solver):
    before = begun(**settings)
    poison_when(bad_net, bad_net.blocks[1].self_attn.o, SIGMAS[2])
    said = refusal(make_sampler(bad_net, solver=solver), before)
    assert said.startswith(
        "chunk 3 (latent frames 4-5), step 3 (noise level 0.625): NaN or infinity in the output of layer blocks.1, "
    )
    assert "not in its weights; check the student file and the strength of its LoRAs;" in said


@pytest.mark.parametrize("settings", [CLEAN, RELEASED], ids=["clean", "released"])
def test_what_begins_in_the_commit_pass(bad_net, make_sampler, begun, settings):
    """The film's chunk is finite, its keys are not."""
    before = begun(**settings)
    poison_when(bad_net, bad_net.blocks[1].self_attn.norm_k, 0.0)
    sampler = make_sampler(bad_net)
    view = sampler.view(before)
    *_, x0 = sampler.denoise(before, view, SIGMAS, seeded_noise(5, before.latent_size))
    assert x0.isfinite().all()
    said = refusal(sampler, before)
    assert said.startswith(
        "chunk 3 (latent frames 4-5), the commit pass: NaN or infinity in the keys of layer blocks.1, "
    )


def test_what_was_finished_before_stays(bad_net, make_sampler, empty_memory):
    poison_when(bad_net, bad_net.blocks[1].self_attn.norm_k, 0.0)
    norm = bad_net.blocks[1].self_attn.norm_k
    _, hook = norm._forward_hooks.popitem()
    sampler, done = make_sampler(bad_net), []
    memory = empty_memory(**CLEAN)
    with pytest.raises(NotFiniteError, match=r"^chunk 3 \(latent frames 4-5\), the commit pass"):
        for memory in sampler.rollout(memory, 4, sigmas=SIGMAS, noise=seeded_noise(5, memory.latent_size)):
            done.append(memory)
            if len(done) == 2:
                norm.register_forward_hook(hook)
    assert [each.num_frames for each in done] == [2, 4]
    assert all(tensor.isfinite().all() for tensor in memory.tensors())


@pytest.mark.parametrize("num_start_frames", [1, 2, 5])
def test_a_start_image(net, make_sampler, empty_memory, num_start_frames):
    """Refused where it is given; and where it came in otherwise, in the chunk it belongs to."""
    memory = empty_memory(**CLEAN)
    clip = torch.randn(1, 16, num_start_frames, 4, 6)
    given = memory.with_start_latents(clip)
    clip[0, 3, -1, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="^latents: NaN or infinity in the start image or clip"):
        memory.with_start_latents(clip)
    said = refusal(make_sampler(net), dataclasses.replace(given, start_latents=clip))
    frames = {1: "chunk 1 (latent frames 0-1)", 2: "chunk 1 (latent frames 0-1)", 5: "chunk 3 (latent frames 4-5)"}
    assert said.startswith(f"{frames[num_start_frames]}: NaN or infinity in the start image or clip; check the file")


def test_a_memory(bad_net, make_sampler, begun, tmp_path):
    """By the frame that is to blame; as a file it is refused before anything is made."""
    memory = poison(begun(), 2)
    said = refusal(make_sampler(bad_net), memory)
    assert "chunk 3 (latent frames 4-5): NaN or infinity in the remembered latent frame 2; continue" in said
    save_memory(tmp_path / "bad.safetensors", memory)
    with pytest.raises(ValueError, match=r"bad.safetensors: NaN or infinity in keys.2; "):
        load_memory(tmp_path / "bad.safetensors")


def test_a_released_memory(bad_net, make_sampler, begun):
    memory = begun(**RELEASED)
    layers = memory.store.layers
    entries = layers[1].entries
    bad = (*entries[:2], dataclasses.replace(entries[2], values=entries[2].values * NAN), *entries[3:])
    layers = (layers[0], dataclasses.replace(layers[1], entries=bad), *layers[2:])
    broken = dataclasses.replace(memory, store=dataclasses.replace(memory.store, layers=layers))
    assert f"latent frame {layers[1].frames[2]};" in refusal(make_sampler(bad_net), broken)


def test_frames_that_are_written_anew(net, make_sampler, empty_memory):
    memory = roll(make_sampler(net), empty_memory(**CLEAN), 3)
    film = (memory.latent_chunks[0], memory.latent_chunks[1], memory.latent_chunks[2] * NAN)
    with pytest.raises(
        NotFiniteError, match="^remembered latent frames [0-9]-[0-9], the commit pass: NaN or infinity in its lat"
    ):
        make_sampler(net).recache(dataclasses.replace(memory, latent_chunks=film))


def test_a_chunk_of_an_earlier_run(net, make_sampler, empty_memory):
    with pytest.raises(
        NotFiniteError, match=r"^chunk 1 \(latent frames 0-1\), the commit pass: NaN or infinity in its latents"
    ):
        make_sampler(net).commit(empty_memory(**CLEAN), torch.full((1, 16, 2, 4, 6), NAN))


def test_a_prompt(net, make_sampler, empty_memory):
    memory, text = empty_memory(**CLEAN), torch.randn(1, 5, 32)
    text[0, 2, 3] = NAN
    sampler_of = lambda text: make_sampler(net, text=text)
    with pytest.raises(ValueError, match="^text: NaN or infinity in the embeddings of the prompt 'a meadow'"):
        next(generate_segment(sampler_of, memory, text, prompt="a meadow", seed=0, num_chunks=1, sigmas=SIGMAS))
    assert "in the prompt in layer blocks.0, not in its weights" in refusal(sampler_of(text), memory)
    begun = memory.begin("a meadow", 0, text)
    assert "): NaN or infinity in the prompt's embeddings;" in refusal(sampler_of(text), begun)


def test_half_precision_that_overflows(bad_net, make_sampler, empty_memory):
    """The weights are finite, what they make is not: the remedy is another dtype."""
    net = bad_net.half()
    net.blocks[1].ffn[2].weight.data.mul_(1e5)
    said = refusal(make_sampler(net, dtype=torch.float16), empty_memory(**CLEAN))
    assert "in the output of layer blocks.1, not in its weights; run it in bf16 or fp32" in said


def test_what_does_not_come_again(bad_net, make_sampler, empty_memory):
    passes = []

    def once(module, args, out):
        passes.append(1)
        return out * NAN if len(passes) == 2 else None

    bad_net.blocks[1].ffn.register_forward_hook(once)
    assert "NaN or infinity in it, but not in a repeat; generate again" in refusal(
        make_sampler(bad_net), empty_memory(**CLEAN)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_place_is_looked_at(dtype):
    tensor = torch.full((3, 67), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([tensor, -tensor, tensor * 0])
    for bad in (NAN, float("inf"), -float("inf")):
        for place in (0, 66, 133, 200):
            spoilt = tensor.clone()
            spoilt.view(-1)[place] = bad
            assert not all_finite([tensor, spoilt, tensor])


class Waits(TorchDispatchMode):
    """Counts how often the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once_a_chunk_and_no_value_changes(net, make_sampler, empty_memory, same_memory):
    counts, made = [], []
    for checks in (False, True):
        with Waits() as waits:
            made.append(roll(make_sampler(net, check_finite=checks), empty_memory(**CLEAN), 3))
        counts.append(waits.count)
    assert counts[1] - counts[0] == 3 and same_memory(*made)


def test_training_has_a_rule_of_its_own(bad_net, empty_memory):
    """Its rollouts go on: the update that they lead to is dropped."""
    bad_net.requires_grad_(True).blocks[2].ffn[0].weight.data[0, 0] = NAN
    student = Student(Network(bad_net, CPU, torch.float32), torch.randn(1, 5, 32))
    memory = empty_memory(**CLEAN)
    noise = seeded_noise(5, memory.latent_size)
    context = student.rollout(memory, 1, SIGMAS, noise)
    rolled = student.target(context, 1, 1, SIGMAS, noise, has_grad=True)
    rolled.target_BCTHW.sum().backward()
    assert rolled.memory.num_frames == 4 and bad_net.head.head.weight.grad.isnan().any()


def test_gradients_pass_the_check(bad_net, make_sampler, begun):
    """The sampler with gradients that checks: as one that does not."""
    before, found = begun(), []
    for checks in (False, True):
        weight = bad_net.requires_grad_(True).blocks[1].ffn[0].weight
        weight.grad = None
        after = make_sampler(bad_net, check_finite=checks).commit(before, torch.ones(1, 16, 2, 4, 6))
        after.store.frames[5].keys.sum().backward()
        found.append(weight.grad.clone())
    assert torch.equal(*found) and found[0].any()
