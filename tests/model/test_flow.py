"""The schedule as published, and flow <-> x0."""

import pytest
import torch

from context_forcing.model.config import StudentCard
from context_forcing.model.flow import add_noise, match_channels, shift_sigma, warped_sigmas, x0_from_flow


def test_the_four_steps_of_self_forcing():
    assert warped_sigmas((1000, 750, 500, 250), 5) == pytest.approx((1, 0.9375, 5 / 6, 0.625), abs=1e-12)
    assert StudentCard().sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625), abs=1e-12)


def test_shift_one_changes_nothing():
    assert warped_sigmas((1000, 500, 1), 1) == pytest.approx((1, 0.5, 0.001))


def test_warp_keeps_the_ends_and_the_order():
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    warped = shift_sigma(s, 5.0)
    assert warped[0] == 0 and warped[-1] == 1
    assert (warped.diff() > 0).all() and (warped[1:-1] > s[1:-1]).all()


@pytest.mark.parametrize(
    "steps, shift, field",
    [
        ((), 5, "steps"),
        ((1000, 0), 5, "steps"),
        ((1000, -250), 5, "steps"),
        ((1001, 500), 5, "steps"),
        ((float("nan"),), 5, "steps"),
        ((500, 750), 5, "steps"),
        ((750, 750), 5, "steps"),
        ((1000,), 0, "shift"),
        ((1000,), -1, "shift"),
        ((1000,), float("nan"), "shift"),
        ((1000,), float("inf"), "shift"),
    ],
)
def test_bad_schedules_are_refused(steps, shift, field):
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        warped_sigmas(steps, shift)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.625, 1.0])
def test_x0_round_trip(sigma):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 16, 3, 4, 6, generator=generator)
    x = add_noise(x0, noise, sigma)
    assert torch.allclose(x0_from_flow(x, noise - x0, sigma), x0, atol=1e-6)
    if sigma in (0.0, 1.0):
        assert torch.equal(x, noise if sigma else x0)


def test_a_sigma_per_frame():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 16, 3, 4, 6, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 0.9])[None, None, :, None, None]
    x = add_noise(x0, noise, sigma)
    for t, one in enumerate((0.1, 0.5, 0.9)):
        assert torch.allclose(x[:, :, t], add_noise(x0, noise, one)[:, :, t], atol=1e-6)
    assert torch.allclose(x0_from_flow(x, noise - x0, sigma), x0, atol=1e-6)


def test_channels_are_matched():
    """Mean and deviation of every channel: those of the other latents at share 1, half way at 0.5, as before at 0."""
    generator = torch.Generator().manual_seed(0)
    x0 = 3 * torch.randn(1, 16, 3, 4, 6, generator=generator) + 1
    like = torch.randn(1, 16, 21, 4, 6, generator=generator) - 2
    moments = lambda x: torch.stack([(x.flatten(2)).mean(2)[0], x.flatten(2).std(2)[0]])
    for share in (0.0, 0.5, 1.0):
        matched = match_channels(x0, like, share)
        assert torch.allclose(moments(matched), (1 - share) * moments(x0) + share * moments(like), atol=1e-4)
    corner = matched[0, :, 0, 0, 0]
    expected = (x0[0, :, 0, 0, 0] - moments(x0)[0]) / moments(x0)[1] * moments(like)[1] + moments(like)[0]
    assert torch.allclose(corner, expected, atol=1e-4)
