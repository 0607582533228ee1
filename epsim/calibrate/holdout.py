"""What a fit is tested on: `Scheme`s of training and test rows, `errors` of predictions, and a `naive` rule beside.

Arrays of rows are in the order of the measurements; the columns of [rows, 2] are TTFT and TPOT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.calibrate.measured import (
    Compare,
    Floats,
    MeasuredError,
    MeasuredRow,
    measured_matrix,
    pairs_of,
    split_condition,
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A name for people, and the rows that are fitted and those that are predicted, bool [rows]."""

    name: str
    train: Mask
    test: Mask


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Means over the measured test cells; None where there is none.

    mean_abs_ttft, mean_abs_tpot: |predicted / measured - 1|; bias_ttft, bias_tpot: predicted / measured - 1.
    speedup_ttft_points, speedup_tpot_points: |predicted - measured| of 100 * (row / baseline - 1), over the pairs whose
    compared row is a test row; num_cells: how many cells the first four are over.
    """

    mean_abs_ttft: float | None
    mean_abs_tpot: float | None
    bias_ttft: float | None
    bias_tpot: float | None
    speedup_ttft_points: float | None
    speedup_tpot_points: float | None
    num_cells: int


def in_sample(rows: Sequence[MeasuredRow]) -> Scheme:
    """Return the scheme that fits all rows and predicts them."""
    every = np.ones(len(rows), dtype=bool)
    return Scheme(name="in sample", train=every, test=every)


def hold_out(rows: Sequence[MeasuredRow], text: str) -> Scheme:
    """Return the scheme that predicts the rows with `column=value,value` from all others."""
    column, values = split_condition(text, "--hold-out", rows)
    test = np.array([row.get(column) in values for row in rows])
    if test.all():
        raise MeasuredError(f'--hold-out "{text}": holds out every row, and leaves none to fit; write fewer values')
    return Scheme(name=f"held out {text}", train=~test, test=test)


def k_folds(rows: Sequence[MeasuredRow], k: int, seed: int, compare: Compare | None = None) -> tuple[Scheme, ...]:
    """Return k schemes, each predicting another k-th of the rows; a row and its baseline row stay together."""
    if not 2 <= k <= len(rows):
        raise MeasuredError(f"--folds: {k} is not from 2 to {len(rows)}, the number of measured rows; write e.g. 5")
    group = np.arange(len(rows))
    for row, baseline in pairs_of(rows, compare):
        group[row] = baseline
    groups = np.unique(group)
    if k > len(groups):
        raise MeasuredError(f"--folds: {k} is above {len(groups)}, the number of compared groups of rows; write fewer")
    order = np.random.default_rng(seed).permutation(groups)
    fold = {int(member): position % k for position, member in enumerate(order)}
    tests = [np.array([fold[int(g)] == i for g in group]) for i in range(k)]
    return tuple(Scheme(name=f"fold {i + 1} of {k}", train=~test, test=test) for i, test in enumerate(tests))


def require_cells(rows: Sequence[MeasuredRow], schemes: Sequence[Scheme]) -> None:
    """Raise MeasuredError where a scheme has no measured cell to fit."""
    measured = np.isfinite(measured_matrix(rows)).any(axis=1)
    for scheme in schemes:
        if not (scheme.train & measured).any():
            raise MeasuredError(f"{scheme.name}: leaves no measured cell to fit; hold out fewer rows, or measure more")


def errors(rows: Sequence[MeasuredRow], predicted: Floats, test: Mask, compare: Compare | None) -> Errors:
    """Return the errors of predicted seconds, [rows, 2], on the test rows; NaN predictions are no predictions."""
    measured = measured_matrix(rows)
    relative = np.where(test[:, None], predicted / measured - 1, np.nan)
    pairs = pairs_of(rows, compare)
    pairs = pairs[test[pairs[:, 0]]]
    speedup = [100 * (values[pairs[:, 0]] / values[pairs[:, 1]] - 1) for values in (predicted, measured)]
    points = np.abs(speedup[0] - speedup[1])
    return Errors(
        mean_abs_ttft=_mean(np.abs(relative[:, 0])),
        mean_abs_tpot=_mean(np.abs(relative[:, 1])),
        bias_ttft=_mean(relative[:, 0]),
        bias_tpot=_mean(relative[:, 1]),
        speedup_ttft_points=_mean(points[:, 0]),
        speedup_tpot_points=_mean(points[:, 1]),
        num_cells=int(np.isfinite(relative).sum()),
    )


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def naive(rows: Sequence[MeasuredRow], train: Mask, test: Mask) -> Floats:
    """Return what a rule without any model predicts, [rows, 2]; NaN outside the test rows.

    Where two or more training rows have the test row's settings at other batch sizes: a straight line between the two
    nearest ones (beyond the ends: through the last two) in logarithms of batch size and time. Elsewhere the value of
    the training row that has the same batch size, if any, then the most equal settings, then the nearest batch size;
    the first of equals. A test row never predicts itself: in sample this is leave-one-out.
    """
    measured = measured_matrix(rows)
    predicted = np.full_like(measured, np.nan)
    for i in np.flatnonzero(test).tolist():
        for metric in range(measured.shape[1]):
            known: list[int] = np.flatnonzero(train & np.isfinite(measured[:, metric])).tolist()
            known = [j for j in known if j != i]
            same = [j for j in known if rows[j].settings == rows[i].settings]
            if len(same) > 1:
                points = sorted((rows[j].batch_size, float(measured[j, metric])) for j in same)
                predicted[i, metric] = _log_line(points, rows[i].batch_size)
            elif known:
                predicted[i, metric] = measured[_most_alike(rows, i, known), metric]
    return predicted


def naive_beside_seen(rows: Sequence[MeasuredRow], scheme: Scheme) -> Floats:
    """Return what the naive rule says of the test rows, and of the others what was measured, [rows, 2].

    A change of a test row from a row that was fitted is then one from a known value.
    """
    return np.where(scheme.test[:, None], naive(rows, scheme.train, scheme.test), measured_matrix(rows))


def _log_line(points: Sequence[tuple[int, float]], batch_size: int) -> float:
    sizes, seconds = np.log(np.array(points, dtype=np.float64)).T
    at = np.log(batch_size)
    right = int(np.clip(np.searchsorted(sizes, at), 1, len(sizes) - 1))
    slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
    return float(np.exp(seconds[right - 1] + slope * (at - sizes[right - 1])))


def _most_alike(rows: Sequence[MeasuredRow], i: int, known: Sequence[int]) -> int:
    return max(known, key=lambda j: _likeness(rows[i], rows[j]))


def _likeness(row: MeasuredRow, other: MeasuredRow) -> tuple[bool, int, float]:
    columns = {path for path, _ in (*row.settings, *other.settings)}
    num_equal = sum(row.get(column) == other.get(column) for column in columns)
    distance = abs(float(np.log(row.batch_size / other.batch_size)))
    return row.batch_size == other.batch_size, num_equal, -distance
