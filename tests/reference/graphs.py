"""Task graphs written by hand: `released_messages`, messages that devices send at given times."""

import numpy as np

from epsim.sim.task_graph import Kind, TaskGraph, Work


def released_messages(
    gaps_s: list[float], ends: list[tuple[int, int]], num_bytes: list[float], flows: list[int]
) -> TaskGraph:
    """Return the graph of M messages: number m goes from ends[m][0] to ends[m][1] on flow flows[m].

    gaps_s: seconds between a message's release and the one before it from the same device (or the start).
    Tasks 0 to M - 1 are the compute tasks that let the time pass, M to 2 M - 1 the messages.
    """
    count = len(gaps_s)
    last_of: dict[int, int] = {}
    successors: list[list[int]] = [[count + m] for m in range(count)]
    num_predecessors = np.append(np.zeros(count, np.int64), np.ones(count, np.int64))
    for m, (source, _) in enumerate(ends):
        if source in last_of:
            successors[last_of[source]].append(m)
            num_predecessors[m] = 1
        last_of[source] = m
    zeros = [0] * count
    source_N = np.array([source for source, _ in ends] * 2, np.int64)
    return TaskGraph(
        kind_N=np.repeat([int(Kind.COMPUTE), int(Kind.MESSAGE)], count),
        work_N=np.repeat([int(Work.FRONT), int(Work.DISPATCH)], count),
        layer_N=np.zeros(2 * count, np.int64),
        source_N=source_N,
        destination_N=np.append(source_N[:count], [destination for _, destination in ends]).astype(np.int64),
        origin_N=source_N,
        batch_N=np.zeros(2 * count, np.int64),
        duration_s_N=np.array([*gaps_s, *zeros], np.float64),
        bytes_N=np.array([*zeros, *num_bytes], np.float64),
        flow_N=np.array([*zeros, *flows], np.int64),
        successor_start_N=np.append(
            np.cumsum([0] + [len(row) for row in successors]), [sum(map(len, successors))] * count
        ),
        successors_E=np.array([task for row in successors for task in row], np.int64),
        num_predecessors_N=num_predecessors,
        num_flows=max(flows) + 1,
        fronts_LR=np.zeros((0, 0), np.int64),
        program_LXR=np.zeros((0, 2, 0), np.int64),
        barriers_LX=np.zeros((0, 4), np.int64),
    )
