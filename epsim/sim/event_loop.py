"""The compiled event loop of the event engine, `execute`: the rules of `epsim.sim.event`, on its records."""

import heapq

import numba
import numpy as np

from epsim.sim.task_graph import Kind

_COMPUTE = int(Kind.COMPUTE)
_MESSAGE = int(Kind.MESSAGE)
_COMPUTE_DONE, _LINK_FREE, _SEGMENT_ARRIVES = 0, 1, 2

_ENTRY = np.dtype([(name, np.int64) for name in ("next", "task", "hop")] + [("since_s", np.float64)], align=True)


@numba.njit(cache=True)
def execute(tasks, devices, links, flows, state, routes_RRH, successors, reached):  # type: ignore[no-untyped-def]
    """The event loop: tell successors, let idle devices choose, take the next event of a device or a link."""
    events = [(0.0, 0, 0, 0, 0)]  # time, sequence, what, task or link, hop
    events.pop()
    completed = [0]  # tasks that completed at this instant and whose successors are still to be told
    completed.pop()
    choosing = [0]  # links that look at their opposite direction before they take their next segment
    choosing.pop()
    chosen = 0  # how many of them have, of this instant
    entries = np.zeros(1024, _ENTRY)
    for task in range(len(tasks)):
        if tasks[task].waiting_for == 0:
            _make_ready(task, 0.0, tasks, devices, flows, state, events, completed)
    now = 0.0
    while True:
        while len(completed) > 0:
            _complete(completed.pop(), now, tasks, devices, flows, state, successors, events, completed)
        # Only when this instant has no more events do idle devices choose, so that ties follow the queue's order;
        # before them, one after the other, the links whose time for a segment depends on their opposite direction.
        settled = len(events) == 0 or events[0][0] > now
        if len(choosing) > 0 and (settled or chosen > 0):
            link = choosing[chosen]
            chosen += 1
            if chosen == len(choosing):
                choosing.clear()
                chosen = 0
        else:
            if settled:
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
            if links[link].opposite >= 0:
                choosing.append(link)
                continue
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
    wire_bytes = tasks[task].num_bytes / tasks[task].num_segments * links[link].frame_factor
    if reached[task, hop] == 0:
        wire_bytes += links[link].header_bytes
    held_s = _time_at_rate(link, wire_bytes, now, links)
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


@numba.njit(cache=True)
def _time_at_rate(link, wire_bytes, now, links):  # type: ignore[no-untyped-def]
    """Return how long the link takes for these bytes, less those that its token bucket lets through at once."""
    spent_bytes = 0.0
    if links[link].burst_bytes > 0.0:
        refilled_bytes = (now - links[link].credit_at_s) * links[link].bytes_per_s
        links[link].credit_bytes = min(links[link].burst_bytes, links[link].credit_bytes + refilled_bytes)
        spent_bytes = min(wire_bytes, links[link].credit_bytes)
        links[link].credit_bytes -= spent_bytes
    held_s = (wire_bytes - spent_bytes) / links[link].bytes_per_s
    opposite = links[link].opposite
    if opposite >= 0 and (links[opposite].entry >= 0 or links[opposite].head >= 0):
        held_s *= links[link].ack_factor
    if links[link].burst_bytes > 0.0:
        links[link].credit_at_s = now + held_s
    return held_s
