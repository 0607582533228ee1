"""The event engine: executes a `TaskGraph` on devices and links, event by event, in compiled code (`run_graph`).

Rules. A device computes one task at a time, those waiting in the order in which their message arrived (then by id).
A message is cut into equal segments of at most the cluster's segment size. At the first link of its route the flows
take turns, a segment each; at later links segments are served as they come. A link is held for a segment's
wire bytes / bandwidth (plus the message overhead for the first segment of a message), and the segment is at the next
link, or has arrived, a latency later. Wire bytes: those of the segment, their framing, and the header with the first
segment. A link with a burst has a bucket of so many bytes of credit, full at the start, which fills at the link's
bandwidth and is used before time is. While the opposite direction of a link is held or has a queue, a segment takes
longer by the share that acknowledgements take; such a link takes its next segment when all else of the instant has
happened. `epsim.sim.simpy_engine` says the same with SimPy, to be read and to test this one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.sim.event_loop import execute
from epsim.sim.task_graph import TaskGraph

Floats = npt.NDArray[np.float64]

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
    [(name, np.int64) for name in ("head", "tail", "entry", "flow", "opposite")]
    + [(name, np.float64) for name in ("bytes_per_s", "latency_s", "overhead_s", "busy_s", "carried_bytes")]
    + [(name, np.float64) for name in ("frame_factor", "header_bytes", "ack_factor")]
    + [(name, np.float64) for name in ("burst_bytes", "credit_bytes", "credit_at_s")],
    align=True,
)
_FLOW = np.dtype([("head", np.int64), ("tail", np.int64), ("active", np.bool_)], align=True)
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
    execute(tasks, devices, links, flows, state, cluster.routes_RRH, graph.successors_E, reached)
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
    """A link's bucket is full at first. Only a link whose acknowledgements cost something knows its opposite."""
    links = cluster.links
    burst_bytes_X = [link.burst_bytes for link in links]
    return _records(
        _LINK,
        len(links),
        opposite=[-1 if link.opposite is None or not link.ack_overhead_frac else link.opposite for link in links],
        frame_factor=[1.0 + link.frame_overhead_frac for link in links],
        header_bytes=[link.message_header_bytes for link in links],
        ack_factor=[1.0 + link.ack_overhead_frac for link in links],
        burst_bytes=burst_bytes_X,
        credit_bytes=burst_bytes_X,
        credit_at_s=0.0,
        bytes_per_s=cluster.link_bytes_per_s_X,
        latency_s=cluster.link_latency_s_X,
        overhead_s=cluster.link_message_overhead_s_X,
        busy_s=0.0,
        carried_bytes=0.0,
    )
