"""`fit`: parameters of the cluster to measured rows, by least squares on the simulator from several starts.

The loss is soft-L1, so that a few outliers do not govern. Starts: the specification and seeded points, of which a few
steps choose the best. The same arguments give the same result, on any number of processes.
Letters: N parameters that are free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from epsim.calibrate.holdout import Mask
from epsim.calibrate.measured import Compare, Floats
from epsim.calibrate.parameters import Parameter
from epsim.calibrate.problem import Predicts, Problem, Weights
from epsim.calibrate.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to look for the minimum: points that are screened, fits from the best of them for a few steps, and how
    many of these go on to the end, which is where the cost falls by less than the tolerance (relative) in a step."""

    num_screened: int = 63
    num_short: int = 4
    short_steps: int = 10
    num_long: int = 2
    long_steps: int = 30
    tolerance: float = 1e-5


DEFAULT_EFFORT = Effort()
DEFAULT_WEIGHTS = Weights()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted set of values.

    values: by field, SI, rounded for people. predicted: seconds of all rows, [rows, 2]. cost: half the sum of the loss,
    with the ridge.
    at_N: the values' places between their bounds. jacobian: of the residuals (the data's, then the ridge's) at at_N.
    message: why the search ended. evaluations: how often all rows were simulated.
    """

    values: dict[str, float]
    predicted: Floats
    cost: float
    at_N: Floats
    jacobian: Floats
    message: str
    evaluations: int
    problem: Problem


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where a search ended."""

    at_N: Floats
    cost: float
    message: str
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class SearchTask:
    """A search for a worker: the problem but for its predictor, where to start, and how many steps at most."""

    free: tuple[Parameter, ...]
    train: Mask
    compare: Compare | None
    weights: Weights
    fixed: Mapping[str, float]
    start_N: Floats
    max_steps: int
    tolerance: float = 1e-5

    def problem(self, predictor: Predicts) -> Problem:
        return Problem(
            predictor=predictor,
            free=self.free,
            train=self.train,
            compare=self.compare,
            weights=self.weights,
            fixed=self.fixed,
        )


def fit(
    predictor: Predicts,
    parameters: Sequence[Parameter],
    train: Mask,
    compare: Compare | None = None,
    *,
    weights: Weights = DEFAULT_WEIGHTS,
    effort: Effort = DEFAULT_EFFORT,
    seed: int = 0,
    starts: Sequence[Mapping[str, float]] = (),
    workers: Workers | None = None,
) -> Fit:
    """Return the best values of the parameters for the training rows.

    train: bool [rows]. compare: also fit how rows differ from their baseline rows. starts: values by field to start
    from, instead of the screened points. workers: of this predictor; None: in this process.
    """
    workers = workers or Workers(predictor)
    task = SearchTask(
        free=tuple(parameters),
        train=train,
        compare=compare,
        weights=weights,
        fixed={},
        start_N=np.zeros(0),
        max_steps=0,
    )
    problem = task.problem(predictor)
    if starts:
        points, evaluations = [_place(parameters, values) for values in starts], 0
    else:
        points, evaluations = _screened(problem, task, effort, seed, workers)
    best, searched = _search_all(task, points, effort, workers)
    values = _rounded(problem, best.at_N)
    at_N = _place(parameters, values)
    return Fit(
        values=values,
        predicted=predictor.predict(values),
        cost=best.cost,
        at_N=at_N,
        jacobian=problem.jacobian(at_N),
        message=best.message,
        evaluations=evaluations + searched + 2 + len(at_N),
        problem=problem,
    )


def _place(parameters: Sequence[Parameter], values: Mapping[str, float]) -> Floats:
    return np.array([parameter.to_unit(values[parameter.field]) for parameter in parameters])


def _screened(
    problem: Problem, task: SearchTask, effort: Effort, seed: int, workers: Workers
) -> tuple[list[Floats], int]:
    """Return the points of the least cost to start from, best first, and how many were tried."""
    points = _screening_points(problem, effort.num_screened, seed)
    costs = workers.map(_cost_at, [replace(task, start_N=point) for point in points])
    order = np.argsort(costs, kind="stable")
    return [points[i] for i in order[: effort.num_short]], len(points)


def _search_all(task: SearchTask, points: Sequence[Floats], effort: Effort, workers: Workers) -> tuple[Solution, int]:
    """Return the best end of short searches from all points and long ones from their best, and the evaluations."""
    short = [replace(task, start_N=point, max_steps=effort.short_steps) for point in points]
    solutions = sorted(workers.map(search, short), key=lambda solution: solution.cost)
    long = [
        replace(task, start_N=s.at_N, max_steps=effort.long_steps, tolerance=effort.tolerance)
        for s in solutions[: effort.num_long]
    ]
    solutions = [*workers.map(search, long), *solutions]
    return min(solutions, key=lambda s: s.cost), sum(s.evaluations for s in solutions)


def _rounded(problem: Problem, at_N: Floats) -> dict[str, float]:
    """Return values that a file can hold in a few digits, so that it says exactly what was fitted."""
    rounded = {field: problem.predictor.rounded(field, value) for field, value in problem.values(at_N).items()}
    return {p.field: min(max(rounded[p.field], p.low), p.high) for p in problem.free}


def _screening_points(problem: Problem, num_points: int, seed: int) -> list[Floats]:
    """The specification, and points drawn so that each parameter's range is covered evenly (a Latin hypercube)."""
    rng = np.random.default_rng(seed)
    num_free = len(problem.free)
    strata = np.stack([rng.permutation(num_points) for _ in range(num_free)], axis=1)
    points = (strata + rng.uniform(size=strata.shape)) / num_points
    return [problem.specified_N, *points]


def _inside(at_N: Floats) -> Floats:
    """Off the bounds, where the search's steps would be scaled to nothing."""
    return np.clip(at_N, 1e-3, 1 - 1e-3)


def _cost_at(predictor: Predicts, task: SearchTask) -> float:
    return task.problem(predictor).data_cost(task.start_N)


def search(predictor: Predicts, task: SearchTask) -> Solution:
    """Return where least squares ends from a start (scipy's trust region reflective, bounds 0 to 1, soft-L1)."""
    from scipy.optimize import least_squares  # here: slow to load

    problem = task.problem(predictor)
    if not task.free:
        return Solution(
            at_N=task.start_N, cost=problem.data_cost(task.start_N), message="nothing is free", evaluations=1
        )
    found = least_squares(
        problem.residuals,
        _inside(task.start_N),
        jac=problem.jacobian,
        bounds=(0.0, 1.0),
        loss="soft_l1",
        f_scale=task.weights.loss_scale,
        max_nfev=task.max_steps,
        ftol=task.tolerance,
        xtol=0.1 * task.tolerance,
        gtol=1e-10,
    )
    evaluations = found.nfev + found.njev * (1 + len(task.free))
    return Solution(at_N=found.x, cost=float(found.cost), message=_ending(found.status), evaluations=evaluations)


def _ending(status: int) -> str:
    return "stopped after the most steps" if status == 0 else "converged"
