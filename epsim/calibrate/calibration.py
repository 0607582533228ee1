"""`calibrate`: a fit, how far its parameters are determined, and its errors on unseen rows, as one report.

A report is a mapping of plain values, in SI units and with their text beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from epsim import __version__
from epsim.calibrate.determine import Interval, linearised, profile
from epsim.calibrate.fit import DEFAULT_EFFORT, DEFAULT_WEIGHTS, Effort, Fit, fit
from epsim.calibrate.holdout import Mask, Scheme, errors, in_sample, naive_beside_seen, require_cells
from epsim.calibrate.measured import METRICS, Compare, Floats, MeasuredRow, measured_matrix
from epsim.calibrate.parameters import Parameter
from epsim.calibrate.predict import Predictor
from epsim.calibrate.problem import Weights
from epsim.calibrate.profile import FIRST_WORDS, fitted_type, profile_text, set_lines
from epsim.calibrate.workers import Workers
from epsim.scenario.fields import ClusterField

_MOST_PROFILES = 3
_NOT_CONVERGED = "not converged: a better fit was found on the way"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a calibration.

    hold_outs: schemes by name; those of one name (folds) each predict their own rows, and count together: a row that is
    compared must be tested with its baseline row, or be the only scheme's.
    profiled: intervals by refitting, which is slow, in place of linearised ones.
    """

    parameters: tuple[Parameter, ...]
    compare: Compare | None = None
    hold_outs: Mapping[str, Sequence[Scheme]]
    weights: Weights = DEFAULT_WEIGHTS
    effort: Effort = DEFAULT_EFFORT
    seed: int = 0
    profiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a scheme ("specified", "in sample", a hold-out) says of all rows.

    seconds: [rows, 2], also of the rows that were fitted, from which changes are counted. test: the rows that count,
    bool [rows]. naive: the naive rule's seconds of them, and what was measured of the others; None for no rule.
    """

    seconds: Floats
    test: Mask
    naive: Floats | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """fit, intervals: of all rows. predicted: what is said of all rows, by scheme."""

    question: Question
    fit: Fit
    intervals: tuple[Interval, ...]
    predicted: dict[str, Predicted]


def calibrate(predictor: Predictor, question: Question, workers: Workers) -> Calibration:
    """Fit all rows and, anew, the training rows of each hold-out. InputError where a field cannot be fitted."""
    predictor.check([parameter.field for parameter in question.parameters])
    every = in_sample(predictor.rows)
    require_cells(predictor.rows, [every, *(scheme for schemes in question.hold_outs.values() for scheme in schemes)])
    best = _fit(predictor, question, every, workers)
    intervals = linearised(best)
    if question.profiled:
        best, intervals = _profiled(predictor, question, best, workers)
    predicted = {
        "specified": Predicted(seconds=predictor.predict({}), test=every.test, naive=None),
        every.name: Predicted(seconds=best.predicted, test=every.test, naive=naive_beside_seen(predictor.rows, every)),
    }
    for name, schemes in question.hold_outs.items():
        fits = [_fit(predictor, question, scheme, workers).predicted for scheme in schemes]
        predicted[name] = together(predictor.rows, schemes, fits)
    return Calibration(question=question, fit=best, intervals=intervals, predicted=predicted)


def together(rows: Sequence[MeasuredRow], schemes: Sequence[Scheme], predicted: Sequence[Floats]) -> Predicted:
    """Return predictions of several schemes, s [rows, 2] each, as one: every row from the scheme that tests it.

    Rows that none tests are those of the first scheme.
    """
    seconds, rule = predicted[0].copy(), naive_beside_seen(rows, schemes[0])
    for scheme, own in zip(schemes[1:], predicted[1:], strict=True):
        seconds[scheme.test] = own[scheme.test]
        rule[scheme.test] = naive_beside_seen(rows, scheme)[scheme.test]
    test = np.any([scheme.test for scheme in schemes], axis=0)
    return Predicted(seconds=seconds, test=test, naive=rule)


def _fit(
    predictor: Predictor, question: Question, scheme: Scheme, workers: Workers, *starts: Mapping[str, float]
) -> Fit:
    return fit(
        predictor,
        question.parameters,
        scheme.train,
        question.compare,
        weights=question.weights,
        effort=question.effort,
        seed=question.seed,
        starts=starts,
        workers=workers,
    )


def _profiled(
    predictor: Predictor, question: Question, best: Fit, workers: Workers
) -> tuple[Fit, tuple[Interval, ...]]:
    """Return the profiled intervals with the fit that they are of: a better one, if the walks came upon one.

    Where the last walks still came upon one, nothing is determined: the minimum has not been found.
    """
    found = profile(best, workers)
    for _ in range(_MOST_PROFILES - 1):
        if found.better is None:
            break
        better = _fit(predictor, question, in_sample(predictor.rows), workers, found.better)
        if better.cost >= best.cost:
            return best, found.intervals
        best, found = better, profile(better, workers)
    if found.better is None:
        return best, found.intervals
    return best, tuple(replace(interval, why=_NOT_CONVERGED) for interval in found.intervals)


def report(calibration: Calibration, data_name: str) -> dict[str, Any]:
    """Return the whole calibration as plain values for JSON."""
    question, best = calibration.question, calibration.fit
    rows = best.problem.predictor.rows
    return {
        "epsim_version": __version__,
        "data": data_name,
        "num_rows": len(rows),
        "num_cells": best.problem.num_cells,
        "compare": None if question.compare is None else asdict(question.compare),
        "fit": {"cost": best.cost, "message": best.message, "evaluations": best.evaluations},
        "parameters": [
            _parameter(parameter, best, interval)
            for parameter, interval in zip(question.parameters, calibration.intervals, strict=True)
        ],
        "set": set_lines(best.values),
        "search": _search(question, best.problem.weights),
        "schemes": [_scheme(calibration, name) for name in calibration.predicted],
        "cells": cells(calibration),
    }


def _search(question: Question, weights: Weights) -> dict[str, Any]:
    """Return what was chosen for the fits besides the parameters."""
    effort = question.effort
    text = (
        f"pair weight {weights.pairs:g}, ridge {weights.ridge:g}, loss scale {weights.loss_scale:g}, "
        f"seed {question.seed}; {effort.num_screened} seeded points, {effort.num_short} followed for "
        f"{effort.short_steps} steps, {effort.num_long} for {effort.long_steps} more, tolerance {effort.tolerance:g}"
    )
    return {"weights": asdict(weights), "seed": question.seed, "effort": asdict(effort), "text": text}


def _parameter(parameter: Parameter, best: Fit, interval: Interval) -> dict[str, Any]:
    numbers = {
        "value": best.values[parameter.field],
        "specified": best.problem.predictor.specified(parameter.field),
        "low": parameter.low,
        "high": parameter.high,
        "interval_low": interval.low,
        "interval_high": interval.high,
    }
    return {
        "field": parameter.field,
        **numbers,
        "text": {name: text(parameter, number) for name, number in numbers.items()},
        "interval": interval.method,
        "determined": interval.determined,
        "undetermined_because": interval.why or None,
        "reason": parameter.reason,
    }


def text(parameter: Parameter, value: float | None) -> str | None:
    """Return a value to four digits in the unit that fits the parameter's high bound; None as it is."""
    if value is None:
        return None
    field = ClusterField(path=parameter.field)
    _, _, unit = str(field.format(parameter.high)).partition(" ")
    return f"{value / field.parse(f'1 {unit}'):.4g} {unit}" if unit else f"{value:.4g}"


