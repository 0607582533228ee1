"""Intervals: closed forms of linear problems, profiles, and parameters that the data say nothing of."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from epsim.calibrate.determine import Interval, linearised, profile
from epsim.calibrate.fit import Effort, Fit, fit
from epsim.calibrate.measured import Compare, Floats, MeasuredRow
from epsim.calibrate.parameters import Parameter
from epsim.calibrate.problem import Weights
from epsim.calibrate.workers import Workers

QUICK = Effort(num_screened=4, num_short=2, short_steps=8, num_long=1, long_steps=40)
NOISE = np.array([0.01, -0.02, 0.02, -0.01])


@dataclass(frozen=True, kw_only=True)
class Level:
    """TTFT = exp(a + b * x) with x = 0, 0, 1, 1 in the four rows, so that log(TTFT) is linear in a and b."""

    rows: tuple[MeasuredRow, ...]

    def specified(self, field: str) -> float | None:
        return 0.5

    def rounded(self, field: str, value: float) -> float:
        return value

    def predict(self, values: Mapping[str, float]) -> Floats:
        seconds = np.exp(values["a"] + values["b"] * np.array([0.0, 0.0, 1.0, 1.0]))
        return np.stack((seconds, seconds), axis=1)


def rows(log_seconds: Floats) -> tuple[MeasuredRow, ...]:
    return tuple(
        MeasuredRow(settings=(("m", "base" if i % 2 else "new"),), batch_size=1 + i // 2, ttft_s=s, tpot_s=None)
        for i, s in enumerate(np.exp(log_seconds).tolist())
    )


def parameters(*names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(field=name, low=-1.0, high=3.0, log=False, reason="a test") for name in names)


def fitted(log_seconds: Floats, *names: str, compare: Compare | None = None, loss_scale: float = 0.05) -> Fit:
    return fit(
        Level(rows=rows(log_seconds)),
        parameters(*names),
        np.ones(4, dtype=bool),
        compare,
        effort=QUICK,
        weights=Weights(ridge=1e-6, loss_scale=loss_scale),
    )


def half_width(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def test_linearised_intervals_of_a_line_by_hand() -> None:
    # log TTFT = 1 + 0.5 x + noise; means of 2 give a = 1 - 0.005 and a + b = 1.5 + 0.005. Residuals 0.015 and -0.015
    # twice: sum of squares 4 * 0.015^2 = 9e-4, n - p = 2, s^2 = 4.5e-4. var a = s^2 / 2, var b = s^2.
    # Soft-L1 with scale 0.05, z = (0.015 / 0.05)^2 = 0.09: it counts 2 (sqrt(1.09) - 1) / 0.09 = 0.9783 of the squares,
    # and its second derivative is 1.09^-1.5 = 0.8787, so that the half-widths are sqrt(0.9783 / 0.8787) = 1.0552 times.
    found = fitted(1 + 0.5 * np.array([0, 0, 1, 1]) + NOISE, "a", "b")
    assert found.values == pytest.approx({"a": 0.995, "b": 0.51}, abs=1e-4)
    a, b = linearised(found)
    t = stats.t.ppf(0.975, 2)
    assert half_width(a) == pytest.approx(1.0552 * t * np.sqrt(4.5e-4 / 2), rel=1e-3)
    assert half_width(b) == pytest.approx(1.0552 * t * np.sqrt(4.5e-4), rel=1e-3)
    assert a.determined
    assert b.determined
    assert a.low < 0.995 < a.high


def test_profile_agrees_with_the_linear_theory_where_all_is_linear() -> None:
    # A loss scale far above the residuals: the loss is a square.
    found = fitted(1 + 0.5 * np.array([0, 0, 1, 1]) + NOISE, "a", "b", loss_scale=10.0)
    result = profile(found, Workers(found.problem.predictor))
    assert result.better is None
    for quick, slow in zip(linearised(found), result.intervals, strict=True):
        assert (slow.low, slow.high) == pytest.approx((quick.low, quick.high), abs=0.02 * half_width(quick))
        assert slow.method == "profile"


@dataclass(frozen=True, kw_only=True)
class Line(Level):
    """TTFT = exp(a + b * x) with x from 0 to 1 over any number of rows."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        seconds = np.exp(values["a"] + values["b"] * np.linspace(0.0, 1.0, len(self.rows)))
        return np.stack((seconds, seconds), axis=1)


def line(residuals: Floats) -> Fit:
    """Fit a and b to exp(1 + 0.5 x) with residuals."""
    log_seconds = 1 + 0.5 * np.linspace(0.0, 1.0, len(residuals)) + residuals
    measured = tuple(
        MeasuredRow(settings=(), batch_size=1 + i, ttft_s=s, tpot_s=None) for i, s in enumerate(np.exp(log_seconds))
    )
    free = tuple(Parameter(field=name, low=0.0, high=2.0, log=False, reason="a test") for name in "ab")
    every = np.ones(len(measured), dtype=bool)
    return fit(Line(rows=measured), free, every, effort=QUICK, weights=Weights(ridge=1e-6))


