"""The event engine: executes a `TaskGraph` on devices and links, event by event, in compiled code (`run_graph`).

Rules. A device computes one task at a time, those waiting in the order in which their message arrived (then by id).
A message is cut into equal segments of at most the cluster's segment size. At the first link of its route the flows
take turns, a segment each; at later links segments are served as they come. A link is held for a segment's
bytes / bandwidth (plus the message overhead for the first segment of a message), and the segment is at the next link,
or has arrived, a latency later. `epsim.sim.simpy_engine` says the same with SimPy, to be read and to test this one.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.sim.task_graph import Kind, TaskGraph

Floats = npt.NDArray[np.float64]

_COMPUTE = int(Kind.COMPUTE)
_MESSAGE = int(Kind.MESSAGE)
_COMPUTE_DONE, _LINK_FREE, _SEGMENT_ARRIVES = 0, 1, 2

# The state is a record per task, device, link, flow and entry of a link's queue; ids are indices, -1 is none.
_TASK = np.dtype(
    [(name, np.int64) for name in ("kind", "source", "destination", "flow", "num_segments")]
    + [(name, np.int64) for name in ("first_successor", "num_successors", "waiting_for", "next")]
    + [(name, np.float64) for name in ("duration_s", "num_bytes", "arrival_s")]
    + [(name, np.float64) for name in ("start_s", "end_s", "sent_s", "incoming_s")],
    align=True,
)
_DEVICE = np.dtype([("head", np.int64), ("busy", np.bool_)], align=True)
_LINK = np.dtype(
    [(name, np.int64) for name in ("head", "tail", "entry", "flow")]
    + [(name, np.float64) for name in ("bytes_per_s", "latency_s", "overhead_s", "busy_s", "carried_bytes")],
    align=True,
)
_FLOW = np.dtype([("head", np.int64), ("tail", np.int64), ("active", np.bool_)], align=True)
_ENTRY = np.dtype([("next", np.int64), ("task", np.int64), ("hop", np.int64), ("since_s", np.float64)], align=True)
_STATE = np.dtype([(name, np.int64) for name in ("sequence", "used_entries", "free_entry", "contended")], align=True)


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
    tasks, links = _task_records(graph, cluster), _link_records(cluster)
    devices = _records(_DEVICE, 2 * cluster.num_devices)  # and their hosts
    flows = _records(_FLOW, graph.num_flows)
    state = _records(_STATE, 1, sequence=0, used_entries=0, contended=0)
    # Segments that the link at each hop has taken and, in the last column, that have arrived.
    reached = np.zeros((len(tasks), cluster.routes_RRH.shape[2] + 1), dtype=np.int32)
    _execute(tasks, devices, links, flows, state, cluster.routes_RRH, graph.successors_E, reached)
    if np.isnan(tasks["end_s"]).any():
        unfinished = int(np.isnan(tasks["end_s"]).sum())
        raise RuntimeError(f"{unfinished} tasks of the step never finished: its graph has a cycle")
    return Run(
        start_s_N=tasks["start_s"].copy(),
        end_s_N=tasks["end_s"].copy(),
        sent_s_N=tasks["sent_s"].copy(),
        incoming_s_N=tasks["incoming_s"].copy(),
        busy_s_X=links["busy_s"].copy(),
        carried_bytes_X=links["carried_bytes"].copy(),
        contended=bool(state["contended"][0]),
    )


def _records(dtype: np.dtype[Any], size: int, **fields: Any) -> npt.NDArray[Any]:
    """Return records with the given fields; other ids are none (-1), other numbers NaN, other flags off."""
    records = np.zeros(size, dtype=dtype)
    for name in dtype.names or ():
        kind = dtype[name].kind
        records[name] = fields.get(name, {"i": -1, "f": np.nan, "b": False}[kind])
    return records


def _task_records(graph: TaskGraph, cluster: Cluster) -> npt.NDArray[Any]:
    return _records(
        _TASK,
        len(graph.kind_N),
        kind=graph.kind_N,
        source=graph.source_N,
        destination=graph.destination_N,
        flow=graph.flow_N,
        num_segments=np.maximum(1, np.ceil(graph.bytes_N / cluster.segment_bytes)),
        first_successor=graph.successor_start_N[:-1],
        num_successors=np.diff(graph.successor_start_N),
        waiting_for=graph.num_predecessors_N,
        duration_s=graph.duration_s_N,
        num_bytes=graph.bytes_N,
        arrival_s=0.0,
    )


def _link_records(cluster: Cluster) -> npt.NDArray[Any]:
    return _records(
        _LINK,
        len(cluster.links),
        bytes_per_s=cluster.link_bytes_per_s_X,
        latency_s=cluster.link_latency_s_X,
        overhead_s=cluster.link_message_overhead_s_X,
        busy_s=0.0,
        carried_bytes=0.0,
    )


@numba.njit(cache=True)
def _execute(tasks, devices, links, flows, state, routes_RRH, successors, reached):  # type: ignore[no-untyped-def]
    """The event loop: tell successors, let idle devices choose, take the next event of a device or a link."""
    events = [(0.0, 0, 0, 0, 0)]  # time, sequence, what, task or link, hop
    events.pop()
    completed = [0]  # tasks that completed at this instant and whose successors are still to be told
    completed.pop()
    entries = np.zeros(1024, _ENTRY)
    for task in range(len(tasks)):
        if tasks[task].waiting_for == 0:
            _make_ready(task, 0.0, tasks, devices, flows, state, events, completed)
    now = 0.0
    while True:
        while len(completed) > 0:
            _complete(completed.pop(), now, tasks, devices, flows, state, successors, events, completed)
        # Only when this instant has no more events do idle devices choose, so that ties follow the queue's order.
        if len(events) == 0 or events[0][0] > now:
            _start_devices(now, tasks, devices, state, events)
            if len(events) == 0:
                break
        now, _, what, subject, hop = heapq.heappop(events)
        if what == _COMPUTE_DONE:
            devices[tasks[subject].source].busy = False
            completed.append(subject)
            continue
        if what == _SEGMENT_ARRIVES:
            link = _link_of(subject, hop, tasks, routes_RRH)
            if link < 0:
                reached[subject, -1] += 1
                if reached[subject, -1] == tasks[subject].num_segments:
                    completed.append(subject)
                continue
            if state[0].free_entry < 0 and state[0].used_entries == len(entries):
                entries = np.append(entries, np.zeros_like(entries))
            _queue_entry(_new_entry(state, entries), link, subject, hop, now, links, entries)
        else:
            link = subject
            _free_link(link, now, tasks, links, flows, state, entries)
        if links[link].entry < 0 and links[link].head >= 0:
            _serve(link, now, tasks, links, flows, state, entries, routes_RRH, reached, events)


@numba.njit(cache=True)
def _push(events, state, at_s, what, subject, hop):  # type: ignore[no-untyped-def]
    heapq.heappush(events, (at_s, state[0].sequence, what, subject, hop))
    state[0].sequence += 1


@numba.njit(cache=True)
def _complete(task, now, tasks, devices, flows, state, successors, events, completed):  # type: ignore[no-untyped-def]
    """The task is done: its successors have one predecessor less to wait for."""
    tasks[task].end_s = now
    for s in range(tasks[task].first_successor, tasks[task].first_successor + tasks[task].num_successors):
        successor = successors[s]
        tasks[successor].waiting_for -= 1
        if tasks[task].kind == _MESSAGE:
            tasks[successor].arrival_s = now
        if tasks[successor].waiting_for == 0:
            _make_ready(successor, now, tasks, devices, flows, state, events, completed)


@numba.njit(cache=True)
def _make_ready(task, now, tasks, devices, flows, state, events, completed):  # type: ignore[no-untyped-def]
    """All predecessors of the task are done: it queues for its device or in its flow; a barrier is done at once."""
    if tasks[task].kind == _COMPUTE:
        _queue_compute(task, tasks[task].source, tasks, devices)
    elif tasks[task].kind == _MESSAGE:
        flow = tasks[task].flow
        if flows[flow].head < 0:
            flows[flow].head = task
        else:
            tasks[flows[flow].tail].next = task
        flows[flow].tail = task
        if not flows[flow].active:
            flows[flow].active = True
            _push(events, state, now, _SEGMENT_ARRIVES, task, 0)
    else:
        tasks[task].start_s = now
        completed.append(task)


@numba.njit(cache=True)
def _queue_compute(task, device, tasks, devices):  # type: ignore[no-untyped-def]
    """Put the task into its device's queue, which is sorted by (arrival of the enabling message, id)."""
    previous, following = -1, devices[device].head
    while following >= 0 and (tasks[following].arrival_s, following) < (tasks[task].arrival_s, task):
        previous, following = following, tasks[following].next
    tasks[task].next = following
    if previous < 0:
        devices[device].head = task
    else:
        tasks[previous].next = task


