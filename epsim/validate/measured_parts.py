"""Where an error comes from: time in experts as measured over that of the device's profile, `experts_ratio`.

Letters: R ranks, P measured parts (`parts` of a launch).
"""

from typing import Any

import numpy as np

from epsim.batch import step_plans
from epsim.measured.folder import MeasuredRuns
from epsim.run import assemble
from epsim.scenario import ScenarioSpec
from epsim.sim import StepPlan


def experts_ratio(runs: MeasuredRuns, number: int, predicted: ScenarioSpec) -> dict[str, float | None]:
    """Return measured over predicted seconds of routed and shared experts, all ranks together: prefill, decode step.

    predicted: the cell's scenario with everything that the micro-benchmarks say. None where nothing is decoded.
    """
    plans = _plans(predicted)
    measured = [launch["cells"][str(number)] for launch in runs.launches]
    found: dict[str, float | None] = {}
    for phase, own in (("prefill", plans[:1]), ("decode", plans[1:])):
        key = f"{phase}_parts_s_RP"
        seconds = [_experts_s(cell, key) for cell in measured if cell[key] is not None]
        planned = float(np.mean([_planned_s(plan) for plan in own])) if own else 0.0
        found[phase] = float(np.mean(seconds)) / planned if seconds and planned else None
    return found


def _plans(spec: ScenarioSpec) -> list[StepPlan]:
    deployment, workload = assemble(spec), spec.workload
    ids = deployment.trace.requests.request_id_Q[: workload.batch_sizes[0]]
    return list(step_plans(deployment, ids, workload.max_output_tokens))


def _experts_s(cell: dict[str, Any], key: str) -> float:
    parts_s_RP = np.array(cell[key])
    columns = [cell["parts"].index(part) for part in ("experts", "remote", "shared")]
    return float(parts_s_RP[:, columns].sum())


def _planned_s(plan: StepPlan) -> float:
    total_s = 0.0
    for batch in plan.batches:
        own_s = (
            batch.local_s_LR.sum() + batch.remote_s_LCRR.sum() if batch.mode == "async" else batch.experts_s_LR.sum()
        )
        total_s += float(own_s + batch.shared_s_LR.sum() + batch.served_s_LCRR.sum())
    return total_s
