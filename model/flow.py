"""Flow matching as in Wan and Self-Forcing (docs/method.md, Flow matching).

sigma is in [0, 1]; the timestep of the network is 1000 * sigma.
x_sigma = (1 - sigma) * x0 + sigma * noise, flow = noise - x0, x0 = x_sigma - sigma * flow.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

TIMESTEPS = 1000
MATCH_EPS = 1e-5
"""Added to the deviation of a channel before it divides (match_channels), as in LiveWan."""
Sigma = TypeVar("Sigma", float, Tensor)


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Move noise levels towards 1: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def warped_sigmas(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Noise levels of a list of steps before the shift, as published: 1000, 750, 500, 250 for most students.

    Raises ValueError for an empty list, a step outside (0, 1000], or steps that do not decrease.
    """
    if not steps:
        raise ValueError("steps: the list is empty; give at least one step, for example 1000 750 500 250")
    if any(not 0 < step <= TIMESTEPS for step in steps):
        raise ValueError(f"steps: {list(steps)} has a value outside (0, {TIMESTEPS}]")
    if any(later >= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"steps: {list(steps)} must decrease from noise (1000) towards 0")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift: {shift} must be a positive number (5 for Wan 1.3B students)")
    return tuple(float(shift_sigma(step / TIMESTEPS, shift)) for step in steps)


SOLVERS = ("renoise", "euler")
"""How a step gets to the next noise level: `renoise` adds fresh noise (distilled students), `euler` follows the
predicted flow (models that were not distilled)."""


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_sigma on the straight line from x0 to noise."""
    return (1 - sigma) * x0 + sigma * noise


def match_channels(x0_BCTHW: Tensor, like_BCTHW: Tensor, share: float) -> Tensor:
    """Latents with the mean and deviation of each channel moved by `share` (0..1) to those of other latents."""
    dims = (2, 3, 4)
    mean, deviation = x0_BCTHW.mean(dims, keepdim=True), x0_BCTHW.std(dims, keepdim=True)
    matched = (x0_BCTHW - mean) / (deviation + MATCH_EPS) * like_BCTHW.std(dims, keepdim=True)
    return x0_BCTHW.lerp(matched + like_BCTHW.mean(dims, keepdim=True), share)


def x0_from_flow(x_sigma: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents of a predicted flow."""
    return x_sigma - sigma * flow
