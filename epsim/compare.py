"""A grid of scenarios beside a baseline: `parse_axes`, `compare`."""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from epsim.errors import ScenarioError
from epsim.run import check, model_and_cluster, simulate
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.scenario.yaml_text import parse_yaml

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
        listed = _values(f"[{values}]", f'--axis "{text}"')
        if any(value in listed[:i] for i, value in enumerate(listed)):
            raise ScenarioError(f'--axis "{text}": a value is there twice; write each once')
        axes[target.strip()] = listed
    return axes


def _values(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ScenarioError(f"{where}: not YAML ({error}); write values as in a file, quoted if need be") from error


def parse_baseline(text: str | None, axes: Axes) -> dict[str, Any]:
    """Return the value of each axis in the baseline, `path=value,path=value`; axes left out take their first value.

    >>> parse_baseline("a=2", {"a": [1, 2], "b": [3]})
    {'a': 2, 'b': 3}
    """
    baseline = {target: values[0] for target, values in axes.items()}
    for pair in re.split(r",(?=[^,=]+=)", text) if text is not None else ():  # a value may hold commas
        target, equals, value = pair.partition("=")
        if not equals or target.strip() not in axes:
            raise ScenarioError(f'--baseline "{pair}": not an axis; write path=value, path one of {", ".join(axes)}')
        where = f'--baseline "{pair}"'
        baseline[target.strip()] = chosen = _values(value, where)
        if chosen not in axes[target.strip()]:
            known = ", ".join(map(str, axes[target.strip()]))
            raise ScenarioError(f"{where}: not a value of this axis; write one of {known}")
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
    specs = [with_settings(raw, combination) for combination in combinations]
    for spec in specs:
        model_and_cluster(spec)  # quick, so that what it refuses is said before any trace is drawn
    if any(spec.workload.batch_sizes != specs[0].workload.batch_sizes for spec in specs):
        raise ScenarioError("--axis: the batch sizes differ; write them all with --set workload.batch_sizes=[...]")
    for spec in specs:
        check(spec)
    rows = []
    for combination, spec in zip(combinations, specs, strict=True):
        results = simulate(spec, advance).results
        for size in results["batch_sizes"]:
            row: dict[str, Any] = {
                **combination,
                "trace_origin": results["trace"]["kind"],
                "batch_size": size["batch_size"],
                "is_baseline": combination == baseline,
            }
            for metric, statistic in _METRICS.items():
                value = size[metric]
                row[metric] = value[statistic] if statistic and value is not None else value
            rows.append({**row, **_resources(size)})
    _add_changes(rows)
    return sorted(rows, key=lambda row: (row["batch_size"], row["e2e_s"]))


def _resources(size: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a batch size sends between devices, and what it takes of their memory."""
    accounts = size["memory_bytes"].values()
    return {
        "prefill_sent_bytes_per_step": size["prefill"]["sent_bytes_per_step"],
        "decode_sent_bytes_per_step": size["decode"]["sent_bytes_per_step"] if size["decode"] else None,
        "sent_bytes_per_output_token": size["sent_bytes_per_output_token"],
        "fullest_device_memory_bytes": max(accounts, key=lambda account: account["total"] - account["usable"])["total"],
        "all_devices_memory_bytes": sum(account["total"] for account in accounts),
    }


def with_settings(raw: dict[str, Any], combination: Mapping[str, Any]) -> ScenarioSpec:
    """Return the scenario with a value for each axis."""
    own = copy.deepcopy(raw)
    for target, value in combination.items():
        apply_override(own, target, value, origin="--axis")
    return check_scenario(own)


def _add_changes(rows: Sequence[dict[str, Any]]) -> None:
    base = {row["batch_size"]: row for row in rows if row["is_baseline"]}
    for row in rows:
        for metric in _METRICS:
            value, reference = row[metric], base[row["batch_size"]][metric]
            row[f"{metric}_change_percent"] = None if value is None or not reference else 100 * (value / reference - 1)
