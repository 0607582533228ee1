"""The closed form of a step: `simulate_analytic`, formulas over layers and pairs of devices, without events.

Written apart from the event engine, as its oracle: where no two flows of an exchange (all dispatches of a layer, say)
share a link, and none waits for another, the two agree to rounding. Flows of an exchange that share links get, on the
link of their route that the exchange holds longest, the share of the bandwidth that their bytes are of all bytes there,
so that they end together: about right for the end of an exchange, late for its early arrivals. Flows of different
exchanges do not see each other.

A message of S equal segments over links 1..H is a tandem queue: segment k leaves link h at
D(k, h) = max(D(k - 1, h), D(k, h - 1) + latency) + held(k, h); what follows is a max-plus recursion over layers.
Letters: L MoE layers, C chunks, R devices, N nodes, X links, H hops, F flows of an exchange (R R or R N of them).
"""

from collections import namedtuple

import numba
import numpy as np

from epsim.cluster import Cluster
from epsim.sim.engine import collect_parts
from epsim.sim.step import Floats, StepPlan, StepResult

# What the compiled functions know of the network. The flows, each an int array [F]: `pair` from home to device, `node`
# from home to gateway, `forward` from gateway to device (for pair [home, device]); far_F: the pair goes by a gateway.
_Network = namedtuple(
    "_Network",
    "routes_RRH rate_X latency_X overhead_X segment_bytes "
    "home_F device_F far_F gateway_F node_F node_home_F node_gateway_F",
)


def simulate_analytic(plan: StepPlan, cluster: Cluster) -> StepResult:
    """Return the step's times by the closed form."""
    network = _network(plan, cluster)
    exchange = tuple(
        np.ascontiguousarray(np.moveaxis(bytes_LCRX, 1, 3)).reshape(plan.num_layers, -1, bytes_LCRX.shape[1])
        for bytes_LCRX in (
            plan.dispatch_bytes_LCRR,
            plan.combine_bytes_LCRR,
            plan.node_dispatch_bytes_LCRN,
            plan.node_combine_bytes_LCRN,
        )
    )
    if plan.mode == "sync":
        times = _sync(plan.front_s_LR, plan.host_s_LR, plan.experts_s_LR + plan.shared_s_LR, exchange, network)
    else:
        remote_s_LFC = np.ascontiguousarray(np.moveaxis(plan.remote_s_LCRR, 1, 3)).reshape(exchange[0].shape)
        local_s_LR = plan.copy_s_LR + plan.local_s_LR + plan.shared_s_LR
        times = _async(plan.front_s_LR, plan.host_s_LR, local_s_LR, remote_s_LFC, exchange, network)
    dispatch_LR, combine_LR, host_LR, waiting_LR, front_end_LR, device_end_s_R = times
    device_end_s_R = device_end_s_R + plan.head_s_R
    kv_bytes_LF, ready_LF = _kv_flows(plan, front_end_LR, device_end_s_R)
    kv_arrival_FL = _send(
        network.home_F,
        network.device_F,
        np.ascontiguousarray(ready_LF.T),
        np.ascontiguousarray(kv_bytes_LF.T),
        network,
    )
    busy_s_X, carried_X, delivered_bytes_RR = _totals(exchange, kv_bytes_LF, network, plan.num_devices)
    return StepResult(
        end_s=float(device_end_s_R.max()),
        kv_end_s=float(kv_arrival_FL.max(initial=0.0)),
        parts_s_PR=collect_parts(plan, dispatch_LR, combine_LR, host_LR, waiting_LR, device_end_s_R),
        link_busy_s_X=busy_s_X,
        link_bytes_X=carried_X,
        delivered_bytes_RR=delivered_bytes_RR,
        contended=None,
    )


def _network(plan: StepPlan, cluster: Cluster) -> _Network:
    home_RR, device_RR = np.indices((plan.num_devices, plan.num_devices))
    node_R, gateway_RN = plan.node_of_device_R, plan.gateway_RN
    far_RR = plan.via_gateway(home_RR, device_RR)
    if gateway_RN is None:
        gateway_RN = np.zeros((plan.num_devices, plan.node_dispatch_bytes_LCRN.shape[3]), dtype=np.int32)
    node_RR = np.broadcast_to(node_R, home_RR.shape)
    flows = (
        home_RR,
        device_RR,
        far_RR,
        np.take_along_axis(gateway_RN, node_RR, axis=1) if plan.gateway_RN is not None else device_RR,
        home_RR * gateway_RN.shape[1] + node_RR,
        np.indices(gateway_RN.shape)[0],
        gateway_RN,
    )
    return _Network(
        cluster.routes_RRH,
        cluster.link_bytes_per_s_X,
        cluster.link_latency_s_X,
        cluster.link_message_overhead_s_X,
        float(cluster.segment_bytes),
        *(np.ascontiguousarray(flow, dtype=bool if flow is far_RR else np.int64).reshape(-1) for flow in flows),
    )


