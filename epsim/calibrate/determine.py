"""Whether data determine a fitted parameter: `linearised` intervals at once, or `profile`d ones by many refits.

Both are 95 % intervals from the least-squares cost C (half the robust sum of squares of the data's residuals) at its
minimum over n measured cells with p parameters that matter: the residual variance is s^2 = 2 C / (n - p), and a value
is inside where the cost, minimised over all other parameters, is at most C + s^2 F / 2, with F the 0.95 quantile of
F(1, n - p). n counts measured cells, not the differences of pairs, which say again what the cells have said: adding
w^2 (r_i - r_j)^2 to r_i^2 + r_j^2 is generalised least squares for errors that correlate by w^2 / (1 + w^2), 0.9 for 3.
s is taken to be at least 0.1 %: no latency is measured better. The ridge towards the specification does not count.
Letters: N parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from epsim.calibrate.fit import Fit, SearchTask, search
from epsim.calibrate.measured import Floats
from epsim.calibrate.parameters import Parameter
from epsim.calibrate.problem import Predicts
from epsim.calibrate.workers import Workers

CONFIDENCE = 0.95
LEAST_NOISE = 1e-3
WIDEST = 0.5  # of a parameter's range: a wider interval says next to nothing
_NO_INFLUENCE = 1e-10  # of J^T J: of a direction that no residual depends on
_SMALLEST_STEP, _LARGEST_STEP = 0.01, 0.25
_REFIT_STEPS = 8
_MOST_REFITS = 16  # of a walk
_CLOSE = 0.01  # of a parameter's range: so well is the end of an interval found


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A parameter's interval in SI units, within its bounds; why: what keeps it from being determined, else empty."""

    field: str
    low: float
    high: float
    method: Literal["linearised", "profile"]
    why: str

    @property
    def determined(self) -> bool:
        """Whether the data say where in its range the parameter lies."""
        return not self.why


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Intervals of all parameters; better: values of a lower cost than the fit's that the search came upon."""

    intervals: tuple[Interval, ...]
    better: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """What the residuals at a minimum say of their spread: s^2, n - p, and by how much the cost may rise."""

    variance: float
    freedom: int

    @property
    def allowed_rise(self) -> float:
        from scipy.stats import f

        return float(0.5 * self.variance * f.ppf(CONFIDENCE, 1, self.freedom))


def _noise(fit: Fit) -> _Noise | None:
    """Return the noise of a fit, None where there are no more cells than parameters that matter."""
    freedom = fit.problem.num_cells - int((_curvature(fit)[0] > _NO_INFLUENCE).sum())
    if freedom < 1:
        return None
    cost = fit.problem.robust_cost(fit.problem.data(fit.predicted))
    return _Noise(variance=max(2 * cost / freedom, LEAST_NOISE**2), freedom=freedom)


def _curvature(fit: Fit) -> tuple[Floats, Floats]:
    """Return eigenvalues [N] and eigenvectors [N, N] of J^T W J over the data, W the second derivative of the loss.

    Not W = (1 + (r / s)^2)^-1/2, with which the steps of a search lower the cost: it overrates how fast the cost rises.
    """
    residuals_D = fit.problem.data(fit.predicted)
    weight_D = (1 + (residuals_D / fit.problem.weights.loss_scale) ** 2) ** -1.5
    jacobian_DN = fit.jacobian[: len(residuals_D)]
    values_N, vectors_NN = np.linalg.eigh(jacobian_DN.T @ (weight_D[:, None] * jacobian_DN))
    return values_N, vectors_NN


def linearised(fit: Fit) -> tuple[Interval, ...]:
    """Return the intervals that the derivatives at the minimum give: quick, right where the model is nearly linear."""
    noise = _noise(fit)
    if noise is None:
        return tuple(_interval(p, 0.0, 1.0, "linearised") for p in fit.problem.free)
    half_N = _half_widths(fit, noise)
    return tuple(
        _interval(parameter, at - half, at + half, "linearised")
        for parameter, at, half in zip(fit.problem.free, fit.at_N.tolist(), half_N.tolist(), strict=True)
    )


def _half_widths(fit: Fit, noise: _Noise) -> Floats:
    values_N, vectors_NN = _curvature(fit)
    inverse_N = 1 / np.maximum(values_N, _NO_INFLUENCE)
    return np.asarray(np.sqrt(2 * noise.allowed_rise * (vectors_NN**2 @ inverse_N)))


