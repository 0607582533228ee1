"""Fitted values for people and as a device profile: `parameter_report`, `fitted_profile`."""

from collections.abc import Mapping
from typing import Any

from epsim.calibrate.calibration import Calibration, Question, device_profile, report, together
from epsim.calibrate.determine import linearised
from epsim.calibrate.fit import Fit
from epsim.validate.latency import COMPARE, DATA_NAME, EFFORT, STUDIES, Case

_PREFIXES = ("cluster.device_types.orin.", "cluster.")
_COMMAND = "epsim validate published --device FILE"


def parameter_report(case: Case, fits: Mapping[str, Fit]) -> list[dict[str, Any]]:
    """Return an entry per parameter: numbers in SI, texts with units, and whether the data determine it."""
    entries = report(_calibration(case, fits), DATA_NAME)["parameters"]
    return [{**entry, "name": short_name(entry["field"])} for entry in entries]


def fitted_profile(case: Case, fits: Mapping[str, Fit]) -> str:
    """Return the YAML of the device that all rows were fitted with; the errors of all studies are in its comment."""
    return device_profile(_calibration(case, fits), DATA_NAME, _COMMAND)


def short_name(path: str) -> str:
    """Return a field's path without what all parameters share.

    >>> short_name("cluster.device_types.orin.staging.bandwidth")
    'staging.bandwidth'
    """
    return path.removeprefix(next(prefix for prefix in _PREFIXES if path.startswith(prefix)))


def _calibration(case: Case, fits: Mapping[str, Fit]) -> Calibration:
    """Return the studies in the form that `epsim calibrate` reports."""
    best = fits["in_sample"]
    return Calibration(
        question=Question(
            parameters=case.parameters,
            compare=COMPARE,
            hold_outs={},
            weights=best.problem.weights,
            effort=EFFORT,
        ),
        fit=best,
        intervals=linearised(best),
        predicted={
            title: together(case.rows, [case.scheme(held_out)], [fits[key].predicted])
            for key, title, held_out in STUDIES
        },
    )
