"""Fitted values for people: beside the specification's, with interval, bounds and reason (`parameter_report`)."""

from typing import Any

from epsim.calibrate.fit import Fit
from epsim.calibrate.parameters import Parameter
from epsim.scenario.fields import ClusterField

_PREFIXES = ("cluster.device_types.orin.", "cluster.")


def parameter_report(fit: Fit) -> list[dict[str, Any]]:
    """Return an entry per parameter: numbers in SI, texts with units, and whether the data determine it."""
    return [_entry(fit, parameter) for parameter in fit.problem.free]


def _entry(fit: Fit, parameter: Parameter) -> dict[str, Any]:
    field = ClusterField(path=parameter.field)
    specification = fit.problem.predictor.specified(parameter.field)
    value = fit.values[parameter.field]
    return {
        "field": parameter.field,
        "name": short_name(parameter.field),
        "value": value,
        "written": field.format(value),
        "specification": specification,
        "low": parameter.low,
        "high": parameter.high,
        "reason": parameter.reason,
        "value_text": rounded_text(field, value),
        "specification_text": "none" if specification is None else rounded_text(field, specification),
        "low_text": rounded_text(field, parameter.low),
        "high_text": rounded_text(field, parameter.high),
    }


def short_name(path: str) -> str:
    """Return a field's path without what all parameters share.

    >>> short_name("cluster.device_types.orin.staging.bandwidth")
    'staging.bandwidth'
    """
    return path.removeprefix(next(prefix for prefix in _PREFIXES if path.startswith(prefix)))


def rounded_text(field: ClusterField, value: float) -> str:
    """Return an SI value with four digits, as the YAML has it."""
    return str(field.format(float(f"{value:.4g}")))
