"""`TaskGraph`: one step as compute tasks, messages and barriers with their order, built by `build_graph`.

A compute task holds its device; a message goes along the route of its two ends; a barrier takes no time. Work is laid
out as a rank's program runs it: layer by layer, in `async` mode without a barrier between ranks. Letters: N tasks
(nodes in _LCRN), E edges, L MoE layers, C chunks, R devices.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from epsim.sim.step import StepPlan

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


_MESSAGE_WORKS = (Work.DISPATCH, Work.FORWARD, Work.GATHER, Work.COMBINE, Work.KV)


@dataclass(frozen=True, kw_only=True)
class TaskGraph:
    """Arrays over tasks; edges in compressed rows: task n enables successors[successor_start[n] : .. n + 1].

    kind_N, work_N: `Kind` and `Work`. layer_N. source_N, destination_N: the device of a compute task twice, the two
    ends of a message. origin_N: the device whose tokens these are. duration_s_N: of compute tasks. bytes_N, flow_N: of
    messages; the messages of a flow keep their order on the wire.
    fronts_LR, local_LR: ids of the front tasks (for l = L the heads) and of the tasks that follow a dispatch
    (in mode sync all experts, in mode async the local ones). barriers_LX: ids of the four barriers of a layer
    (attention, dispatch, experts, combine), empty in mode async.
    """

    kind_N: Ints
    work_N: Ints
    layer_N: Ints
    source_N: Ints
    destination_N: Ints
    origin_N: Ints
    duration_s_N: Floats
    bytes_N: Floats
    flow_N: Ints
    successor_start_N: Ints
    successors_E: Ints
    num_predecessors_N: Ints
    num_flows: int
    fronts_LR: Ints
    local_LR: Ints
    barriers_LX: Ints


@dataclass
class _Builder:
    """Collects tasks and edges array by array."""

    num_devices: int
    columns: list[dict[str, npt.NDArray[np.generic]]] = field(default_factory=list)
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    num_tasks: int = 0

    def _add(self, kind: Kind, work: Work, layer: Ints, source: Ints, destination: Ints, origin: Ints,
             duration_s: Floats | float, num_bytes: Floats | float) -> Ints:  # fmt: skip
        shape = np.shape(layer)
        full = {
            "kind": kind, "work": work, "layer": layer, "source": source, "destination": destination,
            "origin": origin, "duration_s": duration_s, "bytes": num_bytes,
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

    def finish(self, fronts_LR: Ints, local_LR: Ints, barriers_LX: Ints) -> TaskGraph:
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
            duration_s_N=column["duration_s"].astype(np.float64),
            bytes_N=column["bytes"].astype(np.float64),
            flow_N=flow_N,
            successor_start_N=starts.astype(np.int64),
            successors_E=after[order].astype(np.int64),
            num_predecessors_N=np.bincount(after, minlength=self.num_tasks).astype(np.int64),
            num_flows=len(used),
            fronts_LR=fronts_LR,
            local_LR=local_LR,
            barriers_LX=barriers_LX,
        )


def build_graph(plan: StepPlan) -> TaskGraph:
    """Return the task graph of a step, in its mode."""
    b = _Builder(plan.num_devices)
    layer_LR, device_LR = np.indices((plan.num_layers, plan.num_devices))
    fronts_LR = b.compute(Work.FRONT, layer_LR, device_LR, device_LR, plan.front_s_LR)
    device_R = device_LR[0]
    heads_R = b.compute(Work.HEAD, np.full_like(device_R, plan.num_layers), device_R, device_R, plan.head_s_R)
    starts_LR = np.concatenate((fronts_LR, heads_R[None]))
    _add_kv(b, plan, fronts_LR, heads_R)
    if plan.mode == "sync":
        local_LR, barriers_LX = _add_sync(b, plan, starts_LR)
    else:
        local_LR, barriers_LX = _add_async(b, plan, starts_LR), np.zeros((0, 4), dtype=np.int64)
    return b.finish(starts_LR, local_LR, barriers_LX)


def _add_sync(b: _Builder, plan: StepPlan, starts_LR: Ints) -> tuple[Ints, Ints]:
    """Barriers between attention, dispatch, experts and combine of every layer, as collectives make them."""
    layers, devices = np.indices((plan.num_layers, plan.num_devices))
    barriers_LX = b.barriers(np.indices((plan.num_layers, 4))[0])
    after_front, after_dispatch, after_experts, after_combine = barriers_LX.T
    experts_LR = b.compute(Work.EXPERTS, layers, devices, devices, plan.experts_s_LR + plan.shared_s_LR)
    b.edge(starts_LR[:-1], after_front[:, None])
    b.edge(after_front, after_dispatch)
    b.edge(after_dispatch[:, None], experts_LR)
    b.edge(experts_LR, after_experts[:, None])
    b.edge(after_experts, after_combine)
    b.edge(after_combine[:, None], starts_LR[1:])
    index, delivery = _add_dispatch(b, plan, np.broadcast_to(after_front[:, None], starts_LR[:-1].shape))
    b.edge(delivery, after_dispatch[index[0]])
    returned_layer, _, returned = _add_combine(b, plan, index, after_experts[index[0]])
    b.edge(returned, after_combine[returned_layer])
    return experts_LR, barriers_LX


def _add_async(b: _Builder, plan: StepPlan, starts_LR: Ints) -> Ints:
    """No barrier: local experts at once, remote tokens as they arrive, results home as they are ready."""
    layers, devices = np.indices((plan.num_layers, plan.num_devices))
    local_LR = b.compute(Work.EXPERTS, layers, devices, devices, plan.local_s_LR + plan.shared_s_LR)
    b.edge(starts_LR[:-1], local_LR)
    b.edge(local_LR, starts_LR[1:])
    index, delivery = _add_dispatch(b, plan, starts_LR[:-1])
    layer, chunk, source, destination = index
    remote = b.compute(
        Work.REMOTE_EXPERTS, layer, destination, source, plan.remote_s_LCRR[layer, chunk, source, destination]
    )
    b.edge(delivery, remote)
    b.edge(local_LR[layer, destination], remote)
    b.edge(remote, starts_LR[layer + 1, destination])
    returned_layer, home, returned = _add_combine(b, plan, index, remote)
    b.edge(returned, starts_LR[returned_layer + 1, home])
    return local_LR


def _add_dispatch(b: _Builder, plan: StepPlan, ready_LR: Ints) -> tuple[tuple[Ints, ...], Ints]:
    """Add the dispatch messages, each after ready_LR[layer, source].

    Returns the (layer, chunk, source, destination) of every pair with traffic and, for each, the message that delivers.
    """
    index = tuple(i.astype(np.int64) for i in np.nonzero(plan.dispatch_bytes_LCRR))
    layer, _, source, destination = index
    delivery = np.empty(layer.shape, dtype=np.int64)
    far = plan.via_gateway(source, destination)
    near = tuple(i[~far] for i in index)
    direct = b.message(Work.DISPATCH, near[0], near[2], near[3], near[2], plan.dispatch_bytes_LCRR[near])
    b.edge(ready_LR[near[0], near[2]], direct)
    delivery[~far] = direct
    if plan.gateway_RN is not None:
        layer_n, source_n, sent, at_gateway = _add_node_messages(b, plan, Work.DISPATCH, plan.node_dispatch_bytes_LCRN)
        b.edge(ready_LR[layer_n, source_n], sent)
        far_index = tuple(i[far] for i in index)
        delivery[far] = _forward(b, plan, far_index, at_gateway)
    return index, delivery


def _forward(b: _Builder, plan: StepPlan, index: tuple[Ints, ...], at_gateway_LCRN: Ints) -> Ints:
    """Add the messages from a gateway to the devices of its node; the gateway's own tokens are there already."""
    assert plan.gateway_RN is not None
    layer, chunk, source, destination = index
    node = plan.node_of_device_R[destination]
    gateway = plan.gateway_RN[source, node]
    delivery = at_gateway_LCRN[layer, chunk, source, node]
    onward = gateway != destination
    sent = b.message(
        Work.FORWARD, layer[onward], gateway[onward], destination[onward], source[onward],
        plan.dispatch_bytes_LCRR[index][onward],
    )  # fmt: skip
    b.edge(delivery[onward], sent)
    delivery[onward] = sent
    return delivery


