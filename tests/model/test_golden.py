"""Agreement with other people's implementations, to 1e-5 relative in float32 (shared golden vectors)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from context_forcing.memory import MemoryConfig, MemoryView, empty_memory
from context_forcing.memory.config import MEMORY_PRESETS
from context_forcing.model.causal import causal_forward, embed_text
from context_forcing.model.config import WanConfig
from context_forcing.model.flow import warped_sigmas
from context_forcing.model.network import Network
from context_forcing.model.wan import WanModel

GOLDEN = Path(__file__).parents[1] / "golden"
EVERYTHING = MemoryConfig(sink=3, slow=0, fast=18)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def net():
    path = GOLDEN / "weights.safetensors"
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    net = WanModel(
        WanConfig(
            dim=int(meta["dim"]), ffn_dim=int(meta["ffn_dim"]), num_heads=int(meta["num_heads"]),
            num_layers=int(meta["num_layers"]), text_dim=int(meta["text_dim"]), text_len=int(meta["text_len"]),
        )
    )  # fmt: skip
    net.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=True)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("case", ["t", "t_frames"])
def test_bidirectional(net, case):
    g = load_file(GOLDEN / "bidirectional.safetensors")
    frames, latent_size = g["x"].shape[2], (g["x"].shape[1], *g["x"].shape[3:])
    timestep = g[case] if case == "t_frames" else g[case][:, None].expand(-1, frames)
    attend = Network(net, torch.device("cpu"), torch.float32).attend(MemoryView(), frames, latent_size)
    flow = causal_forward(net, g["x"], timestep, embed_text(net, g["text"]), attend)
    assert relative(flow, g["flow" if case == "t" else "flow_frames"]) < 1e-5


@pytest.mark.parametrize(
    "name, steps, shift",
    [
        ("causal_global_chunk3", (1000, 750, 500, 250), 5.0),
        ("causal_continue3_chunk3", (1000, 750, 500, 250), 5.0),
        ("causal_two_step_shift8", (1000, 500), 8.0),
    ],
)
def test_rollout(net, make_sampler, name, steps, shift):
    g = load_file(GOLDEN / f"{name}.safetensors")
    to_ours = lambda x: x.movedim(1, 2)  # golden layout is B, T, C, H, W
    sigmas = warped_sigmas(steps, shift)
    assert torch.allclose(torch.tensor(sigmas), g["sigmas"].float(), rtol=1e-6)
    assert torch.allclose(1000 * torch.tensor(sigmas), g["timesteps"].float(), rtol=1e-6)
    sampler = make_sampler(net, text=g["text"])
    memory = empty_memory(EVERYTHING, tuple(g["noise"].shape[2:]))
    given = 0
    if "initial" in g:
        for chunk in to_ours(g["initial"]).split(3, dim=2):
            memory = sampler.commit(memory, chunk)
        given = memory.num_frames

    def noise(frame, step):
        frame -= given
        return g["noise"][:, frame] if step == 0 else g["renoise"][frame // 3, step - 1][:, frame % 3]

    for memory in sampler.rollout(memory, g["noise"].shape[1] // 3, sigmas=sigmas, noise=noise):
        pass
    made = torch.cat(memory.latent_chunks, dim=2)[:, :, given:]
    assert relative(made, to_ours(g["latents"])) < 1e-5


def test_released_memory(net, make_sampler):
    """The Slow-Fast cache as the released Context Forcing code keeps it: latents, and what lies in every slot."""
    g = load_file(GOLDEN / "slowfast_released.safetensors")
    sampler = make_sampler(net, text=g["text"])
    memory = empty_memory(MEMORY_PRESETS["released"], tuple(g["noise"].shape[2:]))

    def noise(frame, step):
        return g["noise"][:, frame] if step == 0 else g["renoise"][frame // 3, step - 1][:, frame % 3]

    sigmas = warped_sigmas((1000, 750, 500, 250), 5.0)
    for chunk, memory in enumerate(sampler.rollout(memory, 12, sigmas=sigmas, noise=noise)):
        found = [[*layer.frames, *[-1] * (21 - len(layer.frames))] for layer in memory.store.layers]
        assert found == g["sources"][chunk].tolist()
    assert relative(torch.cat(memory.latent_chunks, dim=2), g["latents"].movedim(1, 2)) < 1e-5
