"""Means over random splits with an interval that knows that the splits overlap: `Estimate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Self

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over splits; low and high are the ends of its interval, None of one split."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], test_to_fit: float, level: float = LEVEL) -> Self:
        """Return the corrected resampled t-interval of a value for each split.

        mean +- t(n - 1) * sqrt((1 / n + n_test / n_fit) * s^2), with s^2 the sample variance of the n values and
        t the quantile of Student's distribution at (1 + level) / 2: Nadeau and Bengio, Inference for the
        Generalization Error, Machine Learning 52 (2003), section 3. Splits of the same requests overlap, so that the
        plain interval, without n_test / n_fit, is too short. It takes differences to be normally distributed.
        """
        n, mean = len(values), fmean(values)
        if n < 2:
            return cls(mean=mean, low=None, high=None, values=tuple(values))

        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(1 / n + test_to_fit) * stdev(values)
        return cls(mean=mean, low=mean - half, high=mean + half, values=tuple(values))

    @property
    def contains_zero(self) -> bool | None:
        """Whether 0 is in the interval; None without one."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": list(self.values)}
