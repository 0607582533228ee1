"""From a `StepPlan` to its `TaskGraph`, in the plan's mode: `build_graph`.

Work is laid out as a rank's program runs it: layer by layer, in `async` mode without a barrier between ranks. Letters:
N tasks (nodes in _LCRN), L MoE layers, C chunks, R devices.
"""

from itertools import pairwise

import numpy as np

from epsim.sim.step import StepPlan
from epsim.sim.task_graph import Floats, GraphBuilder, Ints, TaskGraph, Work


def build_graph(plan: StepPlan) -> TaskGraph:
    """Return the task graph of a step, in its mode."""
    b = GraphBuilder(plan.num_devices, plan.message_costs)
    layer_LR, device_LR = np.indices((plan.num_layers, plan.num_devices))
    fronts_LR = b.compute(Work.FRONT, layer_LR, device_LR, device_LR, plan.front_s_LR)
    device_R = device_LR[0]
    heads_R = b.compute(Work.HEAD, np.full_like(device_R, plan.num_layers), device_R, device_R, plan.tail_s_R)
    starts_LR = np.concatenate((fronts_LR, heads_R[None]))
    _add_hosts(b, plan, starts_LR)
    add = {"sync": _add_sync, "async": _add_async, "two_batch": _add_turns}[plan.mode]
    program_LXR, barriers_LX = (_add_turns if plan.barriers == "own" else add)(b, plan, starts_LR)
    return b.finish(starts_LR, program_LXR, barriers_LX, one_flow_per_pair=plan.connections == "pair")


def _add_hosts(b: GraphBuilder, plan: StepPlan, starts_LR: Ints) -> None:
    """What the host still needs to launch a layer when its front is done; the next front waits for it."""
    left_s_LR = plan.hosts_s_LR - plan.front_s_LR
    layer, device = np.nonzero(left_s_LR > 0)
    hosts = b.compute(Work.HOST, layer, plan.num_devices + device, device, left_s_LR[layer, device])
    b.edge(starts_LR[layer, device], hosts)
    b.edge(hosts, starts_LR[layer + 1, device])


def _add_experts(b: GraphBuilder, plan: StepPlan, layer_LR: Ints, device_LR: Ints) -> list[Ints]:
    """Add what a device computes between a front and the next: shared experts, if they overlap, and the routed ones."""
    if not plan.overlap_shared:
        experts_s_LR = plan.experts_s_LR + plan.shared_s_LR + plan.experts_copy_s_LR
        return [b.compute(Work.EXPERTS, layer_LR, device_LR, device_LR, experts_s_LR)]
    shared_LR = b.compute(Work.SHARED, layer_LR, device_LR, device_LR, plan.shared_s_LR)
    experts_s_LR = plan.experts_s_LR + plan.experts_copy_s_LR
    return [shared_LR, b.compute(Work.EXPERTS, layer_LR, device_LR, device_LR, experts_s_LR)]


def _add_sync(b: GraphBuilder, plan: StepPlan, starts_LR: Ints) -> tuple[Ints, Ints]:
    """Barriers between attention, dispatch, experts and combine of every layer, as collectives make them."""
    layers, devices = np.indices((plan.num_layers, plan.num_devices))
    kv = _add_kv(b, plan, starts_LR[:-1], starts_LR[-1])
    barriers_LX = b.barriers(np.indices((plan.num_layers, 4))[0])
    after_front, after_dispatch, after_experts, after_combine = barriers_LX.T
    between = _add_experts(b, plan, layers, devices)
    experts_LR = between[-1]
    b.edge(starts_LR[:-1], after_front[:, None])
    b.edge(after_front, after_dispatch)
    b.edge(after_front[:, None], between[0])
    _chain(b, between)
    b.edge(after_dispatch[:, None], experts_LR)
    b.edge(experts_LR, after_experts[:, None])
    b.edge(after_experts, after_combine)
    b.edge(after_combine[:, None], starts_LR[1:])
    _send_kv(b, plan, kv, between[0])
    ready_LR = np.broadcast_to(after_front[:, None], starts_LR[:-1].shape)
    index, delivery = _add_dispatch(b, plan, ready_LR, between[0], starts_LR[1:])
    b.edge(delivery, after_dispatch[index[0]])
    returned_layer, _, returned = _add_combine(b, plan, index, after_experts[index[0]], starts_LR[1:], starts_LR[1:])
    b.edge(returned, after_combine[returned_layer])
    return np.stack([starts_LR[:-1], *between], axis=1), barriers_LX


