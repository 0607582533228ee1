"""`simulate_events`: a `StepPlan` through the event engine or its SimPy twin, to a `StepResult` and `Execution`.

Also here: the account of each device's time by part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epsim.cluster import Cluster
from epsim.sim import event
from epsim.sim.graph import build_graph
from epsim.sim.idle import idle_of
from epsim.sim.step import COMPUTE_PARTS, PARTS, Floats, StepPlan, StepResult
from epsim.sim.task_graph import Kind, TaskGraph, Work

Runner = Callable[[TaskGraph, Cluster], event.Run]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A step as it went."""

    plan: StepPlan
    graph: TaskGraph
    run: event.Run


def simulate_events(
    plan: StepPlan, cluster: Cluster, run_graph: Runner = event.run_graph
) -> tuple[StepResult, Execution]:
    """Execute one step and account for it."""
    graph = build_graph(plan)
    run = run_graph(graph, cluster)
    is_kv = graph.work_N == Work.KV
    result = StepResult(
        end_s=float(run.end_s_N[graph.fronts_LR[-1]].max()),
        kv_end_s=float(run.end_s_N[is_kv].max(initial=0.0)),
        parts_s_PR=_parts(plan, graph, run.start_s_N, run.end_s_N),
        link_busy_s_X=run.busy_s_X,
        link_bytes_X=run.carried_bytes_X,
        delivered_bytes_RR=_delivered(graph, run.end_s_N, cluster.num_devices),
        contended=run.contended,
    )
    return result, Execution(plan=plan, graph=graph, run=run)


def _delivered(graph: TaskGraph, end_s_N: Floats, num_devices: int) -> Floats:
    arrived = (graph.kind_N == Kind.MESSAGE) & np.isfinite(end_s_N)
    delivered_RR = np.zeros((num_devices, num_devices))
    np.add.at(delivered_RR, (graph.source_N[arrived], graph.destination_N[arrived]), graph.bytes_N[arrived])
    return delivered_RR


def _parts(plan: StepPlan, graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Floats:
    """Return seconds by part and device, [len(PARTS), R]: what is computed, and what each idle time is for."""
    return collect_parts(plan, *idle_of(plan, graph, start_s_N, end_s_N), end_s_N[graph.fronts_LR[-1]])


def collect_parts(
    plan: StepPlan, dispatch_LR: Floats, combine_LR: Floats, host_LR: Floats, waiting_LR: Floats, device_end_s_R: Floats
) -> Floats:
    """Return the parts [len(PARTS), R] from idle times by layer; what follows a device's end is waiting too."""
    parts_s_PR = np.zeros((len(PARTS), plan.num_devices))
    parts_s_PR[: len(COMPUTE_PARTS)] = plan.compute_s_PR()
    parts_s_PR[PARTS.index("dispatch")] = dispatch_LR.sum(axis=0)
    parts_s_PR[PARTS.index("combine")] = combine_LR.sum(axis=0)
    parts_s_PR[PARTS.index("host")] = host_LR.sum(axis=0) + (0.0 if plan.step_s_R is None else plan.step_s_R)
    parts_s_PR[PARTS.index("waiting")] = waiting_LR.sum(axis=0) + device_end_s_R.max() - device_end_s_R
    return parts_s_PR
