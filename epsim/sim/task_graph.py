"""`TaskGraph`: one step as compute tasks, messages and barriers with their order, and its `GraphBuilder`.

A compute task holds its device; a message goes along the route of its two ends; a barrier takes no time; the host of a
device is a device of its own, number R + r. Letters: N tasks (nodes in _LCRN), E edges, L MoE layers, R devices.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Kind(IntEnum):
    """What a task needs: a device, a route, or nothing."""

    COMPUTE = 0
    MESSAGE = 1
    BARRIER = 2


class Work(IntEnum):
    """What a task is for."""

    FRONT = 0
    EXPERTS = 1
    REMOTE_EXPERTS = 2
    HEAD = 3
    DISPATCH = 4
    FORWARD = 5
    GATHER = 6
    COMBINE = 7
    KV = 8
    BARRIER = 9
    HOST = 10
    SHARED = 11


_MESSAGE_WORKS = (Work.DISPATCH, Work.FORWARD, Work.GATHER, Work.COMBINE, Work.KV)


@dataclass(frozen=True, kw_only=True)
class TaskGraph:
    """Arrays over tasks; edges in compressed rows: task n enables successors[successor_start[n] : .. n + 1].

    kind_N, work_N: `Kind` and `Work`. layer_N. source_N, destination_N: the device of a compute task twice, the two
    ends of a message. origin_N: the device whose tokens these are. batch_N: the micro-batch, 0 or 1. duration_s_N: of
    compute tasks. bytes_N, flow_N: of messages; the messages of a flow keep their order on the wire.
    fronts_LR: ids of the (first micro-batch's) front tasks, for l = L the heads. program_LXR: ids of a layer's compute
    tasks on a device in their order, the front first; X of them: front, shared experts where they overlap, and the
    experts that follow a dispatch (in mode async the local ones), for both micro-batches in turn. barriers_LX: ids of
    the four barriers of a layer (attention, dispatch, experts, combine), empty except in mode sync.
    """

    kind_N: Ints
    work_N: Ints
    layer_N: Ints
    source_N: Ints
    destination_N: Ints
    origin_N: Ints
    batch_N: Ints
    duration_s_N: Floats
    bytes_N: Floats
    flow_N: Ints
    successor_start_N: Ints
    successors_E: Ints
    num_predecessors_N: Ints
    num_flows: int
    fronts_LR: Ints
    program_LXR: Ints
    barriers_LX: Ints


@dataclass
class GraphBuilder:
    """Collects tasks and edges array by array; what is added belongs to micro-batch `batch`."""

    num_devices: int
    batch: int = 0
    columns: list[dict[str, npt.NDArray[np.generic]]] = field(default_factory=list)
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    num_tasks: int = 0

    def _add(self, kind: Kind, work: Work, layer: Ints, source: Ints, destination: Ints, origin: Ints,
             duration_s: Floats | float, num_bytes: Floats | float) -> Ints:  # fmt: skip
        shape = np.shape(layer)
        full = {
            "kind": kind, "work": work, "layer": layer, "source": source, "destination": destination,
            "origin": origin, "batch": self.batch, "duration_s": duration_s, "bytes": num_bytes,
        }  # fmt: skip
        self.columns.append({name: np.broadcast_to(np.asarray(v), shape).reshape(-1) for name, v in full.items()})
        ids = self.num_tasks + np.arange(np.prod(shape, dtype=int)).reshape(shape)
        self.num_tasks += ids.size
        return ids

    def compute(self, work: Work, layer: Ints, device: Ints, origin: Ints, duration_s: Floats) -> Ints:
        return self._add(Kind.COMPUTE, work, layer, device, device, origin, duration_s, 0.0)

    def message(
        self, work: Work, layer: Ints, source: Ints, destination: Ints, origin: Ints, num_bytes: Floats
    ) -> Ints:
        return self._add(Kind.MESSAGE, work, layer, source, destination, origin, 0.0, num_bytes)

    def barriers(self, layer: Ints) -> Ints:
        zero = np.zeros_like(layer)
        return self._add(Kind.BARRIER, Work.BARRIER, layer, zero, zero, zero, 0.0, 0.0)

    def edge(self, before: Ints, after: Ints) -> None:
        pairs = np.broadcast_arrays(before, after)
        self.edges.append((pairs[0].reshape(-1), pairs[1].reshape(-1)))

    def finish(self, fronts_LR: Ints, program_LXR: Ints, barriers_LX: Ints) -> TaskGraph:
        column = {name: np.concatenate([part[name] for part in self.columns]) for name in self.columns[0]}
        before = np.concatenate([e[0] for e in self.edges])
        after = np.concatenate([e[1] for e in self.edges])
        order = np.argsort(before, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(before, minlength=self.num_tasks))))
        work = column["work"].astype(np.int64)
        origin, source = column["origin"].astype(np.int64), column["source"].astype(np.int64)
        destination = column["destination"].astype(np.int64)
        # One flow per message class, origin and pair of ends: whose tokens they are does not change their route.
        flow_class = np.searchsorted(_MESSAGE_WORKS, work).clip(max=len(_MESSAGE_WORKS) - 1)
        r = self.num_devices
        raw_flow = ((flow_class * r + origin) * r + source) * r + destination
        is_message = column["kind"] == Kind.MESSAGE
        used, flow = np.unique(raw_flow[is_message], return_inverse=True)
        flow_N = np.zeros(self.num_tasks, dtype=np.int64)
        flow_N[is_message] = flow
        return TaskGraph(
            kind_N=column["kind"].astype(np.int64),
            work_N=work,
            layer_N=column["layer"].astype(np.int64),
            source_N=source,
            destination_N=destination,
            origin_N=origin,
            batch_N=column["batch"].astype(np.int64),
            duration_s_N=column["duration_s"].astype(np.float64),
            bytes_N=column["bytes"].astype(np.float64),
            flow_N=flow_N,
            successor_start_N=starts.astype(np.int64),
            successors_E=after[order].astype(np.int64),
            num_predecessors_N=np.bincount(after, minlength=self.num_tasks).astype(np.int64),
            num_flows=len(used),
            fronts_LR=fronts_LR,
            program_LXR=program_LXR,
            barriers_LX=barriers_LX,
        )
