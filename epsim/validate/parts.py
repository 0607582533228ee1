"""Where predicted TTFT and TPOT go, by batch size, as figure S1 of SMoES has it: `parts_report`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from epsim.calibrate.measured import MeasuredRow
from epsim.metrics import StepRecord
from epsim.run import Outcome, simulate
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.scenario.fields import ClusterField
from epsim.validate.latency import Case

KV_WAIT = "KV wait"


def parts_report(case: Case, values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return, for each published row, the parts of TTFT and TPOT on the device where the tokens are at home, s.

    values: SI, by fitted field. The parts of a row add up to the predicted TTFT and TPOT; what
    decode waits for KV caches is a part of TPOT.
    """
    found = []
    for settings in dict.fromkeys(row.settings for row in case.rows):
        rows = [row for row in case.rows if row.settings == settings]
        outcome = simulate(_spec(case, values, settings, [row.batch_size for row in rows]))
        found += [_row(outcome, size, row) for row, size in zip(rows, outcome.results["batch_sizes"], strict=True)]
    return found


def _spec(
    case: Case, values: Mapping[str, float], settings: Sequence[tuple[str, Any]], batch_sizes: Sequence[int]
) -> ScenarioSpec:
    raw = copy.deepcopy(case.raw)
    written = {field: ClusterField(path=field).format(value) for field, value in values.items()}
    for path, value in (*settings, *written.items(), ("workload.batch_sizes", list(batch_sizes))):
        apply_override(raw, path, value)
    return check_scenario(raw)


def _row(outcome: Outcome, size: Mapping[str, Any], row: MeasuredRow) -> dict[str, Any]:
    steps, homes = outcome.steps[row.batch_size], outcome.results["homes"]
    parts = {
        phase: _mean_parts([step for step in steps if step.phase == phase], outcome.device_names.index(homes[phase][0]))
        for phase in ("prefill", "decode")
    }
    parts["decode"][KV_WAIT] = size["tpot_s"]["mean"] - size["decode"]["step_s"]
    return {
        "benchmark": row.get("trace.benchmark"),
        "method": row.get("trace.method"),
        "batch_size": row.batch_size,
        "ttft_parts_s": parts["prefill"],
        "tpot_parts_s": parts["decode"],
        "published_ttft_s": row.ttft_s,
        "published_tpot_s": row.tpot_s,
    }


def _mean_parts(steps: Sequence[StepRecord], device: int) -> dict[str, float]:
    return {name: float(np.mean([step.parts_s[name][device] for step in steps])) for name in steps[0].parts_s}
