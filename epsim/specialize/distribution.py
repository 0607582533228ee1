"""Distributions over experts or bins, with finite gradients at 0: `normalised`, `safe_log`, `symmetric_kl`."""

import torch
from torch import Tensor

from epsim.trace.specialization import KL_SMOOTHING


def normalised(mass: Tensor) -> Tensor:
    """Return the mass, not negative, over its sum along the last dimension; zeros stay zeros."""
    total = mass.sum(dim=-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def safe_log(value: Tensor) -> Tensor:
    """Return the natural logarithm; where the value is 0 (or subnormal), 0 with a gradient of 0.

    So that 0 log 0 = 0 has a gradient of 0, where that of `torch.xlogy(x, x)` is NaN.
    """
    return torch.where(value >= torch.finfo(value.dtype).tiny, value, 1.0).log()


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return half the sum of both Kullback-Leibler divergences, in nats, along the last dimension (SMAR eq. 10 to 12).

    Both distributions get a little mass everywhere first, (q + 1e-6) / (1 + 1e-6 n) as in
    `epsim.trace.specialization.smoothed`, for the equations are infinite where one of them alone is 0.
    """
    first, second = _smoothed(first), _smoothed(second)
    return 0.5 * ((first - second) * (first.log() - second.log())).sum(dim=-1)


def _smoothed(distribution: Tensor) -> Tensor:
    return (distribution + KL_SMOOTHING) / (1 + distribution.shape[-1] * KL_SMOOTHING)
