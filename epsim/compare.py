"""A grid of scenarios beside a baseline: `parse_axes`, `compare`."""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from epsim.errors import ScenarioError
from epsim.run import simulate
from epsim.scenario import ScenarioSpec, apply_override, check_scenario

_METRICS = {"ttft_s": "mean", "tpot_s": "mean", "e2e_s": "mean", "output_tokens_per_s": None}
Axes = dict[str, list[Any]]


def parse_axes(texts: Iterable[str]) -> Axes:
    """Return the values of each axis from `path=value,value,...`; values are read as YAML.

    >>> parse_axes(["transmission.mode=sync,async", "transmission.num_chunks=1,2"])
    {'transmission.mode': ['sync', 'async'], 'transmission.num_chunks': [1, 2]}
    """
    axes: Axes = {}
    for text in texts:
        target, equals, values = text.partition("=")
        if not equals or not target.strip() or not values.strip():
            raise ScenarioError(f'--axis "{text}": write path=value,value, e.g. transmission.mode=sync,async')
        if target.strip() in axes:
            raise ScenarioError(f'--axis "{text}": this axis is there twice; put all its values into one')
        try:
            axes[target.strip()] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise ScenarioError(f'--axis "{text}": the values are not YAML; quote them') from error
    return axes


def parse_baseline(text: str | None, axes: Axes) -> dict[str, Any]:
    """Return the value of each axis in the baseline, `path=value,path=value`; axes left out take their first value."""
    baseline = {target: values[0] for target, values in axes.items()}
    for pair in text.split(",") if text else ():
        target, equals, value = pair.partition("=")
        if not equals or target.strip() not in axes:
            raise ScenarioError(f'--baseline "{pair}": write axis=value with one of the axes {", ".join(axes)}')
        baseline[target.strip()] = yaml.safe_load(value)
    return baseline


def compare(
    raw: dict[str, Any],
    axes: Axes,
    baseline: Mapping[str, Any],
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Simulate every combination of the axes and return a row per combination and batch size, best first.

    raw: the scenario as a mapping that `check_scenario` accepts. baseline: a value for each axis, the combination that
    differences are taken to (100 * (value / baseline - 1)). Rows are sorted by batch size, then end-to-end time.
    All combinations are checked before the first is simulated.
    """
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if dict(baseline) not in combinations:
        raise ScenarioError(
            f"--baseline: {_name(baseline)} is not a combination of the axes; take one of their values each"
        )
    specs = [_with(raw, combination) for combination in combinations]
    rows = []
    for combination, spec in zip(combinations, specs, strict=True):
        for size in simulate(spec, advance).results["batch_sizes"]:
            row: dict[str, Any] = {
                **combination,
                "batch_size": size["batch_size"],
                "is_baseline": combination == baseline,
            }
            for metric, statistic in _METRICS.items():
                value = size[metric]
                row[metric] = value[statistic] if statistic and value is not None else value
            rows.append(row)
    _add_changes(rows)
    return sorted(rows, key=lambda row: (row["batch_size"], row["e2e_s"]))


def _with(raw: dict[str, Any], combination: Mapping[str, Any]) -> ScenarioSpec:
    own = copy.deepcopy(raw)
    for target, value in combination.items():
        apply_override(own, target, value)
    return check_scenario(own)


def _add_changes(rows: Sequence[dict[str, Any]]) -> None:
    base = {row["batch_size"]: row for row in rows if row["is_baseline"]}
    for row in rows:
        for metric in _METRICS:
            value, reference = row[metric], base[row["batch_size"]][metric]
            row[f"{metric}_change_percent"] = None if value is None or not reference else 100 * (value / reference - 1)


def _name(combination: Mapping[str, Any]) -> str:
    return ",".join(f"{target}={value}" for target, value in combination.items())
