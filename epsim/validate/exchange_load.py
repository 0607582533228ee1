"""How long an exchange holds the links of a cluster, by epsim's simulator: `Load`, `load_of`.

The bytes go into a `StepPlan` that has nothing else, and the simulator says how long each link is held; the busiest
link is the least time that the exchange can take, and what the engines give when messages are cut finely (tested).
Letters: R devices (source, destination), N nodes, X links.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.sim import StepPlan, simulate_step
from epsim.sim.bulk import idle_plan
from epsim.traffic import MessageFormat
from epsim.validate.exchange_routing import Exchange

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an exchange asks of a cluster, with every link at the rate of its specification.

    nvlink_s, network_s: how long the busiest NVLink, and the busiest link of the network (NIC, PCIe), is held.
    latency_s: of the longest way that a message goes, by the links' latencies.
    """

    nvlink_s: float
    network_s: float
    latency_s: float


def dispatch_bytes(
    exchange: Exchange, form: MessageFormat, dedup: str, node_R: npt.NDArray[np.int64]
) -> tuple[Floats, Floats | None]:
    """Return the bytes between devices [R, R], and with dedup per node those to nodes [R, N]; dedup: none or node."""
    if dedup == "none":
        return form.dispatch_bytes(exchange.pairs_RR, exchange.pairs_RR), None
    members_RN = (node_R[:, None] == np.arange(exchange.node_tokens_RN.shape[1])).astype(np.float64)
    return (
        form.dispatch_bytes(exchange.tokens_RR, exchange.pairs_RR),
        form.dispatch_bytes(exchange.node_tokens_RN, exchange.pairs_RR @ members_RN),
    )


def combine_bytes(exchange: Exchange, form: MessageFormat, dedup: str) -> tuple[Floats, Floats | None]:
    """Return the same of a combine, by the way out: links are duplex, and the way home is the way out reversed."""
    if dedup == "none":
        return form.combine_bytes(exchange.pairs_RR), None
    return form.combine_bytes(exchange.tokens_RR), form.combine_bytes(exchange.node_tokens_RN)


def load_of(cluster: Cluster, bytes_RR: Floats, bytes_RN: Floats | None = None, num_rounds: int = 1) -> Load:
    """Return the load of messages between devices.

    bytes_RN: to each node; given, a message crosses a node boundary once, to the gateway, which passes on what bytes_RR
    says (dedup per node). num_rounds: messages that follow each other, in the latency (the steps of a ring).
    """
    result, _ = simulate_step(exchange_plan(cluster, bytes_RR, bytes_RN), cluster, "analytic")
    is_nvlink_X = np.array([link.name.startswith("nvlink") for link in cluster.links])
    busy_s_X = result.link_busy_s_X
    return Load(
        nvlink_s=float(busy_s_X[is_nvlink_X].max(initial=0.0)),
        network_s=float(busy_s_X[~is_nvlink_X].max(initial=0.0)),
        latency_s=num_rounds * _latency_s(cluster, bytes_RR, through_gateway=bytes_RN is not None),
    )


def _latency_s(cluster: Cluster, bytes_RR: Floats, through_gateway: bool) -> float:
    """Return the latency of the longest route in use; through a gateway, of the one to it and of the one from it."""
    latency_s_X = np.append(cluster.link_latency_s_X, 0.0)  # the -1 that pads a route
    latency_s_RR = latency_s_X[cluster.routes_RRH].sum(axis=2) * (bytes_RR > 0)
    if not through_gateway:
        return float(latency_s_RR.max())
    node_R = cluster.node_of_device_R
    is_near_RR = node_R[:, None] == node_R
    return float((latency_s_RR * is_near_RR).max() + (latency_s_RR * ~is_near_RR).max())


def exchange_plan(cluster: Cluster, bytes_RR: Floats, bytes_RN: Floats | None = None) -> StepPlan:
    """Return a step of one layer that only sends these bytes, as a dispatch in mode sync."""
    plan = replace(idle_plan(cluster), dispatch_bytes_LCRR=(bytes_RR * (1.0 - np.eye(cluster.num_devices)))[None, None])
    if bytes_RN is None:
        return plan
    elsewhere_RN = plan.node_of_device_R[:, None] != np.arange(cluster.num_nodes)
    return replace(plan, node_dispatch_bytes_LCRN=(bytes_RN * elsewhere_RN)[None, None], gateway_RN=cluster.gateway_RN)