def _kv_flows(plan: StepPlan, front_end_LR: Floats, device_end_s_R: Floats) -> tuple[Floats, Floats]:
    """Return bytes and release times of the KV messages [messages of a flow, F]: by layer, or all at the end."""
    kv_bytes_LRR, ready_LR = plan.kv_bytes_LRR, front_end_LR
    if not plan.overlap_kv:
        kv_bytes_LRR, ready_LR = kv_bytes_LRR.sum(axis=0, keepdims=True), device_end_s_R[None]
    ready_LRR = np.broadcast_to(ready_LR[:, :, None], kv_bytes_LRR.shape)
    return kv_bytes_LRR.reshape(len(ready_LR), -1), ready_LRR.reshape(len(ready_LR), -1)


def _totals(
    exchange: tuple[Floats, ...], kv_bytes_LF: Floats, network: _Network, num_devices: int
) -> tuple[Floats, ...]:
    """Return the time that each link is held, the bytes it carries, and the bytes delivered between devices."""
    out, back, node_out, node_back = exchange
    near, inner = ~network.far_F, network.far_F & (network.gateway_F != network.device_F)
    home, device, gateway = network.home_F, network.device_F, network.gateway_F
    sent = [
        (home[near], device[near], out[:, near]),
        (device[near], home[near], back[:, near]),
        (gateway[inner], device[inner], out[:, inner]),
        (device[inner], gateway[inner], back[:, inner]),
        (network.node_home_F, network.node_gateway_F, node_out),
        (network.node_gateway_F, network.node_home_F, node_back),
        (home, device, kv_bytes_LF[:, :, None]),
    ]
    bytes_RR, messages_RR = np.zeros((num_devices, num_devices)), np.zeros((num_devices, num_devices))
    for source, destination, bytes_LFC in sent:
        np.add.at(bytes_RR, (source, destination), bytes_LFC.sum(axis=(0, 2)))
        np.add.at(messages_RR, (source, destination), (bytes_LFC > 0).sum(axis=(0, 2)))
    used = network.routes_RRH >= 0
    carried_X, messages_X = np.zeros(len(network.rate_X)), np.zeros(len(network.rate_X))
    np.add.at(carried_X, network.routes_RRH[used], np.broadcast_to(bytes_RR[:, :, None], used.shape)[used])
    np.add.at(messages_X, network.routes_RRH[used], np.broadcast_to(messages_RR[:, :, None], used.shape)[used])
    return carried_X / network.rate_X + messages_X * network.overhead_X, carried_X, bytes_RR


@numba.njit(cache=True)
def _send(source_F, destination_F, release_FC, bytes_FC, network):  # type: ignore[no-untyped-def]
    """One exchange: return when each message arrives [F, C]; the messages of a flow leave one after the other."""
    num_flows, num_chunks = bytes_FC.shape
    bytes_F, messages_F = np.zeros(num_flows), np.zeros(num_flows)
    load_X, messages_X = np.zeros(len(network.rate_X)), np.zeros(len(network.rate_X))
    for f in range(num_flows):
        for c in range(num_chunks):
            bytes_F[f] += bytes_FC[f, c]
            messages_F[f] += bytes_FC[f, c] > 0
        if messages_F[f] > 0:
            for link in network.routes_RRH[source_F[f], destination_F[f]]:
                if link >= 0:
                    load_X[link] += bytes_F[f]
                    messages_X[link] += messages_F[f]
    arrival_FC = np.zeros(bytes_FC.shape)
    free_H = np.empty(network.routes_RRH.shape[2])
    for f in range(num_flows):
        if messages_F[f] == 0:
            continue
        route_H = network.routes_RRH[source_F[f], destination_F[f]]
        narrow, longest_s = 0, 0.0
        for hop in range(len(route_H)):
            link = route_H[hop]
            if link >= 0:
                held_s = load_X[link] / network.rate_X[link] + messages_X[link] * network.overhead_X[link]
                if held_s > longest_s:
                    narrow, longest_s = hop, held_s
        crowd = load_X[route_H[narrow]] / bytes_F[f]
        message_crowd = messages_X[route_H[narrow]] / messages_F[f]
        free_H[:] = 0.0
        for c in np.argsort(release_FC[f], kind="mergesort") if num_chunks > 1 else np.zeros(1, np.int64):
            if bytes_FC[f, c] > 0:
                arrival_FC[f, c] = _tandem(
                    release_FC[f, c], bytes_FC[f, c], route_H, free_H, narrow, crowd, message_crowd, network
                )
    return arrival_FC