@numba.njit(cache=True)
def _start_devices(now, tasks, devices, state, events):  # type: ignore[no-untyped-def]
    """Every idle device takes the task at the head of its queue."""
    for device in range(len(devices)):
        task = devices[device].head
        if task >= 0 and not devices[device].busy:
            devices[device].head = tasks[task].next
            devices[device].busy = True
            tasks[task].start_s = now
            _push(events, state, now + tasks[task].duration_s, _COMPUTE_DONE, task, 0)


@numba.njit(cache=True)
def _link_of(task, hop, tasks, routes_RRH):  # type: ignore[no-untyped-def]
    """Return the link of a hop of the message's route; -1 behind its end."""
    if hop == routes_RRH.shape[2]:
        return -1
    return routes_RRH[tasks[task].source, tasks[task].destination, hop]


@numba.njit(cache=True)
def _new_entry(state, entries):  # type: ignore[no-untyped-def]
    """Return a free entry of the pool."""
    entry = state[0].free_entry
    if entry >= 0:
        state[0].free_entry = entries[entry].next
    else:
        entry = state[0].used_entries
        state[0].used_entries += 1
    return entry


@numba.njit(cache=True)
def _queue_entry(entry, link, task, hop, now, links, entries):  # type: ignore[no-untyped-def]
    """Put a segment of the task (at hop 0: its flow) at the end of the link's queue."""
    entries[entry].task, entries[entry].hop, entries[entry].since_s, entries[entry].next = task, hop, now, -1
    if links[link].head < 0:
        links[link].head = entry
    else:
        entries[links[link].tail].next = entry
    links[link].tail = entry


