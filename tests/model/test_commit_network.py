"""A student with weights of its own for the commit pass (SGF+), against a computation of its own."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from context_forcing.model.checkpoints.convert import convert, inspect
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.codecs.backbone import Codecs
from context_forcing.model.fingerprint import fingerprint
from context_forcing.model.finite import NotFiniteError
from context_forcing.model.network import Network
from context_forcing.model.sampler import seeded_noise
from context_forcing.video.pipeline import Pipeline

from .checkpoints.published import pickled, prefixed, refused, with_second_set

DIM, LAYERS, SIZE, ROWS, COLUMNS = 64, 2, (16, 4, 6), 2, 3
OVERRIDES = ("sink=1", "fast=3", "window=4", "steps=1000,500", "size=48,32")
CARD = dict(card="self-gradient-forcing-framewise", overrides=OVERRIDES)


@pytest.fixture(scope="module")
def sets(make_net):
    """Weights of denoising and of the commit pass."""
    sizes = dict(dim=DIM, ffn_dim=96, num_heads=1, num_layers=LAYERS, text_dim=12, text_len=512)
    return make_net(0, **sizes).state_dict(), make_net(1, **sizes).state_dict()


@pytest.fixture
def path(sets, tmp_path):
    return pickled(tmp_path, {"generator_ema": prefixed(with_second_set(*sets), "model.")})


def pipeline_of(path, **reading):
    student = StudentSource(path, **(CARD | reading)).open()
    return Pipeline.load(student, torch.device("cpu"), torch.float32, Codecs(text_encoder=None, vae=None))


def rope(x_LD, positions):
    """Rotations of one head: pairs of neighbours, the first 24 numbers by time, then 20 by row and 20 by column."""
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    places = [(t, int(y), int(x)) for t in positions for y, x in zip(rows.flatten(), columns.flatten())]
    angles = []
    for axis, width in enumerate((24, 20, 20)):
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(torch.tensor([place[axis] for place in places])[:, None] * frequency)
    turned = torch.view_as_complex(x_LD.double().unflatten(-1, (-1, 2))) * torch.exp(1j * torch.cat(angles, -1))
    return torch.view_as_real(turned).flatten(-2).float()


class Independent:
    """The network of one head, one frame at a time, with tensors by the names in the file. Nothing is shared."""

    def __init__(self, state):
        self.state = state

    def weight(self, name, commit):
        stem, _, leaf = name.rpartition(".")
        inside = f"{stem}.memory_{leaf}" if name.startswith("blocks.") else f"memory_{name}"
        return self.state[inside if commit else name]

    def __call__(self, x_CHW, sigma, commit, past, text_LC):
        """Flow [C, H, W], and raw keys and values per layer; `past` has those of remembered frames per layer."""
        w = lambda name: self.weight(name, commit)
        linear = lambda name, x: F.linear(x, w(f"{name}.weight"), w(f"{name}.bias"))
        norm = lambda x: F.layer_norm(x, (DIM,), eps=1e-6)
        rms = lambda name, x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w(f"{name}.weight")
        attend = lambda q, k, v: (q @ k.T / DIM**0.5).softmax(-1) @ v

        x = F.conv3d(x_CHW[None, :, None], w("patch_embedding.weight"), w("patch_embedding.bias"), stride=(1, 2, 2))
        x = x.flatten(2)[0].T
        angle = 1000 * sigma * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        time = linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()]).float())
        time = linear("time_embedding.2", F.silu(time))
        steps = linear("time_projection.1", F.silu(time)).view(6, DIM)
        text = torch.zeros(512, text_LC.shape[1])
        text[: len(text_LC)] = text_LC
        text = linear("text_embedding.2", F.gelu(linear("text_embedding.0", text), approximate="tanh"))
        new = []
        for i in range(LAYERS):
            block = f"blocks.{i}"
            m = w(f"{block}.modulation")[0] + steps
            y, a = norm(x) * (1 + m[1]) + m[0], f"{block}.self_attn"
            q, k, v = (
                rms(f"{a}.norm_q", linear(f"{a}.q", y)),
                rms(f"{a}.norm_k", linear(f"{a}.k", y)),
                linear(f"{a}.v", y),
            )
            new.append((k, v))
            frames = [*past[i], (k, v)]
            keys = rope(torch.cat([key for key, _ in frames]), range(len(frames)))
            y = attend(rope(q, [len(frames) - 1]), keys, torch.cat([value for _, value in frames]))
            x, a = x + m[2] * linear(f"{a}.o", y), f"{block}.cross_attn"
            y = F.layer_norm(x, (DIM,), w(f"{block}.norm3.weight"), w(f"{block}.norm3.bias"), 1e-6)
            k, v = rms(f"{a}.norm_k", linear(f"{a}.k", text)), linear(f"{a}.v", text)
            x = x + linear(f"{a}.o", attend(rms(f"{a}.norm_q", linear(f"{a}.q", y)), k, v))
            y = F.gelu(linear(f"{block}.ffn.0", norm(x) * (1 + m[4]) + m[3]), approximate="tanh")
            x = x + m[5] * linear(f"{block}.ffn.2", y)
        m = w("head.modulation")[0] + time
        x = linear("head.head", norm(x) * (1 + m[1]) + m[0]).view(ROWS, COLUMNS, 2, 2, 16)
        return x.permute(4, 0, 2, 1, 3).reshape(SIZE), new

    def film(self, texts, noise, commits=True):
        """A frame per text: two steps, then the commit pass. Sees the first frame and the last two before it."""
        remembered, made = [], []
        for frame, text in enumerate(texts):
            seen = remembered[:1] + remembered[1:][-2:]
            past = [[kv[i] for kv in seen] for i in range(LAYERS)]
            first, second = (noise(frame, step)[0] for step in range(2))
            half = 5 * 0.5 / (1 + 4 * 0.5)
            x0 = first - self(first, 1.0, False, past, text)[0]
            x = (1 - half) * x0 + half * second
            x0 = x - half * self(x, half, False, past, text)[0]
            remembered.append(self(x0, 0.0, commits, past, text)[1])
            made.append(x0)
        return torch.stack(made, dim=1)[None]


def rows(seed):
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(seed))


def roll(pipeline, prompts, per_prompt=3):
    """Some chunks under each prompt."""
    memory = pipeline.empty_memory()
    for text in prompts:
        noise = seeded_noise(3, memory.latent_size)
        for memory in pipeline.sampler(text).rollout(memory, per_prompt, sigmas=pipeline.card.sigmas, noise=noise):
            pass
    return memory


def film(memory):
    return torch.cat(memory.latent_chunks, dim=2)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_film_is_that_of_the_independent_computation(sets, path):
    """Denoising with one set, remembering with the other, frames evicted, the prompt changed on the way."""
    texts = [rows(0), rows(1)]
    memory = roll(pipeline_of(path), texts)
    alone, noise = Independent(with_second_set(*sets)), seeded_noise(3, SIZE)
    each = [text[0] for text in texts for _ in range(3)]
    assert memory.num_frames == 6 and len(memory.slots.all) == 3
    assert relative(film(memory), alone.film(each, noise)) < 1e-4
    assert relative(film(memory), alone.film(each, noise, commits=False)) > 1e-2, "the second set matters"


def test_the_same_second_set_changes_nothing(sets, tmp_path):
    one, twice = (tmp_path / name for name in ("one.safetensors", "twice.safetensors"))
    save_file(sets[0], one)
    save_file(with_second_set(sets[0], {name: tensor.clone() for name, tensor in sets[0].items()}), twice)
    assert torch.equal(film(roll(pipeline_of(one), [rows(0)])), film(roll(pipeline_of(twice), [rows(0)])))


def test_offloaded_it_is_the_same(path):
    student = StudentSource(path, **CARD).open()
    offloaded = Pipeline.load(student, torch.device("cpu"), torch.float32, Codecs(text_encoder=None, vae=None), True)
    assert torch.equal(film(roll(offloaded, [rows(0)])), film(roll(pipeline_of(path), [rows(0)])))


def test_keys_made_again_are_those_of_the_commit_pass(path):
    """A recache under the same prompt of frames of which none was evicted."""
    pipeline = pipeline_of(path)
    memory = roll(pipeline, [rows(0)])
    again = pipeline.sampler(rows(1)).under(rows(0)).recache(memory)
    for (_, before), (_, after) in zip(memory.store.frame_kvs(), again.store.frame_kvs(), strict=True):
        assert relative(after.keys, before.keys) < 1e-5 and relative(after.values, before.values) < 1e-5


def test_it_is_recognised_and_described(path):
    student = StudentSource(path).open()
    assert student.card.name == "self-gradient-forcing"
    assert student.card_choice.reason == "recognised by weights for the commit pass (memory_*)"
    assert "Choose with card" in student.note and not student.is_plain
    framewise = path.rename(path.parent / "sgf_plus_framewise.pt")
    assert "Its name suggests self-gradient-forcing-framewise." in StudentSource(framewise).open().note
    assert dict(inspect(StudentSource(framewise)))["tensors"].endswith(", and as many for the commit pass")


def test_converted_it_has_both_sets(sets, path, tmp_path):
    convert(StudentSource(path, **CARD), tmp_path / "out.safetensors", dtype="bf16")
    student = StudentSource(tmp_path / "out.safetensors").open()
    assert student.card == StudentSource(path, **CARD).open().card and not student.is_plain
    for state, stored in zip(sets, (student.named.tensors, student.named.commit)):
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], state[name].bfloat16()) for name in state)


@pytest.mark.parametrize(
    "name", ["blocks.1.norm3.memory_bias", "memory_head.modulation", "memory_time_embedding.0.bias"]
)
def test_an_incomplete_second_set_is_refused(name, sets, tmp_path):
    state = with_second_set(*sets)
    del state[name]
    says = refused(pickled(tmp_path, state))
    assert "weights for the commit pass (memory_*): 1 of 69 tensors missing" in says
    assert name.replace("memory_", "") in says


def test_both_sets_name_the_student(sets, path):
    pipeline = pipeline_of(path)
    net, commit = pipeline.network.net, pipeline.network.commit.net
    assert pipeline.fingerprint == pipeline.merged_fingerprint == fingerprint(net, commit=commit)
    assert len({fingerprint(net), fingerprint(commit), pipeline.fingerprint, fingerprint(commit, commit=net)}) == 4


def test_nan_in_the_second_set_is_found(sets, tmp_path):
    second = {name: tensor.clone() for name, tensor in sets[1].items()}
    second["blocks.1.self_attn.v.weight"][0, 0] = torch.nan
    path = pickled(tmp_path, with_second_set(sets[0], second))
    with pytest.raises(NotFiniteError, match=r"the commit pass: .*blocks\.1.*student file"):
        roll(pipeline_of(path), [rows(0)])


def test_a_lora_changes_denoising_only(sets, path, tmp_path):
    lora = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, DIM),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(DIM, 2),
    }
    save_file(prefixed(lora, "diffusion_model."), tmp_path / "lora.safetensors")
    student = StudentSource(path, loras=((tmp_path / "lora.safetensors", 1.0),)).open()
    name = "blocks.0.self_attn.q.weight"
    assert not torch.equal(student.load().state_dict()[name], sets[0][name])
    assert torch.equal(student.load_commit().state_dict()[name], sets[1][name])


def test_a_sampler_has_the_prompt_for_both_networks_or_one(make_net, make_sampler):
    net = make_net()
    other = Network(make_net(1), torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError):
        dataclasses.replace(make_sampler(net), network=Network(net, other.device, other.dtype, commit=other))