def _add_node_messages(b: _Builder, plan: StepPlan, work: Work, bytes_LCRN: Floats) -> tuple[Ints, Ints, Ints, Ints]:
    """Add a message per (layer, chunk, home, node) with bytes, between home and gateway.

    Returns layer, home and id of each, and the ids as [L, C, R, N], -1 where there is no message.
    """
    assert plan.gateway_RN is not None
    layer, chunk, home, node = (i.astype(np.int64) for i in np.nonzero(bytes_LCRN))
    gateway = plan.gateway_RN[home, node].astype(np.int64)
    source, destination = (home, gateway) if work == Work.DISPATCH else (gateway, home)
    ids = b.message(work, layer, source, destination, home, bytes_LCRN[layer, chunk, home, node])
    ids_LCRN = np.full(bytes_LCRN.shape, -1, dtype=np.int64)
    ids_LCRN[layer, chunk, home, node] = ids
    return layer, home, ids, ids_LCRN


def _add_combine(b: _Builder, plan: StepPlan, index: tuple[Ints, ...], done: Ints) -> tuple[Ints, Ints, Ints]:
    """Add the messages that bring results home, each after its `done` task.

    Returns layer, home and id of every message that arrives at a home.
    """
    layer, chunk, home, device = index
    far = plan.via_gateway(home, device)
    near = tuple(i[~far] for i in index)
    direct = b.message(Work.COMBINE, near[0], near[3], near[2], near[2], plan.combine_bytes_LCRR[near])
    b.edge(done[~far], direct)
    if plan.gateway_RN is None:
        return near[0], near[2], direct
    layer_n, home_n, arrived, reduced_LCRN = _add_node_messages(b, plan, Work.COMBINE, plan.node_combine_bytes_LCRN)
    layer, chunk, home, device = (i[far] for i in index)
    node = plan.node_of_device_R[device]
    gateway = plan.gateway_RN[home, node]
    last = reduced_LCRN[layer, chunk, home, node]
    inward = gateway != device
    gathered = b.message(
        Work.GATHER, layer[inward], device[inward], gateway[inward], home[inward],
        plan.combine_bytes_LCRR[tuple(i[far][inward] for i in index)],
    )  # fmt: skip
    b.edge(done[far][inward], gathered)
    b.edge(gathered, last[inward])
    b.edge(done[far][~inward], last[~inward])
    return np.append(near[0], layer_n), np.append(near[2], home_n), np.append(direct, arrived)


def _add_kv(b: _Builder, plan: StepPlan, fronts_LR: Ints, heads_R: Ints) -> None:
    """KV caches: layer by layer when its front is done, or all of a device's when it is done."""
    if plan.overlap_kv:
        layer, source, destination = (i.astype(np.int64) for i in np.nonzero(plan.kv_bytes_LRR))
        num_bytes = plan.kv_bytes_LRR[layer, source, destination]
        before = fronts_LR[layer, source]
    else:
        total_RR = plan.kv_bytes_LRR.sum(axis=0)
        source, destination = (i.astype(np.int64) for i in np.nonzero(total_RR))
        layer, num_bytes, before = (
            np.full_like(source, plan.num_layers),
            total_RR[source, destination],
            heads_R[source],
        )
    b.edge(before, b.message(Work.KV, layer, source, destination, source, num_bytes))