def _chain(b: GraphBuilder, tasks: list[Ints]) -> None:
    """Each of the tasks follows the one before it, layer by layer and device by device."""
    for before, after in pairwise(tasks):
        b.edge(before, after)


def _add_async(b: GraphBuilder, plan: StepPlan, starts_LR: Ints) -> tuple[Ints, Ints]:
    """No barrier: local experts at once, remote tokens as they arrive, results home as they are ready."""
    layers, devices = np.indices((plan.num_layers, plan.num_devices))
    kv = _add_kv(b, plan, starts_LR[:-1], starts_LR[-1])
    local_s_LR = plan.copy_s_LR + plan.local_s_LR + plan.shared_s_LR
    local_LR = b.compute(Work.EXPERTS, layers, devices, devices, local_s_LR)
    b.edge(starts_LR[:-1], local_LR)
    b.edge(local_LR, starts_LR[1:])
    _send_kv(b, plan, kv, local_LR)
    index, delivery = _add_dispatch(b, plan, starts_LR[:-1], local_LR, starts_LR[1:])
    layer, _, source, destination = index
    remote_s = plan.remote_s_LCRR[index] + plan.receive_s_R[destination] + plan.served_s_LCRR[index]
    remote = b.compute(Work.REMOTE_EXPERTS, layer, destination, source, remote_s)
    b.edge(delivery, remote)
    b.edge(local_LR[layer, destination], remote)
    b.edge(remote, starts_LR[layer + 1, destination])
    returned_layer, home, returned = _add_combine(b, plan, index, remote, starts_LR[1:], starts_LR[1:])
    b.edge(returned, starts_LR[returned_layer + 1, home])
    return np.stack([starts_LR[:-1], local_LR], axis=1), np.zeros((0, 4), dtype=np.int64)


def _add_turns(b: GraphBuilder, plan: StepPlan, starts_LR: Ints) -> tuple[Ints, Ints]:
    """The micro-batches in turn on every device, no barrier: front 1, front 2, experts 1, experts 2 of each layer.

    While one's tokens travel the other computes (DeepSeek-V3, arXiv:2412.19437, section 3.4). With only one: mode sync
    in which each rank waits for nothing but its own messages.
    """
    layers, devices = np.indices((plan.num_layers, plan.num_devices))
    starts = [starts_LR]
    if plan.second is not None:
        with b.micro_batch(1):
            second_LR = b.compute(Work.FRONT, layers, devices, devices, plan.second.front_s_LR)
        starts.append(np.concatenate((second_LR, starts_LR[-1:])))
    fronts = [starts_of_batch[:-1] for starts_of_batch in starts]
    kv = _add_kv(b, plan, fronts[-1], starts_LR[-1])
    shared, experts = [], []
    for number, part in enumerate(plan.batches):
        with b.micro_batch(number):
            *overlapped, experts_LR = _add_experts(b, part, layers, devices)
        shared.append(overlapped)
        experts.append(experts_LR)
    turns = [task for front, overlapped in zip(fronts, shared, strict=True) for task in (front, *overlapped)]
    program = [*turns, *experts]
    _chain(b, program)
    b.edge(program[-1], starts_LR[1:])

    def following(task_LR: Ints) -> Ints:
        """Return what a device does after this task of its program."""
        place = next(place for place, other_LR in enumerate(program) if other_LR is task_LR)
        return [*program, starts_LR[1:]][place + 1]

    for number, part in enumerate(plan.batches):
        with b.micro_batch(number):
            own, relayed = following(fronts[number]), starts[number][1:]
            if number == len(fronts) - 1:
                _send_kv(b, plan, kv, own)
            index, delivery = _add_dispatch(b, part, fronts[number], own, relayed)
            done = experts[number][index[0], index[3]]
            b.edge(delivery, done)
            layer, home, returned = _add_combine(b, part, index, done, following(experts[number]), relayed)
            b.edge(returned, starts[number][layer + 1, home])
    return np.stack(program, axis=1), np.zeros((0, 4), dtype=np.int64)