@numba.njit(cache=True)
def _tandem(release_s, num_bytes, route_H, free_H, narrow, crowd, message_crowd, network):  # type: ignore[no-untyped-def]
    """Return when a message arrives; free_H, when its flow last left each hop, is brought up to date.

    crowd: at the narrow hop, where the exchange takes longest, all its bytes over those of this flow (1 when the flow
    is alone); message_crowd: the same of messages.
    """
    num_segments = max(1, int(np.ceil(num_bytes / network.segment_bytes)))
    segment_bytes = num_bytes / num_segments
    at = release_s
    for k in range(num_segments):
        at = release_s
        for hop in range(len(route_H)):
            link = route_H[hop]
            if link < 0:
                break
            held_s = segment_bytes / network.rate_X[link]
            overhead_s = network.overhead_X[link] if k == 0 else 0.0
            if hop == narrow:
                held_s, overhead_s = held_s * crowd, overhead_s * message_crowd
            free_H[hop] = max(free_H[hop], at) + (held_s + overhead_s)
            at = free_H[hop] + network.latency_X[link]
    return at


@numba.njit(cache=True)
def _split(bytes_FC, near_F):  # type: ignore[no-untyped-def]
    """Return bytes_FC with the flows outside near_F set to zero."""
    near_FC = bytes_FC.copy()
    for f in range(len(near_F)):
        if not near_F[f]:
            near_FC[f] = 0.0
    return near_FC


@numba.njit(cache=True)
def _dispatch(ready_R, out_FC, node_out_FC, network):  # type: ignore[no-untyped-def]
    """Return when the tokens of each (home, device) pair and chunk are on the device, [R R, C]."""
    release_FC = np.zeros(out_FC.shape)
    for f in range(len(release_FC)):
        release_FC[f] = ready_R[network.home_F[f]]
    arrival_FC = _send(network.home_F, network.device_F, release_FC, _split(out_FC, ~network.far_F), network)
    if not network.far_F.any():
        return arrival_FC
    node_release_FC = np.zeros(node_out_FC.shape)
    for f in range(len(node_release_FC)):
        node_release_FC[f] = ready_R[network.node_home_F[f]]
    at_gateway_FC = _send(network.node_home_F, network.node_gateway_F, node_release_FC, node_out_FC, network)
    onward_F = network.far_F & (network.gateway_F != network.device_F)
    for f in range(len(arrival_FC)):
        if network.far_F[f]:
            release_FC[f] = at_gateway_FC[network.node_F[f]]
            arrival_FC[f] = release_FC[f]
    onward_FC = _send(network.gateway_F, network.device_F, release_FC, _split(out_FC, onward_F), network)
    for f in range(len(arrival_FC)):
        if onward_F[f]:
            arrival_FC[f] = onward_FC[f]
    return arrival_FC


@numba.njit(cache=True)
def _combine(done_FC, back_FC, node_back_FC, network, back_R):  # type: ignore[no-untyped-def]
    """Raise back_R[home] to when the last result of the home's tokens is back; done_FC: when each was computed."""
    arrival_FC = _send(network.device_F, network.home_F, done_FC, _split(back_FC, ~network.far_F), network)
    for f in range(len(arrival_FC)):
        if not network.far_F[f]:
            home = network.home_F[f]
            back_R[home] = max(back_R[home], arrival_FC[f].max())
    if not network.far_F.any():
        return
    inward_F = network.far_F & (network.gateway_F != network.device_F)
    gathered_FC = _send(network.device_F, network.gateway_F, done_FC, _split(back_FC, inward_F), network)
    node_ready_FC = np.zeros(node_back_FC.shape)
    for f in range(len(done_FC)):
        for c in range(done_FC.shape[1]):
            if network.far_F[f] and back_FC[f, c] > 0:
                there = gathered_FC[f, c] if inward_F[f] else done_FC[f, c]
                node_ready_FC[network.node_F[f], c] = max(node_ready_FC[network.node_F[f], c], there)
    returned_FC = _send(network.node_gateway_F, network.node_home_F, node_ready_FC, node_back_FC, network)
    for f in range(len(returned_FC)):
        home = network.node_home_F[f]
        back_R[home] = max(back_R[home], returned_FC[f].max())


