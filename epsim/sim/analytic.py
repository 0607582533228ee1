"""The closed form of a step: `simulate_analytic`, formulas over layers and pairs of devices, without events.

`simulate_layers`: the same for each layer of a plan alone, for searches that ask often.

Written apart from the event engine, as its oracle: where no two flows of an exchange (all dispatches of a layer, say)
share a link, and none waits for another or for its own messages of the layer before, the two agree to rounding. Under
contention: see `epsim.sim.closed_form`.
Letters: L MoE layers, C chunks, R devices, N nodes, X links, H hops, F flows of an exchange (R R or R N of them).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from epsim.cluster import Cluster
from epsim.errors import ScenarioError
from epsim.sim.closed_form import Network, asynchronous, send, sync, two_batch
from epsim.sim.closed_form_layers import asynchronous_layers, sync_layers, two_batch_layers
from epsim.sim.engine import collect_parts
from epsim.sim.step import Barriers, Floats, Mode, StepPlan, StepResult

_FIDELITY = ('simulation.fidelity: "analytic"', "event")


def check_closed_form(cluster: Cluster, barriers: Barriers, asked: tuple[str, str] = _FIDELITY) -> None:
    """Raise a ScenarioError where the closed form has no formula for what a cluster or a step's barriers are like.

    asked: the field and value that ask for the closed form, and what to write there instead.
    """
    for link in cluster.links:
        for field, value in (("burst", link.burst_bytes), ("ack_overhead", link.ack_overhead_frac)):
            if value > 0:
                _refuse(f'{field} (of the link "{link.name}")', asked)
    for device in cluster.devices:
        costs = {"send_overhead": device.send_overhead_s, "send_bandwidth": device.send_bytes_per_s}
        for field, cost in {**costs, "receive_overhead": device.receive_overhead_s}.items():
            if cost:
                _refuse(f"messaging.{field} (of the device {device.name})", asked)
    if barriers == "own":
        _refuse("transmission.barriers: own", asked)


def _refuse(what: str, asked: tuple[str, str] = _FIDELITY) -> NoReturn:
    raise ScenarioError(f"{asked[0]} has no formula for {what}; write {asked[1]}")


def simulate_analytic(plan: StepPlan, cluster: Cluster) -> StepResult:
    """Return the step's times by the closed form; a ScenarioError says what it does not know."""
    check_closed_form(cluster, plan.barriers)
    if plan.message_costs is not None:
        _refuse("what messages cost the devices")
    network, exchange = network_of(plan, cluster), _exchange(plan)
    formula, durations = _formula(plan, [batch.front_s_LR for batch in plan.batches])
    dispatch_LR, combine_LR, host_LR, waiting_LR, front_end_LR, device_end_s_R = formula(*durations, exchange, network)
    device_end_s_R = device_end_s_R + plan.tail_s_R
    kv_bytes_LF, ready_LF = _kv_flows(plan, front_end_LR, device_end_s_R)
    kv_arrival_FL = send(
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


_OF_LAYERS: Mapping[Mode, Callable[..., Floats]] = {
    "sync": sync_layers,
    "async": asynchronous_layers,
    "two_batch": two_batch_layers,
}


def simulate_layers(plan: StepPlan, after_s_LR: Floats, network: Network) -> Floats:
    """Return when the last device has ended each layer of a plan, were the layer a step by itself: float64 [L].

    The closed form, for plans that it knows (`check_closed_form`). vision_s_R, head_s_R, step_s_R and KV caches of the
    plan do not count. after_s_LR: what each device does after the layer and its results. network: `network_of` a plan.
    """
    fronts = []
    for batch in plan.batches:
        front_s_LR = batch.attention_s_LR + batch.dense_ffn_s_LR + batch.router_s_LR + batch.home_experts_s_LR
        fronts.append(front_s_LR + batch.pack_s_LR + (batch.copy_s_LR if plan.mode == "two_batch" else 0.0))
        after_s_LR = after_s_LR + batch.reduce_s_LR
    _, durations = _formula(plan, fronts)
    ends_s_L: Floats = _OF_LAYERS[plan.mode](*durations, _exchange(plan), network, after_s_LR)
    return ends_s_L


def _exchange(plan: StepPlan) -> tuple[Floats, ...]:
    """Return the bytes of dispatch and combine, and between nodes, [L, F, C] each."""
    names = "dispatch_bytes_LCRR", "combine_bytes_LCRR", "node_dispatch_bytes_LCRN", "node_combine_bytes_LCRN"
    if plan.second is None:
        return tuple(_by_flow(getattr(plan, name)) for name in names)
    return tuple(np.concatenate([_by_flow(getattr(batch, name)) for batch in plan.batches], axis=2) for name in names)


def _by_flow(values_LCRX: Floats) -> Floats:
    """Return [L, F, C]."""
    layers, chunks = values_LCRX.shape[:2]
    return np.ascontiguousarray(np.moveaxis(values_LCRX, 1, 3)).reshape(layers, -1, chunks)


def _formula(plan: StepPlan, fronts: Sequence[Floats]) -> tuple[Callable[..., tuple[Floats, ...]], tuple[Floats, ...]]:
    """Return the recursion of the plan's mode and the durations that it takes; fronts: [L, R] of each micro-batch.

    The recursion returns idle times by layer, when fronts end, and when devices are done.
    """
    overlapped = [batch.overlap_shared * batch.shared_s_LR for batch in plan.batches]
    experts = [
        batch.experts_copy_s_LR + batch.experts_s_LR + batch.shared_s_LR - own
        for batch, own in zip(plan.batches, overlapped, strict=True)
    ]
    if plan.mode == "async":
        local_s_LR = plan.copy_s_LR + plan.local_s_LR + plan.shared_s_LR
        remote_s_LFC = _by_flow(plan.remote_s_LCRR + plan.served_s_LCRR)
        return asynchronous, (fronts[0], plan.host_s_LR, local_s_LR, remote_s_LFC)
    if plan.mode == "sync":
        return sync, (fronts[0], plan.host_s_LR, overlapped[0], experts[0])
    return two_batch, (np.stack(fronts), plan.hosts_s_LR, np.stack(overlapped), np.stack(experts))


def network_of(plan: StepPlan, cluster: Cluster) -> Network:
    """Return what the formulas know of the network of a plan."""
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
    return Network(
        cluster.routes_RRH,
        cluster.link_payload_bytes_per_s_X,
        cluster.link_latency_s_X,
        cluster.link_message_s_X,
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
    exchange: tuple[Floats, ...], kv_bytes_LF: Floats, network: Network, num_devices: int
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
        if not bytes_LFC.any():
            continue
        np.add.at(bytes_RR, (source, destination), bytes_LFC.sum(axis=(0, 2)))
        np.add.at(messages_RR, (source, destination), (bytes_LFC > 0).sum(axis=(0, 2)))
    used = network.routes_RRH >= 0
    carried_X, messages_X = np.zeros(len(network.rate_X)), np.zeros(len(network.rate_X))
    np.add.at(carried_X, network.routes_RRH[used], np.broadcast_to(bytes_RR[:, :, None], used.shape)[used])
    np.add.at(messages_X, network.routes_RRH[used], np.broadcast_to(messages_RR[:, :, None], used.shape)[used])
    return carried_X / network.rate_X + messages_X * network.overhead_X, carried_X, bytes_RR
