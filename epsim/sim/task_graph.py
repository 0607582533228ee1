"""`TaskGraph`: one step as compute tasks, messages and barriers with their order, and its `GraphBuilder`.

A compute task holds its device; a message goes along the route of its two ends; a barrier takes no time; the host of a
device is a device of its own, number R + r. Letters: N tasks (nodes in _LCRN), E edges, L MoE layers, R devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from epsim.sim.messaging import MessageCosts

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
    SEND_OUT = 12  # what a device computes before it sends tokens or KV caches
    SEND_BACK = 13  # ... results


_MESSAGE_WORKS = (Work.DISPATCH, Work.FORWARD, Work.GATHER, Work.COMBINE, Work.KV)
_KIND, _WORK, _SOURCE, _DESTINATION = 0, 1, 3, 4  # rows of a builder's numbers
_BACK_WORKS = (Work.GATHER, Work.COMBINE)


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
    """Collects tasks and edges array by array."""

    num_devices: int
    costs: MessageCosts | None = None
    batch: int = 0
    numbers: list[Ints] = field(default_factory=list)
    amounts: list[Floats] = field(default_factory=list)
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    sent: list[tuple[Ints, ...]] = field(default_factory=list)
    num_tasks: int = 0

    def _add(self, kind: Kind, work: Work, layer: Ints, source: Ints, destination: Ints, origin: Ints,
             duration_s: Floats | float, num_bytes: Floats | float) -> Ints:  # fmt: skip
        numbers = np.empty((7, *layer.shape), dtype=np.int64)
        for row, value in zip(numbers, (kind, work, layer, source, destination, origin, self.batch), strict=True):
            row[...] = value
        amounts = np.empty((2, *layer.shape))
        amounts[0], amounts[1] = duration_s, num_bytes
        self.numbers.append(numbers.reshape(7, -1))
        self.amounts.append(amounts.reshape(2, -1))
        ids = np.arange(self.num_tasks, self.num_tasks + layer.size).reshape(layer.shape)
        self.num_tasks += layer.size
        return ids

    @contextmanager
    def micro_batch(self, batch: int) -> Iterator[None]:
        """What is added inside belongs to this micro-batch."""
        before, self.batch = self.batch, batch
        yield
        self.batch = before

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
        if before.shape != after.shape:
            before, after = np.broadcast_arrays(before, after)
        self.edges.append((before.reshape(-1), after.reshape(-1)))

    def send(self, messages: Ints, turn: Ints | int, following: Ints | int) -> None:
        """Say of messages in which turn their device sends them, and which of its tasks comes after that (-1: none).

        Where sending costs the device something, each leaves when a task of its own is done that sends it. Those that
        become ready together go by turn, then by destination, beginning with the next rank.
        """
        if self.costs is not None and self.costs.sends_R.any():
            columns = np.broadcast_arrays(messages, turn, following)
            self.sent.append(tuple(column.reshape(-1) for column in columns))

    def _add_sends(self, costs: MessageCosts) -> int:
        """Put the tasks that send in front of all others, so that they win ties; return how many they are.

        Whatever a message waited for, its send waits for now.
        """
        numbers, amounts = np.concatenate(self.numbers, axis=1), np.concatenate(self.amounts, axis=1)
        message, turn, following = np.concatenate([np.stack(columns) for columns in self.sent], axis=1)
        costly = costs.sends_R[numbers[_SOURCE, message]]
        message, turn, following = message[costly], turn[costly], following[costly]
        _, work, layer, source, destination, _, _ = numbers[:, message]
        way = (destination - source) % self.num_devices
        order = np.lexsort((message, way, turn, work == Work.KV, layer))
        message, following, source = message[order], following[order], source[order]
        tasks = numbers[:, message]
        tasks[_WORK] = np.where(np.isin(tasks[_WORK], _BACK_WORKS), Work.SEND_BACK, Work.SEND_OUT)
        tasks[_KIND], tasks[_DESTINATION] = Kind.COMPUTE, source
        seconds = costs.send_s_R[source] + amounts[1, message] * costs.send_s_per_byte_R[source]
        self.numbers, self.amounts = [tasks, numbers], [np.stack([seconds, np.zeros_like(seconds)]), amounts]
        count, ids = len(message), np.arange(len(message))
        entrance_N = count + np.arange(self.num_tasks)
        entrance_N[message] = ids
        self.num_tasks += count
        self.edges = [(count + before, entrance_N[after]) for before, after in self.edges]
        self.edge(ids, count + message)
        self.edge(ids[following >= 0], count + following[following >= 0])
        return count

    def finish(
        self, fronts_LR: Ints, program_LXR: Ints, barriers_LX: Ints, *, one_flow_per_pair: bool = False
    ) -> TaskGraph:
        if self.costs is not None and self.sent:
            num_sends = self._add_sends(self.costs)
            fronts_LR, program_LXR, barriers_LX = (ids + num_sends for ids in (fronts_LR, program_LXR, barriers_LX))
        kind, work, layer, source, destination, origin, batch = np.concatenate(self.numbers, axis=1)
        duration_s, num_bytes = np.concatenate(self.amounts, axis=1)
        before, after = np.concatenate([np.stack(pair) for pair in self.edges], axis=1)
        order = np.argsort(before, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(before, minlength=self.num_tasks))))
        # One flow per message class, origin and pair of ends: whose tokens they are does not change their route.
        flow_class = np.searchsorted(_MESSAGE_WORKS, work).clip(max=len(_MESSAGE_WORKS) - 1)
        r = self.num_devices
        raw_flow = source * r + destination
        if not one_flow_per_pair:
            raw_flow += (flow_class * r + origin) * r * r
        is_message = kind == Kind.MESSAGE
        used, flow = np.unique(raw_flow[is_message], return_inverse=True)
        flow_N = np.zeros(self.num_tasks, dtype=np.int64)
        flow_N[is_message] = flow
        return TaskGraph(
            kind_N=kind,
            work_N=work,
            layer_N=layer,
            source_N=source,
            destination_N=destination,
            origin_N=origin,
            batch_N=batch,
            duration_s_N=duration_s,
            bytes_N=num_bytes,
            flow_N=flow_N,
            successor_start_N=starts.astype(np.int64),
            successors_E=after[order],
            num_predecessors_N=np.bincount(after, minlength=self.num_tasks).astype(np.int64),
            num_flows=len(used),
            fronts_LR=fronts_LR,
            program_LXR=program_LXR,
            barriers_LX=barriers_LX,
        )
