"""`simulate_events`: a `StepPlan` through the event engine or its SimPy twin, to a `StepResult` and `Execution`.

Also here: the account of each device's time by part, read off the executed graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    idle = {"sync": _idle_sync, "async": _idle_async, "two_batch": _idle_turns}[plan.mode]
    if plan.barriers == "own":
        idle = _idle_turns
    return collect_parts(plan, *idle(graph, start_s_N, end_s_N), end_s_N[graph.fronts_LR[-1]])


Idle = tuple[Floats, Floats, Floats, Floats]  # [L, R] each: dispatch, combine, host, waiting


def _idle_sync(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    at_LX1 = end_s_N[graph.barriers_LX][:, :, None]
    program_LXR = graph.program_LXR
    # What comes before the experts: the barrier, or shared experts that run while the dispatch travels.
    free_LR = np.maximum(at_LX1[:, 0], end_s_N[program_LXR[:, -2]])
    dispatch_LR = start_s_N[program_LXR[:, -1]] - free_LR
    combine_LR = np.broadcast_to(at_LX1[:, 3] - at_LX1[:, 2], dispatch_LR.shape)
    host_LR = start_s_N[graph.fronts_LR[1:]] - at_LX1[:, 3]
    waiting_LR = (at_LX1[:, 0] - end_s_N[program_LXR[:, 0]]) + (at_LX1[:, 2] - end_s_N[program_LXR[:, -1]])
    return dispatch_LR, combine_LR, host_LR, waiting_LR


def _idle_async(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    local_end_LR = end_s_N[graph.program_LXR[:, -1]]
    remote = np.flatnonzero(graph.work_N == Work.REMOTE_EXPERTS)
    where = (graph.layer_N[remote], graph.source_N[remote])
    last_LR = local_end_LR.copy()
    np.maximum.at(last_LR, where, end_s_N[remote])
    computed_LR = np.zeros_like(local_end_LR)
    np.add.at(computed_LR, where, graph.duration_s_N[remote])
    back_LR = _with_results(last_LR, graph, end_s_N, np.ones(len(end_s_N), dtype=bool))
    host_LR = start_s_N[graph.fronts_LR[1:]] - back_LR
    return last_LR - local_end_LR - computed_LR, back_LR - last_LR, host_LR, np.zeros_like(back_LR)


def _idle_turns(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    """What a device waits for between two of its tasks is what the second needs: tokens, results, or its host."""
    start_LXR, end_LXR = start_s_N[graph.program_LXR], end_s_N[graph.program_LXR]
    gap_LXR = start_LXR[:, 1:] - end_LXR[:, :-1]
    first_experts = gap_LXR.shape[1] - 1 - int(graph.batch_N.max())  # of one micro-batch or two
    dispatch_LR = gap_LXR[:, first_experts:].sum(axis=1)
    is_needed_N = (graph.batch_N == 0) | (graph.layer_N == len(start_LXR) - 1)  # the head needs both
    back_LR = _with_results(end_LXR[:, -1], graph, end_s_N, is_needed_N)
    combine_LR = gap_LXR[:, :first_experts].sum(axis=1) + (back_LR - end_LXR[:, -1])
    host_LR = start_s_N[graph.fronts_LR[1:]] - back_LR
    return dispatch_LR, combine_LR, host_LR, np.zeros_like(back_LR)


def _with_results(free_LR: Floats, graph: TaskGraph, end_s_N: Floats, is_needed_N: npt.NDArray[np.bool_]) -> Floats:
    """Return when a home, free at free_LR, also has the results of a layer that it needs."""
    returned = np.flatnonzero((graph.work_N == Work.COMBINE) & is_needed_N)
    back_LR = free_LR.copy()
    np.maximum.at(back_LR, (graph.layer_N[returned], graph.destination_N[returned]), end_s_N[returned])
    return back_LR


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