def _scheme(calibration: Calibration, name: str) -> dict[str, Any]:
    rows, compare = calibration.fit.problem.predictor.rows, calibration.question.compare
    found = calibration.predicted[name]
    return {
        "name": name,
        "num_test": int(found.test.sum()),
        "errors": asdict(errors(rows, found.seconds, found.test, compare)),
        "naive": None if found.naive is None else asdict(errors(rows, found.naive, found.test, compare)),
    }


def cells(calibration: Calibration) -> list[dict[str, Any]]:
    """Return a row per measured cell: what was measured, and what each scheme predicts of it."""
    rows = calibration.fit.problem.predictor.rows
    measured = measured_matrix(rows)
    columns = list(dict.fromkeys(path for row in rows for path, _ in row.settings))
    return [
        {
            **{column: rows[i].get(column) for column in columns},
            "batch_size": rows[i].batch_size,
            "metric": METRICS[m],
            "measured_s": float(measured[i, m]),
            **{
                key: float(number) if found.test[i] else None
                for name, found in calibration.predicted.items()
                for key, number in (
                    (f"{name}: predicted_s", found.seconds[i, m]),
                    (f"{name}: error_frac", found.seconds[i, m] / measured[i, m] - 1),
                )
            },
        }
        for i in range(len(rows))
        for m in range(len(METRICS))
        if np.isfinite(measured[i, m])
    ]


def device_profile(calibration: Calibration, data_name: str, command: str) -> str:
    """Return the YAML of the fitted device type, with a comment on where it comes from; same fit, same bytes."""
    predictor = calibration.fit.problem.predictor
    assert isinstance(predictor, Predictor)
    device_type = fitted_type(calibration.question.parameters)
    cluster = predictor.changed(calibration.fit.values)
    return profile_text(cluster, device_type, _header(calibration, data_name, command))


def _header(calibration: Calibration, data_name: str, command: str) -> list[str]:
    described = report(calibration, data_name)
    lines = [
        f"{FIRST_WORDS} {__version__}; name it in a cluster's device_types.",
        f"command: {command}",
        f"data: {data_name}, {described['num_cells']} measured cells",
        f"search: {described['search']['text']}",
    ]
    lines += [f"mean errors, {scheme['name']}: {_in_words(scheme['errors'])}" for scheme in described["schemes"]]
    for entry in described["parameters"]:
        words = entry["text"]
        verdict = f"95 % {words['interval_low']} to {words['interval_high']}"
        if not entry["determined"]:
            verdict = f"undetermined ({entry['undetermined_because']})"
        lines.append(f"{entry['field']}: {words['value']} of {words['low']} to {words['high']}; {verdict}")
    return lines


def _in_words(found: Mapping[str, Any]) -> str:
    named = {"TTFT": found["mean_abs_ttft"], "TPOT": found["mean_abs_tpot"]}
    return ", ".join(f"{name} {value:.1%}" for name, value in named.items() if value is not None)
