"""Published causal starts: files of the same layout are what stages begin with (docs/training.md, Where to start)."""

import pytest
import torch

from context_forcing.train.presets import load_config
from context_forcing.train.stages.distill import DistillStage
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.teacher import TeacherStage

from ..model.checkpoints.published import with_second_set
from .helpers import ALONE


def under(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


PLAIN, FSDP = under("model."), under("model._fsdp_wrapped_module.")
TREES = {
    "ode_init.pt": lambda state, other: {"generator": PLAIN(state)},
    "causal_ode.pt": lambda state, other: {"generator": FSDP(state)},
    "causal_cd.pt": lambda state, other: {"generator": PLAIN(other), "generator_ema": FSDP(state)},
    "ar_diffusion.pt": lambda state, other: {"generator": FSDP(other), "generator_ema": FSDP(state), "step": 5000},
    "model.pt": lambda state, other: {"generator_ema": PLAIN(state), "critic": PLAIN(other)},
    "last.pt": lambda state, other: {"model": PLAIN(state)},
}


@pytest.fixture
def start(tiny, make_net, tmp_path):
    """A function from a file's name to the file and the weights that a stage begins with."""
    sizes = dict(dim=32, ffn_dim=64, num_heads=1, num_layers=2, text_dim=4096, text_len=512)
    state, other = (make_net(seed, **sizes).state_dict() for seed in (3, 4))

    def make(name):
        torch.save(TREES[name](state, other), tmp_path / name)
        return tmp_path / name, state

    return make


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("stage", ["pretrain", "teacher", "local"])
def test_a_stage_begins_with_the_files_weights(start, stage, name):
    path, state = start(name)
    if stage == "local":
        made = DistillStage(load_config("local", "smoke", [f"student={path}", f"teacher={path}"]), ALONE)
        networks = [made.student, made.critic, made.teacher]
    else:
        make = {"pretrain": PretrainStage, "teacher": TeacherStage}[stage]
        networks = [make(load_config(stage, "smoke", [f"init={path}"]), ALONE).network]
    for network in networks:
        weights = network.net.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[key], state[key]) for key in state)


def test_a_framewise_start_has_chunks_of_one_frame(start):
    path, _ = start("causal_ode.pt")
    config = load_config("local", "smoke", [f"student={path}", f"teacher={path}", "memory.chunk=1"])
    stage = DistillStage(config, ALONE)
    rollout = stage.rollout(stage.prompts.text(0, 3), 1, 2, 0, 0, False)
    assert rollout.memory.num_frames == 3 and rollout.target_BCTHW.shape[2] == 2


def test_a_start_with_weights_for_the_commit_pass_is_refused(start):
    path, state = start("ode_init.pt")
    torch.save({"generator": with_second_set(state, state)}, path)
    with pytest.raises(ValueError, match="ode_init.pt: has weights of its own for the commit pass"):
        PretrainStage(load_config("pretrain", "smoke", [f"init={path}"]), ALONE)


def test_an_incomplete_start_is_refused_in_a_line(start):
    path, state = start("ode_init.pt")
    torch.save({"generator": {key: value for key, value in PLAIN(state).items() if ".ffn." not in key}}, path)
    with pytest.raises(ValueError, match="ode_init.pt") as caught:
        PretrainStage(load_config("pretrain", "smoke", [f"init={path}"]), ALONE)
    assert "\n" not in str(caught.value)