@numba.njit(cache=True)
def _free_link(link, now, tasks, links, flows, state, entries):  # type: ignore[no-untyped-def]
    """The link has sent a segment. A flow that has more goes to the end of the line; another entry is done with."""
    entry = links[link].entry
    links[link].entry = -1
    flow = tasks[entries[entry].task].flow
    if entries[entry].hop == 0 and flows[flow].head >= 0:
        _queue_entry(entry, link, flows[flow].head, 0, now, links, entries)
        return
    if entries[entry].hop == 0:
        flows[flow].active = False
    entries[entry].next = state[0].free_entry
    state[0].free_entry = entry


@numba.njit(cache=True)
def _serve(link, now, tasks, links, flows, state, entries, routes_RRH, reached, events):  # type: ignore[no-untyped-def]
    """The link takes a segment of the entry at the head of its queue."""
    entry = links[link].head
    links[link].head = entries[entry].next
    links[link].entry = entry
    task, hop = entries[entry].task, entries[entry].hop
    flow = tasks[task].flow
    if links[link].flow != flow and entries[entry].since_s < now:
        state[0].contended = 1
    links[link].flow = flow
    held_s = tasks[task].num_bytes / tasks[task].num_segments / links[link].bytes_per_s
    if reached[task, hop] == 0:
        held_s += links[link].overhead_s
        if hop == 0:
            tasks[task].start_s = now
        if _link_of(task, hop + 1, tasks, routes_RRH) < 0:
            tasks[task].incoming_s = now + links[link].latency_s
    reached[task, hop] += 1
    if reached[task, hop] == tasks[task].num_segments:
        links[link].carried_bytes += tasks[task].num_bytes  # once a message, so that whole bytes stay whole
        if hop == 0:
            flows[flow].head = tasks[task].next
            tasks[task].sent_s = now + held_s
    links[link].busy_s += held_s
    _push(events, state, now + held_s, _LINK_FREE, link, 0)
    _push(events, state, now + held_s + links[link].latency_s, _SEGMENT_ARRIVES, task, hop + 1)