@numba.njit(cache=True)
def _sync(front_s_LR, host_s_LR, experts_s_LR, exchange, network):  # type: ignore[no-untyped-def]
    """Barriers after attention, dispatch, experts and combine: each part takes as long as its slowest."""
    num_layers, num_devices = front_s_LR.shape
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    dispatch_LR, combine_LR, host_LR, waiting_LR = np.zeros((4, num_layers, num_devices))
    front_end_LR = np.zeros((num_layers, num_devices))
    start_R = np.zeros(num_devices)
    for layer in range(num_layers):
        front_end_LR[layer] = start_R + front_s_LR[layer]
        fronts_s = front_end_LR[layer].max()
        arrival_FC = _dispatch(np.full(num_devices, fronts_s), out_LFC[layer], node_out_LFC[layer], network)
        dispatched_s = max(fronts_s, arrival_FC.max())
        experts_end_R = dispatched_s + experts_s_LR[layer]
        experts_s = experts_end_R.max()
        back_R = np.full(num_devices, experts_s)
        _combine(np.full(out_LFC[layer].shape, experts_s), back_LFC[layer], node_back_LFC[layer], network, back_R)
        combined_s = back_R.max()
        dispatch_LR[layer] = dispatched_s - fronts_s
        combine_LR[layer] = combined_s - experts_s
        waiting_LR[layer] = (fronts_s - front_end_LR[layer]) + (experts_s - experts_end_R)
        start_R = np.maximum(combined_s, start_R + host_s_LR[layer])
        host_LR[layer] = start_R - combined_s
    return dispatch_LR, combine_LR, host_LR, waiting_LR, front_end_LR, start_R


@numba.njit(cache=True)
def _async(front_s_LR, host_s_LR, local_s_LR, remote_s_LFC, exchange, network):  # type: ignore[no-untyped-def]
    """Local experts at once, then what has arrived, in that order; the next layer when all is back and served."""
    num_layers, num_devices = front_s_LR.shape
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    num_chunks = out_LFC.shape[2]
    dispatch_LR, combine_LR, host_LR = np.zeros((3, num_layers, num_devices))
    front_end_LR = np.zeros((num_layers, num_devices))
    now_R = np.zeros(num_devices)
    for layer in range(num_layers):
        front_end_LR[layer] = now_R + front_s_LR[layer]
        arrival_FC = _dispatch(front_end_LR[layer], out_LFC[layer], node_out_LFC[layer], network)
        busy_until_R = front_end_LR[layer] + local_s_LR[layer]
        done_FC = np.zeros(arrival_FC.shape)
        # Single-server queue in order of arrival (Lindley's recursion); ties by chunk, then home, as the ids fall.
        for device in range(num_devices):
            queue = np.full((num_devices, num_chunks), np.inf)
            for f in range(len(arrival_FC)):
                if network.device_F[f] == device:
                    for c in range(num_chunks):
                        if out_LFC[layer, f, c] > 0:
                            queue[network.home_F[f], c] = arrival_FC[f, c]
            for item in np.argsort(queue.T.copy().reshape(-1), kind="mergesort"):
                c, home = item // num_devices, item % num_devices
                if queue[home, c] < np.inf:
                    f = home * num_devices + device
                    begin_s = max(busy_until_R[device], queue[home, c])
                    dispatch_LR[layer, device] += begin_s - busy_until_R[device]
                    busy_until_R[device] = begin_s + remote_s_LFC[layer, f, c]
                    done_FC[f, c] = busy_until_R[device]
        back_R = busy_until_R.copy()
        _combine(done_FC, back_LFC[layer], node_back_LFC[layer], network, back_R)
        combine_LR[layer] = back_R - busy_until_R
        now_R = np.maximum(back_R, now_R + host_s_LR[layer])
        host_LR[layer] = now_R - back_R
    return dispatch_LR, combine_LR, host_LR, np.zeros((num_layers, num_devices)), front_end_LR, now_R