def test_large_residuals_widen_the_intervals_by_hand() -> None:
    # 200 residuals of +-sqrt(3) loss scales s: each costs s^2 (sqrt(4) - 1) = s^2 and curves the cost by 4^-1.5 = 1/8.
    # s^2 of the noise is 2 * 200 s^2 / 198 and J^T W J an eighth of sums over x from 0 to 1, nearly
    # 200 [[1, 1/2], [1/2, 1/3]], whose inverse has 4/200 for a and 12/200 for b.
    scale = Weights().loss_scale
    found = line(scale * np.sqrt(3) * np.tile([1.0, -1.0, -1.0, 1.0], 50))
    t = stats.t.ppf(0.975, 198)
    a, b = linearised(found)
    assert half_width(a) == pytest.approx(t * scale * np.sqrt(400 / 198 * 8 * 4 / 200), rel=0.01)
    assert half_width(b) == pytest.approx(t * scale * np.sqrt(400 / 198 * 8 * 12 / 200), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_profile_agrees_with_linearised_where_residuals_are_large(seed: int) -> None:
    # Of 1.5 loss scales in the mean square: the weights (1 + z)^-1/2 of a search would give some 0.8 of these widths.
    found = line(1.5 * Weights().loss_scale * np.random.default_rng(seed).standard_normal(60))
    intervals = profile(found, Workers(found.problem.predictor)).intervals
    for quick, slow in zip(linearised(found), intervals, strict=True):
        assert half_width(quick) == pytest.approx(half_width(slow), rel=0.08)


def test_linearised_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # 95 of 100 in the mean with a standard deviation of 2.2; a and b are of the same data, so 200 say a little more.
    inside = 0
    for seed in range(100):
        a, b = linearised(line(1.5 * Weights().loss_scale * np.random.default_rng(seed).standard_normal(24)))
        inside += (a.low <= 1.0 <= a.high) + (b.low <= 0.5 <= b.high)
    assert 180 <= inside <= 199


def test_pairs_count_no_cell_twice() -> None:
    # b is the difference of the levels of the batches, a and all pairs are within one: the pairs add residuals, but
    # no cells, so n - p stays 2. Cells have residuals of 0.015, pairs of 3 * 0.03 = 0.09, in units of the loss scale
    # 0.3 and 1.8: 2 C = 2 * 0.05^2 * (4 * (sqrt(1.09) - 1) + 2 * (sqrt(4.24) - 1)) = 0.01147, s^2 half of that.
    # Only cells know of a, each with 1.09^-1.5 = 0.8787: var a = s^2 / (2 * 0.8787).
    found = fitted(1 + 0.5 * np.array([0, 0, 1, 1]) + NOISE, "a", "b", compare=Compare(column="m", value="base"))
    a, _ = linearised(found)
    t = stats.t.ppf(0.975, 2)
    assert half_width(a) == pytest.approx(t * np.sqrt(0.01147 / 2 / (2 * 0.8787)), rel=2e-3)


class Blind(Level):
    """Of the values a and c only a has influence."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        return super().predict({"a": values["a"], "b": 0.0})


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_parameter_without_influence_is_undetermined(noise: float) -> None:
    predictor = Blind(rows=rows(1 + noise * NOISE))
    found = fit(predictor, parameters("a", "c"), np.ones(4, dtype=bool), effort=QUICK)
    assert found.values["c"] == pytest.approx(0.5, abs=1e-3)
    for intervals in (linearised(found), profile(found, Workers(predictor)).intervals):
        assert intervals[0].determined
        assert not intervals[1].determined
        assert intervals[1].why == "reaches both bounds"
        assert (intervals[1].low, intervals[1].high) == (-1.0, 3.0)


class Sum(Level):
    """Only the sum of a and c has influence."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        return super().predict({"a": values["a"] + values["c"], "b": 0.0})


def test_parameters_that_stand_in_for_each_other_are_undetermined() -> None:
    # a + c = 1 with both from -1 to 3: either may be from -1 to 2.
    predictor = Sum(rows=rows(1 + NOISE))
    found = fit(predictor, parameters("a", "c"), np.ones(4, dtype=bool), effort=QUICK)
    assert [i.why for i in linearised(found)] == ["reaches both bounds"] * 2
    intervals = profile(found, Workers(predictor)).intervals
    assert [i.why for i in intervals] == ["reaches the low bound"] * 2
    assert intervals[0].high == pytest.approx(2.0, abs=0.1)


def test_more_parameters_than_cells_determine_nothing() -> None:
    predictor = Level(rows=rows(np.array([1.0, 1.0, 1.5, 1.5]))[1:3])
    few = Few(rows=predictor.rows)
    found = fit(few, parameters("a", "b"), np.ones(2, dtype=bool), effort=QUICK)
    assert all(not interval.determined for interval in linearised(found))
    assert profile(found, Workers(few)).intervals == linearised(found)


class Few(Level):
    """The two middle rows."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        return super().predict(values)[1:3]


def test_an_interval_wider_than_half_of_the_range_is_undetermined() -> None:
    # As by hand above with 13 times the noise: b +- 4.30 * 13 * 0.0212 = 1.19, less what the loss takes.
    found = fitted(1 + 0.9 * np.array([0, 0, 1, 1]) + 13 * NOISE, "a", "b")
    _, b = linearised(found)
    assert half_width(b) > 1.0
    assert not b.determined


class Step(Level):
    """4 % off while a is below 1.5."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        return super().predict({"a": 1.04 if values["a"] < 1.5 else 1.0, "b": 0.0})


def test_a_lower_cost_on_the_way_is_handed_back() -> None:
    predictor = Step(rows=rows(1 + NOISE))
    found = fit(predictor, parameters("a"), np.ones(4, dtype=bool), effort=QUICK, starts=[{"a": 0.0}])
    better = profile(found, Workers(predictor)).better
    assert better is not None
    assert better["a"] >= 1.5
