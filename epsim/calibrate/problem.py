"""`Problem`: the least-squares problem of a calibration, in places from 0 to 1 between the parameters' bounds.

Letters: N parameters that are free, D residuals that come from data, cells: measured (row, TTFT or TPOT).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from epsim.calibrate.holdout import Mask
from epsim.calibrate.measured import Compare, Floats, MeasuredError, MeasuredRow, measured_matrix, pairs_of
from epsim.calibrate.parameters import Parameter

STEP = 1e-4  # of the differences; the engines are piecewise linear, so it need not be as small as rounding allows


class Predicts(Protocol):
    """What a fit needs of a predictor (`Predictor` of predict.py, or a formula in a test)."""

    @property
    def rows(self) -> Sequence[MeasuredRow]: ...
    def specified(self, field: str) -> float | None:
        """Return the value that the scenario gives a field; None where it leaves it out."""

    def rounded(self, field: str, value: float) -> float:
        """Return a value with as few digits as people should see."""

    def predict(self, values: Mapping[str, float]) -> Floats:
        """Return mean TTFT and TPOT in s, float64 [rows, 2]."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How residuals count against each other.

    pairs: of a difference between a row and its baseline row, beside 1 for a level: with the default 3, levels are
    trusted a third as much as ratios, which is what errors of two rows with a correlation of 0.9 amount to.
    ridge: of a parameter's distance (0 to 1) from the specification's value: too weak to matter beside any data.
    loss_scale: residuals well below it count by their square, larger ones by their size.
    """

    pairs: float = 3.0
    ridge: float = 1e-3
    loss_scale: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Fit `free` to the training rows, with the other values `fixed` (SI, by field)."""

    predictor: Predicts
    free: tuple[Parameter, ...]
    train: Mask
    compare: Compare | None = None
    weights: Weights = Weights()
    fixed: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self._cells.any():
            raise MeasuredError("no measured cell is left to fit; hold out fewer rows, or measure more")

    @cached_property
    def _log_measured(self) -> Floats:
        return np.asarray(np.log(measured_matrix(self.predictor.rows)))

    @cached_property
    def _cells(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self._log_measured) & self.train[:, None]

    @cached_property
    def _pairs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The pairs with both rows in training, and in which metrics both are measured, [pairs, 2]."""
        pairs = pairs_of(self.predictor.rows, self.compare)
        pairs = pairs[self.train[pairs].all(axis=1)]
        return pairs, self._cells[pairs[:, 0]] & self._cells[pairs[:, 1]]

    @property
    def num_cells(self) -> int:
        """Measured training cells: what the data amount to, however many differences of them are added."""
        return int(self._cells.sum())

    @cached_property
    def specified_N(self) -> Floats:
        """Where the specification's values lie; a rate that the scenario leaves out (no staging) at its high bound."""
        places = []
        for parameter in self.free:
            value = self.predictor.specified(parameter.field)
            places.append(1.0 if value is None else parameter.to_unit(value))
        return np.array(places)

    def values(self, at_N: Floats) -> dict[str, float]:
        """Return all values, fixed and free, by field."""
        free = {parameter.field: parameter.from_unit(float(at)) for parameter, at in zip(self.free, at_N, strict=True)}
        return {**(self.fixed or {}), **free}

    def data(self, predicted: Floats) -> Floats:
        """Return the residuals that come from data, [D]: log(predicted / measured), then weighted differences."""
        level = np.log(predicted) - self._log_measured
        pairs, known = self._pairs
        difference = level[pairs[:, 0]] - level[pairs[:, 1]]
        return np.concatenate((level[self._cells], self.weights.pairs * difference[known]))

    def residuals(self, at_N: Floats) -> Floats:
        """Return the data's residuals and the ridge's, [D + N]."""
        data = self.data(self.predictor.predict(self.values(at_N)))
        return np.concatenate((data, self.weights.ridge * (at_N - self.specified_N)))

    def jacobian(self, at_N: Floats) -> Floats:
        """Return the differences of `residuals`, [D + N, N], towards the middle of each parameter's range."""
        base = self.residuals(at_N)
        columns = []
        for n in range(len(at_N)):
            step = STEP if at_N[n] < 0.5 else -STEP
            moved = at_N.copy()
            moved[n] += step
            columns.append((self.residuals(moved) - base) / step)
        return np.stack(columns, axis=1) if columns else np.zeros((len(base), 0))

    def data_cost(self, at_N: Floats) -> float:
        """Return half the sum of the robust loss over the data's residuals, without the ridge."""
        return self.robust_cost(self.residuals(at_N)[: -len(self.free) or None])

    def robust_cost(self, residuals: Floats) -> float:
        """Return half the sum of the soft-L1 loss 2 s^2 (sqrt(1 + (r / s)^2) - 1), s the loss scale."""
        scale = self.weights.loss_scale
        return float(scale**2 * np.sum(np.sqrt(1 + (residuals / scale) ** 2) - 1))
