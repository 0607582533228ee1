"""The engine with next to nothing to do, as a micro-benchmark of itself: `dry_spec`, and `receive_overhead_s` from it.

One token on every rank, every part a pause of fixed length: what a step takes beyond its pauses, posted sends,
latencies and barrier is what receiving costs in place: posting receives, waking up, looking after messages, and the
wait for the slower of ranks whose times vary.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from epsim.batch import step_plans
from epsim.cluster import Cluster, build_cluster
from epsim.run import assemble
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.sim import StepPlan, simulate_step
from epsim.sim.step import Mode

_PAUSE_PER_RANK_S = 0.001  # of every part: more ranks than cores need time for their messages, as they have in runs
NUM_STEPS = 12
MODES: tuple[Mode, ...] = ("sync", "async", "two_batch")
_TRIAL_S = 200e-6


def dry_spec(spec: ScenarioSpec, mode: Mode) -> ScenarioSpec:
    """Return the scenario that is run dry: a request of one token for each rank, on the scenario's network."""
    raw = spec.model_dump(mode="json", by_alias=True)
    num_ranks = build_cluster(spec.cluster.model_dump()).num_devices
    for path, value in {
        "trace": {"kind": "uniform", "vision_tokens": 0, "text_tokens": 2, "output_tokens": NUM_STEPS + 1},
        "parallelism": {"kind": "ep"},
        "placement": {"policy": "contiguous"},
        "homes": {"policy": "balanced"},
        "transmission": {"mode": mode, "dedup": "device"},
        "workload": {"batch_sizes": [num_ranks]},
        "simulation": {"fidelity": "event"},
    }.items():
        apply_override(raw, path, value, origin="dry run")
    return check_scenario(raw)


def pause_s(num_ranks: int) -> float:
    """Return how long every part of a dry run is."""
    return _PAUSE_PER_RANK_S * num_ranks


def simulated_step_s(spec: ScenarioSpec) -> float:
    """Return the mean of the decode steps of a dry scenario that has the terms of a profile."""
    deployment = assemble(spec)
    ids = deployment.trace.requests.request_id_Q[: spec.workload.batch_sizes[0]]
    _, *decode = step_plans(deployment, ids, None)
    return float(np.mean([_end_s(paced(plan), deployment.cluster) for plan in decode]))


def _end_s(plan: StepPlan, cluster: Cluster) -> float:
    return simulate_step(plan, cluster, "event")[0].end_s


def paced(plan: StepPlan) -> StepPlan:
    """Return the plan with every part a pause: front, experts (each kernel), head."""
    nothing_LR = np.zeros_like(plan.attention_s_LR)
    seconds = pause_s(plan.num_devices)
    pause_LR = np.full_like(nothing_LR, seconds)
    return replace(
        plan,
        vision_s_R=np.zeros_like(plan.vision_s_R),
        attention_s_LR=pause_LR,
        dense_ffn_s_LR=nothing_LR,
        router_s_LR=nothing_LR,
        shared_s_LR=nothing_LR,
        host_s_LR=nothing_LR,
        experts_s_LR=pause_LR,
        local_s_LR=pause_LR,
        remote_s_LCRR=np.where(plan.dispatch_bytes_LCRR > 0, seconds, 0.0),
        pack_s_LR=nothing_LR,
        reduce_s_LR=nothing_LR,
        serve_s_LCRR=None,
        head_s_R=np.full_like(plan.head_s_R, seconds),
        second=None if plan.second is None else paced(plan.second),
    )


def receive_overhead_s(measured_step_s: float, with_receive: Callable[[float], ScenarioSpec]) -> float:
    """Return the overhead per received message with which the simulated step takes as long as the measured one.

    with_receive: the dry scenario with all other terms of the profile, for an overhead in s.
    """
    base_s, more_s = (simulated_step_s(with_receive(seconds)) for seconds in (0.0, _TRIAL_S))
    slope = (more_s - base_s) / _TRIAL_S
    return max(0.0, (measured_step_s - base_s) / slope) if slope > 0 else 0.0
