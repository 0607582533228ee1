"""What a step must send, read off its plan message by message: `sent_messages` and what follows from them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from epsim.cluster import Cluster
from epsim.sim import StepPlan

Message = tuple[str, int, int, float]  # exchange, source, destination, bytes


def sent_messages(plan: StepPlan) -> Iterator[Message]:
    """Yield every message of the step: out to the experts, back, and the KV caches."""
    for batch in plan.batches:
        yield from _batch_messages(batch)


def _batch_messages(plan: StepPlan) -> Iterator[Message]:
    for (layer, chunk, home, device), num_bytes in np.ndenumerate(plan.dispatch_bytes_LCRR):
        if num_bytes == 0:
            continue
        back_bytes = float(plan.combine_bytes_LCRR[layer, chunk, home, device])
        node = plan.node_of_device_R[device]
        if plan.gateway_RN is None or plan.node_of_device_R[home] == node:
            yield f"dispatch {layer}", home, device, float(num_bytes)
            yield f"combine {layer}", device, home, back_bytes
        elif plan.gateway_RN[home, node] != device:
            gateway = int(plan.gateway_RN[home, node])
            yield f"forward {layer}", gateway, device, float(num_bytes)
            yield f"gather {layer}", device, gateway, back_bytes
    if plan.gateway_RN is not None:
        for (layer, chunk, home, node), num_bytes in np.ndenumerate(plan.node_dispatch_bytes_LCRN):
            if num_bytes > 0:
                gateway = int(plan.gateway_RN[home, node])
                yield f"dispatch {layer}", home, gateway, float(num_bytes)
                back_bytes = float(plan.node_combine_bytes_LCRN[layer, chunk, home, node])
                yield f"combine {layer}", gateway, home, back_bytes
    if plan.overlap_kv:
        for (_, source, destination), num_bytes in np.ndenumerate(plan.kv_bytes_LRR):
            if num_bytes > 0:
                yield "kv", source, destination, num_bytes
    else:
        for (source, destination), num_bytes in np.ndenumerate(plan.kv_bytes_LRR.sum(axis=0)):
            if num_bytes > 0:
                yield "kv", source, destination, num_bytes


def bytes_between(plan: StepPlan) -> NDArray[np.float64]:
    """Return the bytes that go from each device to each other one, [R, R]."""
    bytes_RR = np.zeros((plan.num_devices, plan.num_devices))
    for _, source, destination, num_bytes in sent_messages(plan):
        bytes_RR[source, destination] += num_bytes
    return bytes_RR


def bytes_on_links(plan: StepPlan, cluster: Cluster) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bytes that each link carries and the seconds that it is held for them, [X] each."""
    bytes_X, held_s_X = np.zeros(len(cluster.links)), np.zeros(len(cluster.links))
    for _, source, destination, num_bytes in sent_messages(plan):
        for x in cluster.routes_RRH[source, destination]:
            if x >= 0:
                bytes_X[x] += num_bytes
                link = cluster.links[x]
                wire_bytes = num_bytes * (1 + link.frame_overhead_frac) + link.message_header_bytes
                held_s_X[x] += wire_bytes / link.bytes_per_s + link.message_overhead_s
    return bytes_X, held_s_X


def flows_meet(plan: StepPlan, cluster: Cluster) -> bool:
    """Return whether two pairs of ends, or two homes through one gateway, share a link in one exchange."""
    users: dict[tuple[str, int], set[tuple[int, int, int]]] = {}
    for exchange, source, destination, origin in _ends_with_origin(plan):
        for x in cluster.routes_RRH[source, destination]:
            if x >= 0:
                users.setdefault((exchange, int(x)), set()).add((source, destination, origin))
    return any(len(flows) > 1 for flows in users.values())


def _ends_with_origin(plan: StepPlan) -> Iterator[tuple[str, int, int, int]]:
    for exchange, source, destination, _ in sent_messages(plan):
        if not exchange.startswith(("forward", "gather")):
            yield exchange, source, destination, -1
    if plan.gateway_RN is None:
        return
    for layer, _, home, device in np.concatenate([np.argwhere(part.dispatch_bytes_LCRR) for part in plan.batches]):
        node = plan.node_of_device_R[device]
        gateway = int(plan.gateway_RN[home, node])
        if plan.node_of_device_R[home] != node and gateway != device:
            yield f"forward {layer}", gateway, int(device), int(home)
            yield f"gather {layer}", int(device), gateway, int(home)
