"""The event engine: executes a `TaskGraph` on devices and links, event by event, in compiled code (`run_graph`).

Rules. A device computes one task at a time, those waiting in the order in which their message arrived (then by id).
A message is cut into equal segments of at most the cluster's segment size. At the first link of its route the flows
take turns, a segment each; at later links segments are served as they come. A link is held for a segment's
bytes / bandwidth (plus the message overhead for the first segment of a message), and the segment is at the next link,
or has arrived, a latency later. `epsim.sim.simpy_engine` says the same with SimPy, to be read and to test this one.
"""

import heapq
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.sim.graph import Kind, TaskGraph

Floats = npt.NDArray[np.float64]

_COMPUTE = int(Kind.COMPUTE)
_MESSAGE = int(Kind.MESSAGE)
_COMPUTE_DONE, _LINK_FREE, _SEGMENT_ARRIVES = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of a graph's tasks N on the links X; times in s.

    start_s_N, end_s_N: a message starts with its first segment and ends when its last has arrived. sent_s_N: its last
    segment has left the first link. incoming_s_N: its first segment begins to come in from the last link (both NaN for
    other tasks). busy_s_X, carried_bytes_X: how long each link was held and for how many bytes. contended: some flow
    had to wait for another.
    """

    start_s_N: Floats
    end_s_N: Floats
    sent_s_N: Floats
    incoming_s_N: Floats
    busy_s_X: Floats
    carried_bytes_X: Floats
    contended: bool


def run_graph(graph: TaskGraph, cluster: Cluster) -> Run:
    """Execute the graph; a RuntimeError says that it has a cycle."""
    num_segments_N = np.maximum(1, np.ceil(graph.bytes_N / cluster.segment_bytes)).astype(np.int64)
    start, end, sent, incoming, busy, carried, contended = _execute(
        graph.kind_N,
        graph.source_N,
        graph.destination_N,
        graph.duration_s_N,
        graph.bytes_N,
        num_segments_N,
        graph.flow_N,
        graph.num_flows,
        graph.successor_start_N,
        graph.successors_E,
        graph.num_predecessors_N.copy(),
        cluster.routes_RRH,
        cluster.link_bytes_per_s_X,
        cluster.link_latency_s_X,
        cluster.link_message_overhead_s_X,
    )
    if np.isnan(end).any():
        raise RuntimeError(f"{int(np.isnan(end).sum())} tasks of the step never finished: its graph has a cycle")
    return Run(
        start_s_N=start,
        end_s_N=end,
        sent_s_N=sent,
        incoming_s_N=incoming,
        busy_s_X=busy,
        carried_bytes_X=carried,
        contended=bool(contended),
    )


@numba.njit(cache=True)
def _execute(  # type: ignore[no-untyped-def]
    kind, source, destination, duration_s, num_bytes, num_segments, flow, num_flows,
    successor_start, successors, num_predecessors, routes_RRH, rate_X, latency_X, overhead_X,
):  # fmt: skip
    num_tasks, num_devices, num_links, max_hops = (
        len(kind),
        routes_RRH.shape[0],
        len(rate_X),
        routes_RRH.shape[2],
    )
    start, end = np.full(num_tasks, np.nan), np.full(num_tasks, np.nan)
    sent, incoming = np.full(num_tasks, np.nan), np.full(num_tasks, np.nan)
    busy_s, carried = np.zeros(num_links), np.zeros(num_links)
    contended = False

    events = [(0.0, 0, 0, 0, 0)]  # time, sequence, what, task or link, hop
    events.pop()
    sequence = 0
    stack = [0]  # tasks that completed at this instant and whose successors are still to be told
    stack.pop()

    # Devices: a queue sorted by (arrival of the message that enabled the task, id), as a linked list over tasks.
    arrival = np.zeros(num_tasks)
    device_head, device_busy = np.full(num_devices, -1), np.zeros(num_devices, np.bool_)
    next_task = np.full(num_tasks, -1)
    idle_devices = [0]
    idle_devices.pop()

    # Links: a queue of entries, each a flow (hop 0) or a segment of a message (hop > 0).
    link_head, link_tail = np.full(num_links, -1), np.full(num_links, -1)
    link_entry, link_flow = np.full(num_links, -1), np.full(num_links, -1)
    capacity = 1024
    entry_next, entry_task, entry_hop = (
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
    )
    entry_since = np.empty(capacity)
    free_entry, used_entries = -1, 0

    # Flows: a queue of messages; messages: segments sent at hop 0, and segments that reached each later hop.
    flow_head, flow_tail = np.full(num_flows, -1), np.full(num_flows, -1)
    flow_active = np.zeros(num_flows, np.bool_)
    next_message = np.full(num_tasks, -1)
    reached = np.zeros((num_tasks, max_hops + 1), np.int32)

    for task in range(num_tasks):
        if num_predecessors[task] == 0:
            start[task] = 0.0
            # A task without predecessors is ready at once; reuse the ready path below through a marker on the stack.
            stack.append(-task - 1)

    now = 0.0
    while True:
        # 1. Tell successors of completed tasks; what is ready queues for its device or link, or completes (barrier).
        while len(stack) > 0:
            item = stack.pop()
            if item < 0:
                first, last, completed = -item - 1, -item, -1
            else:
                first, last, completed = successor_start[item], successor_start[item + 1], item
                end[item] = now
            for s in range(first, last):
                task = s if completed < 0 else successors[s]
                if completed >= 0:
                    num_predecessors[task] -= 1
                    if kind[completed] == _MESSAGE:
                        arrival[task] = max(arrival[task], now)
                if num_predecessors[task] > 0:
                    continue
                if kind[task] == _COMPUTE:
                    device = source[task]
                    previous, following = -1, device_head[device]
                    while following >= 0 and (
                        arrival[following] < arrival[task] or (arrival[following] == arrival[task] and following < task)
                    ):
                        previous, following = following, next_task[following]
                    next_task[task] = following
                    if previous < 0:
                        device_head[device] = task
                    else:
                        next_task[previous] = task
                    idle_devices.append(device)
                elif kind[task] == _MESSAGE:
                    f = flow[task]
                    next_message[task] = -1
                    if flow_head[f] < 0:
                        flow_head[f] = task
                    else:
                        next_message[flow_tail[f]] = task
                    flow_tail[f] = task
                    if not flow_active[f]:
                        flow_active[f] = True
                        heapq.heappush(events, (now, sequence, _SEGMENT_ARRIVES, task, 0))
                        sequence += 1
                else:
                    start[task] = now
                    stack.append(task)
        # 2. Only when this instant has no more events do idle devices choose, so that ties follow the queue's order.
        if len(events) == 0 or events[0][0] > now:
            for device in idle_devices:
                task = device_head[device]
                if device_busy[device] or task < 0:
                    continue
                device_head[device] = next_task[task]
                device_busy[device] = True
                start[task] = now
                heapq.heappush(events, (now + duration_s[task], sequence, _COMPUTE_DONE, task, 0))
                sequence += 1
            idle_devices.clear()
            if len(events) == 0:
                break
        now, _, what, subject, hop = heapq.heappop(events)
        if what == _COMPUTE_DONE:
            device_busy[source[subject]] = False
            idle_devices.append(source[subject])
            stack.append(subject)
            continue
        # 3. A link changes: a segment (or a flow, at hop 0) comes to it, or it has become free.
        if what == _SEGMENT_ARRIVES:
            link = routes_RRH[source[subject], destination[subject], hop] if hop < max_hops else -1
            if link < 0:
                reached[subject, max_hops] += 1
                if reached[subject, max_hops] == num_segments[subject]:
                    stack.append(subject)
                continue
            entry_id = free_entry
            if entry_id >= 0:
                free_entry = entry_next[entry_id]
            else:
                if used_entries == capacity:
                    capacity *= 2
                    entry_next = np.append(entry_next, np.empty_like(entry_next))
                    entry_task = np.append(entry_task, np.empty_like(entry_task))
                    entry_hop = np.append(entry_hop, np.empty_like(entry_hop))
                    entry_since = np.append(entry_since, np.empty_like(entry_since))
                entry_id = used_entries
                used_entries += 1
            entry_task[entry_id], entry_hop[entry_id], entry_since[entry_id] = subject, hop, now
            entry_next[entry_id] = -1
            if link_head[link] < 0:
                link_head[link] = entry_id
            else:
                entry_next[link_tail[link]] = entry_id
            link_tail[link] = entry_id
        else:
            link = subject
            served = link_entry[link]
            link_entry[link] = -1
            f = flow[entry_task[served]]
            if entry_hop[served] == 0 and flow_head[f] >= 0:  # the flow has more: to the end of the line
                entry_task[served], entry_since[served], entry_next[served] = flow_head[f], now, -1
                if link_head[link] < 0:
                    link_head[link] = served
                else:
                    entry_next[link_tail[link]] = served
                link_tail[link] = served
            else:
                if entry_hop[served] == 0:
                    flow_active[f] = False
                entry_next[served] = free_entry
                free_entry = served
        if link_entry[link] >= 0 or link_head[link] < 0:
            continue
        # 4. The link serves the entry at its head.
        entry_id = link_head[link]
        link_head[link] = entry_next[entry_id]
        link_entry[link] = entry_id
        task, hop = entry_task[entry_id], entry_hop[entry_id]
        f = flow[task]
        if link_flow[link] != f and entry_since[entry_id] < now:
            contended = True
        link_flow[link] = f
        segment_bytes = num_bytes[task] / num_segments[task]
        held_s = segment_bytes / rate_X[link]
        if reached[task, hop] == 0:
            held_s += overhead_X[link]
            if hop == 0:
                start[task] = now
            if hop + 1 == max_hops or routes_RRH[source[task], destination[task], hop + 1] < 0:
                incoming[task] = now + latency_X[link]
        reached[task, hop] += 1
        if hop == 0 and reached[task, 0] == num_segments[task]:
            flow_head[f] = next_message[task]
            sent[task] = now + held_s
        busy_s[link] += held_s
        carried[link] += segment_bytes
        heapq.heappush(events, (now + held_s, sequence, _LINK_FREE, link, 0))
        heapq.heappush(events, (now + held_s + latency_X[link], sequence + 1, _SEGMENT_ARRIVES, task, hop + 1))
        sequence += 2
    return start, end, sent, incoming, busy_s, carried, contended