def _add_dispatch(
    b: GraphBuilder, plan: StepPlan, ready_LR: Ints, after_LR: Ints, relayed_LR: Ints
) -> tuple[tuple[Ints, ...], Ints]:
    """Add the dispatch messages, each after ready_LR[layer, source].

    after_LR, relayed_LR: what a device does after it has sent its tokens, and those that it passed on.
    Returns the (layer, chunk, source, destination) of every pair with traffic and, for each, the message that delivers.
    """
    index = tuple(i.astype(np.int64) for i in np.nonzero(plan.dispatch_bytes_LCRR))
    layer, _, source, destination = index
    delivery = np.empty(layer.shape, dtype=np.int64)
    far = plan.via_gateway(source, destination)
    near = tuple(i[~far] for i in index)
    direct = b.message(Work.DISPATCH, near[0], near[2], near[3], near[2], plan.dispatch_bytes_LCRR[near])
    b.edge(ready_LR[near[0], near[2]], direct)
    b.send(direct, near[1], after_LR[near[0], near[2]])
    delivery[~far] = direct
    if plan.gateway_RN is not None:
        layer_n, source_n, sent, at_gateway = _add_node_messages(
            b, plan, Work.DISPATCH, plan.node_dispatch_bytes_LCRN, after_LR
        )
        b.edge(ready_LR[layer_n, source_n], sent)
        far_index = tuple(i[far] for i in index)
        delivery[far] = _forward(b, plan, far_index, at_gateway, relayed_LR)
    return index, delivery


def _forward(b: GraphBuilder, plan: StepPlan, index: tuple[Ints, ...], at_gateway_LCRN: Ints, relayed_LR: Ints) -> Ints:
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
    b.send(sent, chunk[onward], relayed_LR[layer[onward], gateway[onward]])
    delivery[onward] = sent
    return delivery


def _add_node_messages(
    b: GraphBuilder, plan: StepPlan, work: Work, bytes_LCRN: Floats, after_LR: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """Add a message per (layer, chunk, home, node) with bytes, between home and gateway.

    Returns layer, home and id of each, and the ids as [L, C, R, N], -1 where there is no message.
    """
    assert plan.gateway_RN is not None
    layer, chunk, home, node = (i.astype(np.int64) for i in np.nonzero(bytes_LCRN))
    gateway = plan.gateway_RN[home, node].astype(np.int64)
    source, destination = (home, gateway) if work == Work.DISPATCH else (gateway, home)
    ids = b.message(work, layer, source, destination, home, bytes_LCRN[layer, chunk, home, node])
    b.send(ids, chunk, after_LR[layer, source])
    ids_LCRN = np.full(bytes_LCRN.shape, -1, dtype=np.int64)
    ids_LCRN[layer, chunk, home, node] = ids
    return layer, home, ids, ids_LCRN


def _add_combine(
    b: GraphBuilder, plan: StepPlan, index: tuple[Ints, ...], done: Ints, after_LR: Ints, relayed_LR: Ints
) -> tuple[Ints, Ints, Ints]:
    """Add the messages that bring results home, each after its `done` task.

    after_LR, relayed_LR: what a device does after it has sent its results, and as a gateway those of others.
    Returns layer, home and id of every message that arrives at a home.
    """
    layer, chunk, home, device = index
    far = plan.via_gateway(home, device)
    near = tuple(i[~far] for i in index)
    direct = b.message(Work.COMBINE, near[0], near[3], near[2], near[2], plan.combine_bytes_LCRR[near])
    b.edge(done[~far], direct)
    b.send(direct, near[1], after_LR[near[0], near[3]])
    if plan.gateway_RN is None:
        return near[0], near[2], direct
    layer_n, home_n, arrived, reduced_LCRN = _add_node_messages(
        b, plan, Work.COMBINE, plan.node_combine_bytes_LCRN, relayed_LR
    )
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
    b.send(gathered, chunk[inward], after_LR[layer[inward], device[inward]])
    b.edge(gathered, last[inward])
    b.edge(done[far][~inward], last[~inward])
    return np.append(near[0], layer_n), np.append(near[2], home_n), np.append(direct, arrived)


def _add_kv(b: GraphBuilder, plan: StepPlan, fronts_LR: Ints, heads_R: Ints) -> tuple[Ints, Ints, Ints]:
    """KV caches: layer by layer when its front is done, or all of a device's when it is done.

    Returns layer, source and id of each message.
    """
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
    sent = b.message(Work.KV, layer, source, destination, source, num_bytes)
    b.edge(before, sent)
    return layer, source, sent


def _send_kv(b: GraphBuilder, plan: StepPlan, kv: tuple[Ints, Ints, Ints], after_LR: Ints) -> None:
    """after_LR: what a device does after it has sent the KV cache of a layer, if it sends it then."""
    layer, source, sent = kv
    b.send(sent, 0, after_LR[layer, source] if plan.overlap_kv else -1)
