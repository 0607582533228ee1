"""The closed form's formulas, compiled: arrivals of an exchange, and max-plus recursions over the layers of a mode.

Flows of an exchange that share links get, on the link of their route that the exchange holds longest, the share of the
bandwidth that their bytes are of all bytes there, so that they end together: about right for the end of an exchange,
late for its early arrivals. Flows of different exchanges do not see each other.

A message of S equal segments over links 1..H is a tandem queue: segment k leaves link h at
D(k, h) = max(D(k - 1, h), D(k, h - 1) + latency) + held(k, h).
Letters: L MoE layers, C chunks (messages of a flow in one exchange, or the two micro-batches), R devices, N nodes,
X links, H hops, F flows of an exchange (R R or R N of them).
"""

from collections import namedtuple

import numba
import numpy as np

# What the compiled functions know of the network. The flows, each an int array [F]: `pair` from home to device, `node`
# from home to gateway, `forward` from gateway to device (for pair [home, device]); far_F: the pair goes by a gateway.
Network = namedtuple(
    "Network",
    "routes_RRH rate_X latency_X overhead_X segment_bytes "
    "home_F device_F far_F gateway_F node_F node_home_F node_gateway_F",
)


@numba.njit(cache=True)
def send(source_F, destination_F, release_FC, bytes_FC, network):  # type: ignore[no-untyped-def]
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
def _dispatch(ready_RC, out_FC, node_out_FC, network):  # type: ignore[no-untyped-def]
    """Return when the tokens of each (home, device) pair and chunk are on the device, [R R, C]."""
    release_FC = np.zeros(out_FC.shape)
    for f in range(len(release_FC)):
        release_FC[f] = ready_RC[network.home_F[f]]
    arrival_FC = send(network.home_F, network.device_F, release_FC, _split(out_FC, ~network.far_F), network)
    if not network.far_F.any():
        return arrival_FC
    node_release_FC = np.zeros(node_out_FC.shape)
    for f in range(len(node_release_FC)):
        node_release_FC[f] = ready_RC[network.node_home_F[f]]
    at_gateway_FC = send(network.node_home_F, network.node_gateway_F, node_release_FC, node_out_FC, network)
    onward_F = network.far_F & (network.gateway_F != network.device_F)
    for f in range(len(arrival_FC)):
        if network.far_F[f]:
            release_FC[f] = at_gateway_FC[network.node_F[f]]
            arrival_FC[f] = release_FC[f]
    onward_FC = send(network.gateway_F, network.device_F, release_FC, _split(out_FC, onward_F), network)
    for f in range(len(arrival_FC)):
        if onward_F[f]:
            arrival_FC[f] = onward_FC[f]
    return arrival_FC


@numba.njit(cache=True)
def _combine(done_FC, back_FC, node_back_FC, network, back_RC):  # type: ignore[no-untyped-def]
    """Raise back_RC[home] to when the last result of a chunk is back; done_FC: when each was computed."""
    arrival_FC = send(network.device_F, network.home_F, done_FC, _split(back_FC, ~network.far_F), network)
    for f in range(len(arrival_FC)):
        if not network.far_F[f]:
            home = network.home_F[f]
            back_RC[home] = np.maximum(back_RC[home], arrival_FC[f])
    if not network.far_F.any():
        return
    inward_F = network.far_F & (network.gateway_F != network.device_F)
    gathered_FC = send(network.device_F, network.gateway_F, done_FC, _split(back_FC, inward_F), network)
    node_ready_FC = np.zeros(node_back_FC.shape)
    for f in range(len(done_FC)):
        for c in range(done_FC.shape[1]):
            if network.far_F[f] and back_FC[f, c] > 0:
                there = gathered_FC[f, c] if inward_F[f] else done_FC[f, c]
                node_ready_FC[network.node_F[f], c] = max(node_ready_FC[network.node_F[f], c], there)
    returned_FC = send(network.node_gateway_F, network.node_home_F, node_ready_FC, node_back_FC, network)
    for f in range(len(returned_FC)):
        home = network.node_home_F[f]
        back_RC[home] = np.maximum(back_RC[home], returned_FC[f])


