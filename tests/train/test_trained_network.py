"""Bad gradients and moving averages."""

import pytest
import torch

from context_forcing.train import run_stage
from context_forcing.train.config import OptimConfig
from context_forcing.train.stages.teacher import TeacherStage
from context_forcing.train.trained_network import HISTORY, TrainedNetwork

from .helpers import ALONE


def trained_of(**settings):
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    return TrainedNetwork(net, OptimConfig(lr=0.1, **settings), ALONE)


def set_gradient(trained, gradient):
    trained.net.weight.grad = torch.full_like(trained.net.weight, gradient)


def test_updates_with_bad_gradients_are_skipped():
    trained = trained_of(spike=5.0)
    for _ in range(HISTORY):
        set_gradient(trained, 1.0)
        assert not trained.update(1.0)["skipped"]
    before = trained.net.weight.clone()
    for loss, gradient in ((float("nan"), 1.0), (1.0, float("inf")), (1.0, 100.0)):
        set_gradient(trained, gradient)
        assert trained.update(loss)["skipped"] and torch.equal(trained.net.weight, before)
    set_gradient(trained, 1.0)
    assert not trained.update(1.0)["skipped"] and not torch.equal(trained.net.weight, before)


def test_many_skipped_updates_stop_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherStage, "loss", lambda self, memory, latents, *_: (
        self.network.net.head.head.bias.sum() * float("nan"), latents, 0.5, True))  # fmt: skip
    with pytest.raises(FloatingPointError, match="teacher: 3 updates in a row"):
        run_stage("teacher", "smoke", ["steps=9", "max_skipped=2", f"out={tmp_path}"], False)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_weights_of_an_export_can_be_used_kept_and_restored(ema):
    trained = trained_of(ema=ema)

    def update():
        set_gradient(trained, 1.0)
        trained.update(1.0)

    update()
    weights, kept = trained.net.weight.detach().clone(), trained.exported()
    assert torch.equal(kept["weight"], weights) == (ema == 0)
    with trained.averaged():
        assert torch.equal(trained.net.weight, kept["weight"])
    assert torch.equal(trained.net.weight, weights)
    update()
    assert not torch.equal(trained.weights()["weight"], kept["weight"])
    trained.set_exported(kept)
    assert torch.equal(trained.weights()["weight"], kept["weight"])


def test_the_average_follows_the_weights():
    trained = trained_of(ema=0.5, ema_from=1, betas=(0.0, 0.999))
    path = [trained.net.weight.clone()]
    for _ in range(3):
        set_gradient(trained, 1.0)
        trained.update(1.0)
        path.append(trained.net.weight.detach().clone())
    expected = 0.25 * path[1] + 0.25 * path[2] + 0.5 * path[3]
    torch.testing.assert_close(trained.weights()["weight"], expected.detach())
