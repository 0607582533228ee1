"""The event engine said with SimPy: one process per device and per link (`run_graph`), to be read and to test by.

The rules are those of `epsim.sim.event`, which runs the same graphs in compiled code, some 25 times faster.
"""

import bisect
import heapq
from collections import deque
from collections.abc import Generator
from typing import Any, cast

import numpy as np
import simpy
from simpy.events import EventPriority

from epsim.cluster import Cluster
from epsim.sim.event import Run
from epsim.sim.task_graph import Kind, TaskGraph

Process = Generator[simpy.Event, Any, None]
# Of events at one instant: SimPy's own have the priorities 0 and 1, these come after all of them.
_USUAL, _LINKS_CHOOSE, _DEVICES_CHOOSE = 1, 2, 3


class _Environment(simpy.Environment):
    """SimPy's, with events at times rather than after delays, whose sum with the present is rounded otherwise."""

    def at(self, time_s: float, priority: int = _USUAL) -> simpy.Event:
        """Return the event that comes at this time."""
        event = self.event()
        event._ok, event._value = True, None
        heapq.heappush(self._queue, (time_s, cast(EventPriority, priority), next(self._eid), event))
        return event


class _State:
    """The state of one execution: start and end of the tasks, and who waits for what."""

    def __init__(self, graph: TaskGraph, cluster: Cluster) -> None:
        self.env = _Environment()
        self.graph = graph
        self.start_s = np.full(len(graph.kind_N), np.nan)
        self.end_s = np.full(len(graph.kind_N), np.nan)
        self.sent_s = np.full(len(graph.kind_N), np.nan)
        self.incoming_s = np.full(len(graph.kind_N), np.nan)
        self.arrival_s = np.zeros(len(graph.kind_N))
        self.waiting_for = graph.num_predecessors_N.copy()
        self.flows: list[deque[int]] = [deque() for _ in range(graph.num_flows)]
        self.devices = [_Device(self) for _ in range(2 * cluster.num_devices)]  # and their hosts
        self.links = [_Link(self, x, cluster) for x in range(len(cluster.links))]
        self.routes_RRH = cluster.routes_RRH
        self.num_segments = np.maximum(1, np.ceil(graph.bytes_N / cluster.segment_bytes)).astype(int)
        self.served = np.zeros((len(graph.kind_N), cluster.routes_RRH.shape[2] + 1), dtype=int)
        self.active_flows: set[int] = set()
        self.contended = False
        self.settling: dict[int, simpy.Event] = {}
        for task in np.flatnonzero(self.waiting_for == 0):
            self.ready(int(task))

    def settled(self, priority: int) -> simpy.Event:
        """Return the event, one for all who wait for it, that comes when this instant has nothing else to do."""
        if priority not in self.settling or self.settling[priority].processed:
            self.settling[priority] = self.env.at(self.env.now, priority)
        return self.settling[priority]

    def ready(self, task: int) -> None:
        """All predecessors of the task are done."""
        kind = self.graph.kind_N[task]
        if kind == Kind.BARRIER:
            self.start_s[task] = self.env.now
            self.complete(task)
        elif kind == Kind.COMPUTE:
            self.devices[self.graph.source_N[task]].add(task)
        else:
            flow = int(self.graph.flow_N[task])
            self.flows[flow].append(task)
            if flow not in self.active_flows:
                self.active_flows.add(flow)
                self.env.process(self.arrive(task, 0, self.env.now))

    def complete(self, task: int) -> None:
        """The task is done: its successors have one predecessor less to wait for."""
        self.end_s[task] = self.env.now
        first, last = self.graph.successor_start_N[task : task + 2]
        for successor in self.graph.successors_E[first:last]:
            self.waiting_for[successor] -= 1
            if self.graph.kind_N[task] == Kind.MESSAGE:
                self.arrival_s[successor] = self.env.now
            if self.waiting_for[successor] == 0:
                self.ready(int(successor))

    def next_link(self, task: int, hop: int) -> "_Link | None":
        """The link behind the given hop of the message's route; None at its end."""
        route = self.routes_RRH[self.graph.source_N[task], self.graph.destination_N[task]]
        return self.links[route[hop + 1]] if hop + 1 < len(route) and route[hop + 1] >= 0 else None

    def arrive(self, task: int, hop: int, at_s: float) -> Process:
        """A segment (at hop 0: the head of a flow) comes to the link of its hop, or to its destination."""
        yield self.env.at(at_s)
        link = self.next_link(task, hop - 1)
        if link is not None:
            link.add(task, hop)
            return
        self.served[task, -1] += 1
        if self.served[task, -1] == self.num_segments[task]:
            self.complete(task)