@numba.njit(cache=True)
def sync(front_s_LR, host_s_LR, shared_s_LR, experts_s_LR, exchange, network):  # type: ignore[no-untyped-def]
    """Barriers after attention, dispatch, experts and combine: each part takes as long as its slowest.

    shared_s_LR: computed while the dispatch travels.
    """
    num_layers, num_devices = front_s_LR.shape
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    dispatch_LR, combine_LR, host_LR, waiting_LR = np.zeros((4, num_layers, num_devices))
    front_end_LR = np.zeros((num_layers, num_devices))
    start_R = np.zeros(num_devices)
    for layer in range(num_layers):
        front_end_LR[layer] = start_R + front_s_LR[layer]
        fronts_s = front_end_LR[layer].max()
        arrival_FC = _dispatch(np.full((num_devices, 1), fronts_s), out_LFC[layer], node_out_LFC[layer], network)
        dispatched_s = max(fronts_s, arrival_FC.max())
        experts_start_R = np.maximum(dispatched_s, fronts_s + shared_s_LR[layer])
        experts_end_R = experts_start_R + experts_s_LR[layer]
        experts_s = experts_end_R.max()
        back_RC = np.full((num_devices, 1), experts_s)
        _combine(np.full(out_LFC[layer].shape, experts_s), back_LFC[layer], node_back_LFC[layer], network, back_RC)
        combined_s = back_RC.max()
        dispatch_LR[layer] = experts_start_R - fronts_s - shared_s_LR[layer]
        combine_LR[layer] = combined_s - experts_s
        waiting_LR[layer] = (fronts_s - front_end_LR[layer]) + (experts_s - experts_end_R)
        start_R = np.maximum(combined_s, start_R + host_s_LR[layer])
        host_LR[layer] = start_R - combined_s
    return dispatch_LR, combine_LR, host_LR, waiting_LR, front_end_LR, start_R


@numba.njit(cache=True)
def asynchronous(front_s_LR, host_s_LR, local_s_LR, remote_s_LFC, exchange, network):  # type: ignore[no-untyped-def]
    """Local experts at once, then what has arrived, in that order; the next layer when all is back and served."""
    num_layers, num_devices = front_s_LR.shape
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    num_chunks = out_LFC.shape[2]
    dispatch_LR, combine_LR, host_LR = np.zeros((3, num_layers, num_devices))
    front_end_LR = np.zeros((num_layers, num_devices))
    now_R = np.zeros(num_devices)
    for layer in range(num_layers):
        front_end_LR[layer] = now_R + front_s_LR[layer]
        ready_RC = np.repeat(front_end_LR[layer], num_chunks).reshape(num_devices, num_chunks)
        arrival_FC = _dispatch(ready_RC, out_LFC[layer], node_out_LFC[layer], network)
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
        back_RC = np.repeat(busy_until_R, num_chunks).reshape(num_devices, num_chunks)
        _combine(done_FC, back_LFC[layer], node_back_LFC[layer], network, back_RC)
        back_R = np.array([back_RC[device].max() for device in range(num_devices)])
        combine_LR[layer] = back_R - busy_until_R
        now_R = np.maximum(back_R, now_R + host_s_LR[layer])
        host_LR[layer] = now_R - back_R
    return dispatch_LR, combine_LR, host_LR, np.zeros((num_layers, num_devices)), front_end_LR, now_R


@numba.njit(cache=True)
def two_batch(front_s_CLR, host_s_LR, shared_s_CLR, experts_s_CLR, exchange, network):  # type: ignore[no-untyped-def]
    """Front 1, front 2, experts 1, experts 2 in turn on each device; C are the two micro-batches.

    shared_s_CLR: computed after the front of their micro-batch, while its dispatch travels.
    """
    _, num_layers, num_devices = front_s_CLR.shape
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    dispatch_LR, combine_LR, host_LR = np.zeros((3, num_layers, num_devices))
    front_end_LR = np.zeros((num_layers, num_devices))
    start_R, ready_RC, back_RC = np.zeros(num_devices), np.zeros((num_devices, 2)), np.zeros((num_devices, 2))
    for layer in range(num_layers):
        busy_until_R = start_R.copy()
        for c in range(2):
            begin_R = np.maximum(busy_until_R, back_RC[:, c])  # for c = 0 the start has waited for it
            combine_LR[layer] += begin_R - busy_until_R
            ready_RC[:, c] = begin_R + front_s_CLR[c, layer]
            busy_until_R = ready_RC[:, c] + shared_s_CLR[c, layer]
        front_end_LR[layer] = ready_RC[:, 1]
        arrival_FC = _dispatch(ready_RC, out_LFC[layer], node_out_LFC[layer], network)
        done_FC = np.zeros(arrival_FC.shape)
        for c in range(2):
            begin_R = busy_until_R.copy()
            for f in range(len(arrival_FC)):
                if out_LFC[layer, f, c] > 0:
                    begin_R[network.device_F[f]] = max(begin_R[network.device_F[f]], arrival_FC[f, c])
            dispatch_LR[layer] += begin_R - busy_until_R
            busy_until_R = begin_R + experts_s_CLR[c, layer]
            for f in range(len(arrival_FC)):
                done_FC[f, c] = busy_until_R[network.device_F[f]]
            back_RC[:, c] = busy_until_R
        _combine(done_FC, back_LFC[layer], node_back_LFC[layer], network, back_RC)
        free_R = np.maximum(busy_until_R, back_RC[:, 0])
        if layer == num_layers - 1:
            free_R = np.maximum(free_R, back_RC[:, 1])
        combine_LR[layer] += free_R - busy_until_R
        start_R = np.maximum(free_R, start_R + host_s_LR[layer])
        host_LR[layer] = start_R - free_R
    return dispatch_LR, combine_LR, host_LR, np.zeros((num_layers, num_devices)), front_end_LR, start_R
