"""The tables of docs/placement.md, each a function of comparisons by the name of their trace.

The values are those of `epsim.lab.experiment.compare_policies`.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from epsim.report.placement import UNDECIDED, signed
from epsim.report.table import number
from epsim.units import format_size, format_time
from epsim.validate.markdown import table

Found = Mapping[str, Any]
Columns = Mapping[str, Found]
Read = Callable[[Found], Any]


def change_table(columns: Columns, read: Read, write: Callable[[float], str]) -> str:
    """Return a row per policy and a column per trace: the baseline's value, and the others' changes against it, %.

    read: a value of a policy, with its interval. write: a baseline's mean as text.
    """
    baseline = next(iter(columns.values()))["baseline"]
    rows = []
    for label in [baseline, *(label for label in _labels(columns) if label != baseline)]:
        cells = [f"`{label}`"]
        for found in columns.values():
            policy = _policy(found, label)
            value = None if policy is None else read(policy)
            if value is None:
                cells.append("-")
            else:
                cells.append(write(value["mean"]) if label == found["baseline"] else _change(value))
        rows.append(cells)
    return table(("policy", *columns), rows)


def _change(value: Found) -> str:
    found = value.get("change_percent")
    if found is None:
        return "-"
    if found["low"] is None:
        return signed(found["mean"], 1)
    mark = UNDECIDED if found["contains_zero"] else ""
    return f"{signed(found['mean'], 1)} [{signed(found['low'], 1)}, {signed(found['high'], 1)}]{mark}"


def cost_table(columns: Columns) -> str:
    """Return the transfer objective in sample and held out, and the gap to its bound on the first split."""
    rows = []
    for label in _labels(columns):
        cells = [f"`{label}`"]
        for part in ("fit", "held_out"):
            cells.append(number(_mean(columns, label, f"objective_{part}"), 3))
            cells.append(_percent(_bound(columns, label, f"objective_gap_{part}")))
        cells += [_percent(_bound(columns, label, f"max_load_gap_{part}")) for part in ("fit", "held_out")]
        rows.append(cells)
    heads = ["fitted to: cost", "gap to the bound, %", "held out: cost", "gap to the bound, %"]
    loads = ["largest load, fitted to: gap to its bound, %", "held out, %"]
    return table(("policy", *heads, *loads), rows)


def sizes_table(columns: Columns) -> str:
    """Return balancedness of held-out pairs, most replicas' memory and median time to place, means over traces."""
    rows = []
    for label in _labels(columns):
        forms = ("balancedness_ratio_of_sums", "balancedness_mean_of_ratios")
        replicas = _mean(columns, label, "replica_memory_bytes", "max")
        seconds = _mean(columns, label, "time_to_place_s", "median")
        cells = [number(_mean(columns, label, name), 3) for name in forms]
        cells.append(format_size(replicas) if replicas else "-")
        rows.append((f"`{label}`", *cells, "-" if seconds is None else format_time(seconds)))
    heads = ("sum of means / sum of maxima", "mean of ratios", "replicas, fullest device", "time to place, median")
    return table(("policy", *heads), rows)


def claims(columns: Columns) -> str:
    """Return which policy had the fewest remote bytes on each trace, and which were left out."""
    by_best: dict[str, list[str]] = {}
    for name, found in columns.items():
        best = min(found["policies"], key=lambda policy: policy["metrics"]["remote_bytes_per_token"]["mean"])
        value = best["metrics"]["remote_bytes_per_token"].get("change_percent")
        mark = UNDECIDED if value is None or value["contains_zero"] else ""
        by_best.setdefault(best["policy"], []).append(name + mark)
    lines = [
        "Fewest remote bytes: "
        + "; ".join(f"`{label}` on {', '.join(names)}" for label, names in by_best.items())
        + "."
    ]
    reasons = {entry["policy"]: entry["reason"] for found in columns.values() for entry in found["left_out"]}
    if reasons:
        lines.append("Left out: " + "; ".join(f"`{label}` ({why})" for label, why in reasons.items()) + ".")
    return " ".join(lines)


def _labels(columns: Columns) -> Sequence[str]:
    return list(dict.fromkeys(policy["policy"] for found in columns.values() for policy in found["policies"]))


def _policy(found: Found, label: str) -> Found | None:
    return next((policy for policy in found["policies"] if policy["policy"] == label), None)


def _mean(columns: Columns, label: str, name: str, of_splits: str = "mean") -> float | None:
    """Return the mean over traces of what splits gave: their mean, median or max."""
    values = [
        policy["metrics"][name][of_splits]
        for found in columns.values()
        if (policy := _policy(found, label)) is not None and policy["metrics"][name] is not None
    ]
    return fmean(values) if values else None


def _bound(columns: Columns, label: str, name: str) -> float | None:
    policies = (_policy(found, label) for found in columns.values())
    values = [policy["bounds"][name] for policy in policies if policy is not None]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, 1)
