"""What each device waits for while it computes nothing, read off an executed graph: `idle_of`.

Letters: N tasks, G gaps between tasks of a device, L MoE layers, X tasks of a layer's program, R devices.
"""

import numpy as np
import numpy.typing as npt

from epsim.sim.step import Floats, StepPlan
from epsim.sim.task_graph import Kind, TaskGraph, Work

Idle = tuple[
    Floats, Floats, Floats, Floats
]  # [L, R] each (or summed over layers, [1, R]): dispatch, combine, host, waiting


def idle_of(plan: StepPlan, graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    """Return the idle seconds by what they are for, without what comes after a device's head."""
    if np.isin(graph.work_N, (Work.SEND_OUT, Work.SEND_BACK)).any():
        return idle_by_gaps(plan, graph, start_s_N, end_s_N)
    if plan.mode == "async":
        return idle_async(graph, start_s_N, end_s_N)
    if plan.mode == "sync" and plan.barriers == "all":
        return idle_sync(graph, start_s_N, end_s_N)
    return idle_turns(graph, start_s_N, end_s_N)


def idle_sync(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    at_LX1 = end_s_N[graph.barriers_LX][:, :, None]
    program_LXR = graph.program_LXR
    # What comes before the experts: the barrier, or shared experts that run while the dispatch travels.
    free_LR = np.maximum(at_LX1[:, 0], end_s_N[program_LXR[:, -2]])
    dispatch_LR = start_s_N[program_LXR[:, -1]] - free_LR
    combine_LR = np.broadcast_to(at_LX1[:, 3] - at_LX1[:, 2], dispatch_LR.shape)
    host_LR = start_s_N[graph.fronts_LR[1:]] - at_LX1[:, 3]
    waiting_LR = (at_LX1[:, 0] - end_s_N[program_LXR[:, 0]]) + (at_LX1[:, 2] - end_s_N[program_LXR[:, -1]])
    return dispatch_LR, combine_LR, host_LR, waiting_LR


def idle_async(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
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


def idle_turns(graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
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


def idle_by_gaps(plan: StepPlan, graph: TaskGraph, start_s_N: Floats, end_s_N: Floats) -> Idle:
    """The account for any mode and any tasks: a gap is for what the task behind it needs.

    Before a front or the head, and before results are sent: results, then the host. Before all else: tokens. In mode
    sync with barriers for all, what comes before the barrier in front of an exchange is waiting for slower devices.
    """
    num_layers, num_devices = plan.num_layers, plan.num_devices
    after_head_N = (graph.work_N == Work.SEND_OUT) & (graph.layer_N == num_layers)  # a KV cache that leaves at the end
    task_G = np.flatnonzero((graph.kind_N == Kind.COMPUTE) & (graph.source_N < num_devices) & ~after_head_N)
    task_G = task_G[np.lexsort((task_G, end_s_N[task_G], start_s_N[task_G], graph.source_N[task_G]))]
    device_G, work_G = graph.source_N[task_G], graph.work_N[task_G]
    until_s_G = start_s_N[task_G]
    since_s_G = np.where(np.diff(device_G, prepend=-1) == 0, np.roll(end_s_N[task_G], 1), 0.0)
    is_start_G = np.isin(work_G, (Work.FRONT, Work.HEAD))
    layer_G = np.maximum(graph.layer_N[task_G] - is_start_G, 0)  # of the results that a front needs
    for_results_G = is_start_G | (work_G == Work.SEND_BACK)
    back_LR = np.full((num_layers, num_devices), -np.inf)
    if len(graph.barriers_LX):
        at_LX = end_s_N[graph.barriers_LX]
        barrier_s_G = np.where(for_results_G, at_LX[layer_G, 2], at_LX[layer_G, 0])
        back_LR[:] = at_LX[:, 3:]
    else:
        barrier_s_G = np.full(len(task_G), -np.inf)
        back_LR = _with_results(back_LR, graph, end_s_N, (graph.batch_N == 0) | (graph.layer_N == num_layers - 1))
    waited_s_G = np.clip(barrier_s_G, since_s_G, until_s_G)
    needs_host_G = is_start_G & (graph.batch_N[task_G] == 0)
    back_s_G = np.where(needs_host_G, np.clip(back_LR[layer_G, device_G], waited_s_G, until_s_G), until_s_G)

    def by_device(seconds_G: Floats) -> Floats:
        return np.bincount(device_G, weights=seconds_G, minlength=num_devices).astype(np.float64)[None]

    moving_s_G = back_s_G - waited_s_G
    return (
        by_device(moving_s_G * ~for_results_G),
        by_device(moving_s_G * for_results_G),
        by_device(until_s_G - back_s_G),
        by_device(waited_s_G - since_s_G),
    )