def _interval(
    parameter: Parameter, low_at: float, high_at: float, method: Literal["linearised", "profile"]
) -> Interval:
    ends = [name for name, reached in (("low", low_at <= 0), ("high", high_at >= 1)) if reached]
    low_at, high_at = max(low_at, 0.0), min(high_at, 1.0)
    why = ""
    if ends:
        why = f"reaches {'both bounds' if len(ends) == 2 else f'the {ends[0]} bound'}"
    elif high_at - low_at > WIDEST:
        why = f"wider than {WIDEST:.0%} of the range"
    return Interval(
        field=parameter.field,
        low=parameter.from_unit(low_at),
        high=parameter.from_unit(high_at),
        method=method,
        why=why,
    )


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """A walk from the minimum up or down one parameter, until the refitted cost is above the limit."""

    task: SearchTask
    walked: Parameter
    start_at: float
    direction: int
    first_step: float
    least_cost: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class _End:
    """Where a walk crossed the limit (beyond 0 or 1: it never did), and the lowest cost with its values."""

    at: float
    cost: float
    values: Mapping[str, float]


def profile(fit: Fit, workers: Workers) -> Profile:
    """Return the intervals of the profile likelihood: each parameter is moved and all others fitted again.

    A walk starts from the solution before, with steps of the linearised half-width and growing, and ends where the cost
    crosses the limit or the parameter its bound. Slow: hundreds of refits for a dozen parameters.
    """
    noise = _noise(fit)
    if noise is None:
        return Profile(intervals=linearised(fit), better=None)
    least_cost = fit.problem.robust_cost(fit.problem.data(fit.predicted))
    steps_N = np.clip(_half_widths(fit, noise), _SMALLEST_STEP, _LARGEST_STEP)
    walks = [
        _Walk(
            task=_others(fit, n),
            walked=fit.problem.free[n],
            start_at=float(fit.at_N[n]),
            direction=direction,
            first_step=float(steps_N[n]),
            least_cost=least_cost,
            limit=least_cost + noise.allowed_rise,
        )
        for n in range(len(fit.at_N))
        for direction in (-1, 1)
    ]
    ends = workers.map(_walk, walks)
    intervals = tuple(
        _interval(parameter, low.at, high.at, "profile")
        for parameter, low, high in zip(fit.problem.free, ends[::2], ends[1::2], strict=True)
    )
    best = min(ends, key=lambda end: end.cost)
    return Profile(intervals=intervals, better=best.values if best.cost < 0.99 * least_cost else None)


def _others(fit: Fit, n: int) -> SearchTask:
    """Return the search of all parameters but the n-th, from the fit."""
    problem = fit.problem
    return SearchTask(
        free=(*problem.free[:n], *problem.free[n + 1 :]),
        train=problem.train,
        compare=problem.compare,
        weights=problem.weights,
        fixed={},
        start_N=np.delete(fit.at_N, n),
        max_steps=_REFIT_STEPS,
    )


def _walk(predictor: Predicts, walk: _Walk) -> _End:
    inside, step, start_N = (walk.start_at, walk.least_cost), walk.first_step, walk.task.start_N
    best = _End(at=np.nan, cost=np.inf, values={})
    outside: tuple[float, float] | None = None
    at = _next(inside, step, walk)
    for _ in range(_MOST_REFITS):
        task = replace(walk.task, start_N=start_N, fixed={walk.walked.field: walk.walked.from_unit(at)})
        solution, problem = search(predictor, task), task.problem(predictor)
        cost = problem.data_cost(solution.at_N)
        if cost < best.cost:
            best = _End(at=np.nan, cost=cost, values=problem.values(solution.at_N))
        if cost > walk.limit:
            outside = at, cost
        else:
            inside, step, start_N = (at, cost), 1.5 * step, solution.at_N
        if outside is None and at in (0.0, 1.0):
            return replace(best, at=at)
        before, at = at, _next(inside, step, walk) if outside is None else _crossing(inside, outside, walk)
        if outside is not None and abs(at - before) < _CLOSE:
            break
    return replace(best, at=at)


def _next(inside: tuple[float, float], step: float, walk: _Walk) -> float:
    return min(max(inside[0] + walk.direction * step, 0.0), 1.0)


def _crossing(inside: tuple[float, float], outside: tuple[float, float], walk: _Walk) -> float:
    """Where the cost meets the limit, if it rises with the square of the distance from the minimum."""
    roots = [np.sqrt(max(cost - walk.least_cost, 0.0)) for cost in (inside[1], walk.limit, outside[1])]
    share = (roots[1] - roots[0]) / (roots[2] - roots[0])
    return float(inside[0] + np.clip(share, 0.1, 0.9) * (outside[0] - inside[0]))