class _Device:
    """Computes one task at a time; those waiting are in the order in which their messages arrived, then by id."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.queue: list[tuple[float, int]] = []
        self.wake = state.env.event()
        state.env.process(self.work())

    def add(self, task: int) -> None:
        bisect.insort(self.queue, (self.state.arrival_s[task], task))
        if not self.wake.triggered:
            self.wake.succeed()

    def work(self) -> Process:
        env = self.state.env
        while True:
            if not self.queue:
                self.wake = env.event()
                yield self.wake
            yield self.state.settled(_DEVICES_CHOOSE)
            _, task = self.queue.pop(0)
            self.state.start_s[task] = env.now
            yield env.timeout(self.state.graph.duration_s_N[task])
            self.state.complete(task)


class _Link:
    """Serves one segment at a time: flows in turn where they enter the network, else first come, first served."""

    def __init__(self, state: _State, index: int, cluster: Cluster) -> None:
        self.state = state
        self.link = cluster.links[index]
        self.queue: deque[tuple[int, int, float]] = deque()
        self.wake = state.env.event()
        self.busy_s = self.carried_bytes = 0.0
        self.last_flow = -1
        self.is_held = False
        self.credit_bytes, self.credit_at_s = self.link.burst_bytes, 0.0
        state.env.process(self.work())

    def add(self, task: int, hop: int) -> None:
        self.queue.append((task, hop, self.state.env.now))
        if not self.wake.triggered:
            self.wake.succeed()

    @property
    def opposite(self) -> "_Link | None":
        """The other direction, where its acknowledgements take time of this one."""
        has_one = self.link.opposite is not None and self.link.ack_overhead_frac > 0
        return self.state.links[cast(int, self.link.opposite)] if has_one else None

    def time_at_rate(self, wire_bytes: float) -> float:
        """How long these bytes take, less those that the token bucket lets through at once."""
        now, rate = self.state.env.now, self.link.bytes_per_s
        credit_bytes = min(self.link.burst_bytes, self.credit_bytes + (now - self.credit_at_s) * rate)
        from_credit_bytes = min(wire_bytes, credit_bytes)
        held_s = (wire_bytes - from_credit_bytes) / rate
        if self.opposite is not None and (self.opposite.is_held or self.opposite.queue):
            held_s *= 1.0 + self.link.ack_overhead_frac
        self.credit_bytes, self.credit_at_s = credit_bytes - from_credit_bytes, now + held_s
        return held_s

    def work(self) -> Process:
        state, env = self.state, self.state.env
        while True:
            if not self.queue:
                self.wake = env.event()
                yield self.wake
            if self.opposite is not None:
                yield state.settled(_LINKS_CHOOSE)
            task, hop, since_s = self.queue.popleft()
            flow = int(state.graph.flow_N[task])
            state.contended |= flow != self.last_flow and since_s < env.now
            self.last_flow = flow
            segment_bytes = state.graph.bytes_N[task] / state.num_segments[task]
            wire_bytes = segment_bytes * (1.0 + self.link.frame_overhead_frac)
            if state.served[task, hop] == 0:
                wire_bytes += self.link.message_header_bytes
            held_s = self.time_at_rate(wire_bytes)
            if state.served[task, hop] == 0:
                held_s += self.link.message_overhead_s
                if hop == 0:
                    state.start_s[task] = env.now
                if state.next_link(task, hop) is None:
                    state.incoming_s[task] = env.now + self.link.latency_s
            state.served[task, hop] += 1
            if hop == 0 and state.served[task, 0] == state.num_segments[task]:
                state.flows[flow].popleft()
                state.sent_s[task] = env.now + held_s
            self.busy_s += held_s
            if state.served[task, hop] == state.num_segments[task]:
                self.carried_bytes += state.graph.bytes_N[task]
            env.process(state.arrive(task, hop + 1, env.now + held_s + self.link.latency_s))
            self.is_held = True
            yield env.timeout(held_s)
            self.is_held = False
            if hop == 0:
                if state.flows[flow]:
                    self.queue.append((state.flows[flow][0], 0, env.now))
                else:
                    state.active_flows.discard(flow)


def run_graph(graph: TaskGraph, cluster: Cluster) -> Run:
    """Execute the graph; arguments and results as in `epsim.sim.event.run_graph`."""
    state = _State(graph, cluster)
    state.env.run()
    return Run(
        start_s_N=state.start_s,
        end_s_N=state.end_s,
        sent_s_N=state.sent_s,
        incoming_s_N=state.incoming_s,
        busy_s_X=np.array([link.busy_s for link in state.links]),
        carried_bytes_X=np.array([link.carried_bytes for link in state.links]),
        contended=bool(state.contended),
    )
