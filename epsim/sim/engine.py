"""`simulate_events`: a `StepPlan` through the event engine or its SimPy twin, to a `StepResult` and `Execution`.

Also here: the account of each device's time by part, read off the executed graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epsim.cluster import Cluster
from epsim.sim import event
from epsim.sim.graph import build_graph
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
    front_start, front_end = start_s_N[graph.fronts_LR], end_s_N[graph.fronts_LR]
    local_end_LR = end_s_N[graph.local_LR]
    if len(graph.barriers_LX):
        at_LX1 = end_s_N[graph.barriers_LX][:, :, None]
        dispatch_LR = np.broadcast_to(at_LX1[:, 1] - at_LX1[:, 0], local_end_LR.shape)
        combine_LR = np.broadcast_to(at_LX1[:, 3] - at_LX1[:, 2], local_end_LR.shape)
        host_LR = front_start[1:] - at_LX1[:, 3]
        waiting_LR = (at_LX1[:, 0] - front_end[:-1]) + (at_LX1[:, 2] - local_end_LR)
    else:
        remote = np.flatnonzero(graph.work_N == Work.REMOTE_EXPERTS)
        where = (graph.layer_N[remote], graph.source_N[remote])
        last_LR = local_end_LR.copy()
        np.maximum.at(last_LR, where, end_s_N[remote])
        computed_LR = np.zeros_like(local_end_LR)
        np.add.at(computed_LR, where, graph.duration_s_N[remote])
        dispatch_LR = last_LR - local_end_LR - computed_LR
        back_LR = last_LR.copy()
        returned = np.flatnonzero(graph.work_N == Work.COMBINE)
        np.maximum.at(back_LR, (graph.layer_N[returned], graph.destination_N[returned]), end_s_N[returned])
        combine_LR = back_LR - last_LR
        host_LR = front_start[1:] - back_LR
        waiting_LR = np.zeros_like(local_end_LR)
    return collect_parts(plan, dispatch_LR, combine_LR, host_LR, waiting_LR, front_end[-1])


def collect_parts(
    plan: StepPlan, dispatch_LR: Floats, combine_LR: Floats, host_LR: Floats, waiting_LR: Floats, device_end_s_R: Floats
) -> Floats:
    """Return the parts [len(PARTS), R] from idle times by layer; what follows a device's end is waiting too."""
    parts_s_PR = np.zeros((len(PARTS), plan.num_devices))
    parts_s_PR[: len(COMPUTE_PARTS)] = plan.compute_s_PR()
    parts_s_PR[PARTS.index("dispatch")] = dispatch_LR.sum(axis=0)
    parts_s_PR[PARTS.index("combine")] = combine_LR.sum(axis=0)
    parts_s_PR[PARTS.index("host")] = host_LR.sum(axis=0)
    parts_s_PR[PARTS.index("waiting")] = waiting_LR.sum(axis=0) + device_end_s_R.max() - device_end_s_R
    return parts_s_PR
