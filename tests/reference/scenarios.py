"""Random clusters and steps for the simulator: `mesh`, `fabric`, `random_plan`, `routed_plan`.

Times are around a second and messages some segments long, so that compute, links, latencies and overheads all count.
Letters as in `epsim.sim.step`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference.tiny import device_type, link, make_cluster, tiny_model

from epsim.cluster import Cluster
from epsim.cost import HomeWork, RooflineCost
from epsim.model import Moe
from epsim.placement import Placement
from epsim.sim import StepPlan, StepPlanner, Transmission
from epsim.sim.step import Mode
from epsim.traffic import Dedup, MessageFormat, TrafficCounter

Rng = np.random.Generator
Floats = NDArray[np.float64]
SEGMENT_BYTES = 10.0


def random_nodes(rng: Rng, num_devices: int, num_nodes: int) -> list[int]:
    """Return a node for each device, every node used, in any order."""
    spare = rng.integers(0, num_nodes, num_devices - num_nodes)
    return [int(node) for node in rng.permutation(np.append(np.arange(num_nodes), spare))]


def _device_types(rng: Rng, num_devices: int, staging: bool) -> list[dict[str, Any]]:
    return [
        device_type(
            memory_bandwidth=float(rng.uniform(50, 500)),
            flops={"bf16": float(rng.uniform(200, 2000))},
            launch_overhead=float(rng.choice([0.0, 0.01])),
            expert_overhead=float(rng.choice([0.0, 0.02])),
            layer_overhead=float(rng.choice([0.0, 1.0])),
            request_overhead=float(rng.choice([0.0, 0.02])),
            efficiency_exponent=float(rng.choice([0.0, 0.3])),
            barrier_slowdown=float(rng.choice([0.0, 0.1])),
            transfer_overlap=float(rng.choice([0.2, 1.0])),
            staging={"bandwidth": float(rng.uniform(20, 200)), "message_overhead": float(rng.choice([0.0, 0.03]))}
            if staging
            else None,
        )
        for _ in range(num_devices)
    ]


def _with_messaging(rng: Rng, types: list[dict[str, Any]], *, closed_form: bool) -> list[dict[str, Any]]:
    """Return device types on which messages and the end of a step cost something, or only what the closed form has."""
    costs: list[dict[str, Any]] = [{"background_bandwidth": float(rng.uniform(50, 500))} for _ in types]
    if not closed_form:
        for cost in costs:
            cost["send_overhead"] = float(rng.choice([0.0, rng.uniform(0, 0.3)]))
            cost["send_bandwidth"] = float(rng.uniform(30, 300)) if rng.random() < 0.7 else None
            cost["receive_overhead"] = float(rng.choice([0.0, rng.uniform(0, 0.3)]))
    step_s = [float(rng.choice([0.0, 0.5])) for _ in types]
    return [
        {**fields, "messaging": cost, "step_overhead": seconds}
        for fields, cost, seconds in zip(types, costs, step_s, strict=True)
    ]


def _random_link(rng: Rng, source: str, target: str) -> dict[str, Any]:
    bandwidth, latency = np.exp(rng.uniform(np.log(5), np.log(500))), rng.choice([0.0, rng.uniform(0, 0.5)])
    overhead = rng.choice([0.0, rng.uniform(0, 0.2)])
    return link(source, target, float(bandwidth), float(latency), message_overhead=float(overhead), duplex=False)


def _framed(rng: Rng, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the link with random framing and headers."""
    framing = {"frame_overhead": rng.choice([0.0, rng.uniform(0, 1)]), "message_header": rng.choice([0.0, 4.0])}
    return {**fields, **{name: float(value) for name, value in framing.items()}}


def _shaped(rng: Rng, fields: dict[str, Any]) -> dict[str, Any]:
    """Return a link in both directions with all that a transport may do to it, some of it at random."""
    shaping = {"burst": rng.choice([0.0, rng.uniform(0, 40)]), "ack_overhead": rng.choice([0.0, rng.uniform(0, 1)])}
    return {**_framed(rng, fields), **{name: float(value) for name, value in shaping.items()}, "duplex": True}


def mesh(rng: Rng, num_devices: int, num_nodes: int, staging: bool = False, *, framed: bool = False) -> Cluster:
    """Return devices with a link of its own for each ordered pair (and host staging in front, where asked for).

    framed: with all terms of a transport that the closed form has, on links and devices.
    """
    links = [_random_link(rng, f"d{s}", f"d{d}") for s in range(num_devices) for d in range(num_devices) if s != d]
    if framed:
        links = [_framed(rng, fields) for fields in links]
    types = _device_types(rng, num_devices, staging)
    return make_cluster(
        _with_messaging(rng, types, closed_form=True) if framed else types,
        links,
        nodes=random_nodes(rng, num_devices, num_nodes),
        segment_bytes=SEGMENT_BYTES * float(rng.uniform(0.3, 3)),
    )


def fabric(rng: Rng, num_devices: int, num_nodes: int, staging: bool = False, *, shaped: bool = False) -> Cluster:
    """Return nodes with an inner switch and one uplink each to a spine: ports and uplinks are shared.

    shaped: links have both directions alike, with framing, bursts and acknowledgements; messages cost the devices time.
    """
    nodes = random_nodes(rng, num_devices, num_nodes)
    ends = [(f"d{r}", f"leaf{node}") for r, node in enumerate(nodes)]
    ends += [(f"leaf{node}", "spine") for node in range(num_nodes)]
    links = [_random_link(rng, *way) for pair in ends for way in (pair, pair[::-1])]
    if shaped:
        links = [_shaped(rng, fields) for fields in links[::2]]
    types = _device_types(rng, num_devices, staging)
    return make_cluster(
        _with_messaging(rng, types, closed_form=False) if shaped else types,
        links,
        nodes=nodes,
        switches=("spine", *(f"leaf{node}" for node in range(num_nodes))),
        segment_bytes=SEGMENT_BYTES * float(rng.uniform(0.3, 3)),
    )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a random step is like. homes: devices with tokens. density: how many pairs have traffic in a layer."""

    mode: Mode
    dedup: Dedup
    num_layers: int
    num_chunks: int
    num_homes: int
    density: float
    kv: bool
    overlap_kv: bool
    some_zeros: bool
    overlap_shared: bool


def random_plan(rng: Rng, cluster: Cluster, shape: Shape) -> StepPlan:
    """Return a step with random durations and bytes, not tied to any routing."""
    plan = _random_plan(rng, cluster, shape)
    if shape.mode != "two_batch":
        return plan
    idle = np.zeros(cluster.num_devices)
    second = _random_plan(rng, cluster, replace(shape, kv=False))
    return replace(plan, second=replace(second, vision_s_R=idle, head_s_R=idle))


def _random_plan(rng: Rng, cluster: Cluster, shape: Shape) -> StepPlan:
    num_devices, num_nodes = cluster.num_devices, cluster.num_nodes
    layers, chunks = shape.num_layers, shape.num_chunks
    node_R = cluster.node_of_device_R.astype(np.int32)
    homes = rng.permutation(num_devices)[: shape.num_homes]
    sends_LCRR = rng.random((layers, chunks, num_devices, num_devices)) < shape.density
    sends_LCRR &= np.isin(np.arange(num_devices), homes)[:, None] & ~np.eye(num_devices, dtype=bool)
    to_node_LCRN = np.stack([sends_LCRR[..., node_R == n].any(axis=-1) for n in range(num_nodes)], axis=-1)
    by_node = shape.dedup == "node"
    to_node_LCRN &= (node_R[:, None] != np.arange(num_nodes)) & by_node

    def durations(*shape_: int) -> Floats:
        kept = rng.random(shape_) < 0.8 if shape.some_zeros else np.ones(shape_)
        return rng.uniform(0.01, 2.0, shape_) * kept

    def message_bytes(sent: NDArray[np.bool_]) -> Floats:
        return np.where(sent, rng.uniform(0.1, 4.5, sent.shape) * SEGMENT_BYTES, 0.0)

    kv_LRR = rng.random((layers, num_devices, num_devices)) < (shape.density if shape.kv else 0.0)
    return StepPlan(
        mode=shape.mode,
        vision_s_R=durations(num_devices),
        attention_s_LR=durations(layers, num_devices),
        dense_ffn_s_LR=durations(layers, num_devices) * (np.arange(layers) == 0)[:, None],
        router_s_LR=durations(layers, num_devices),
        home_experts_s_LR=durations(layers, num_devices) * rng.choice([0.0, 1.0]),
        shared_s_LR=durations(layers, num_devices),
        host_s_LR=durations(layers, num_devices) * rng.choice([0.0, 5.0]),
        copy_s_LR=durations(layers, num_devices) * (shape.mode == "async"),
        pack_s_LR=durations(layers, num_devices),
        reduce_s_LR=durations(layers, num_devices),
        experts_s_LR=durations(layers, num_devices),
        local_s_LR=durations(layers, num_devices),
        remote_s_LCRR=durations(*sends_LCRR.shape) * sends_LCRR,
        head_s_R=durations(num_devices),
        dispatch_bytes_LCRR=message_bytes(sends_LCRR),
        combine_bytes_LCRR=message_bytes(sends_LCRR),
        node_dispatch_bytes_LCRN=message_bytes(to_node_LCRN),
        node_combine_bytes_LCRN=message_bytes(to_node_LCRN),
        gateway_RN=gateways(cluster) if by_node else None,
        node_of_device_R=node_R,
        kv_bytes_LRR=message_bytes(kv_LRR & ~np.eye(num_devices, dtype=bool)),
        overlap_kv=shape.overlap_kv,
        overlap_shared=shape.overlap_shared,
        serve_s_LCRR=durations(*sends_LCRR.shape) * sends_LCRR,
    )


def gateways(cluster: Cluster) -> NDArray[np.int32]:
    """Return the gateway of each device into each node, int32 [R, N]."""
    table = [[cluster.gateway(r, n) for n in range(cluster.num_nodes)] for r in range(cluster.num_devices)]
    return np.array(table, dtype=np.int32)


def routed_plan(rng: Rng, cluster: Cluster, shape: Shape) -> StepPlan:
    """Return a step planned from the random routing of a few tokens over the tiny model, two experts a device."""
    num_devices, num_experts = cluster.num_devices, 2 * cluster.num_devices
    topk = int(rng.integers(1, min(num_experts, 4) + 1))
    num_dense = int(rng.integers(0, 2))
    model = tiny_model(
        num_layers=num_dense + shape.num_layers,
        dense_ffn_size=4 if num_dense else None,
        moe=Moe(num_experts=num_experts, topk=topk, expert_ffn_size=2, num_dense_layers=num_dense),
    )
    placement = Placement(
        policy="test",
        num_experts=num_experts,
        physical_to_logical_LP=rng.permuted(
            np.tile(np.arange(num_experts, dtype=np.int32), (shape.num_layers, 1)), axis=1
        ),
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
    )
    num_tokens = max(1, int(np.ceil(shape.density * 12)))
    ids_TLE = np.argsort(rng.random((num_tokens, shape.num_layers, num_experts)), axis=2)
    home_T = rng.choice(rng.permutation(num_devices)[: shape.num_homes], num_tokens).astype(np.int32)
    home_T.sort()
    counter = TrafficCounter(placement, 2 if shape.mode == "two_batch" else shape.num_chunks)
    traffic = counter.count(ids_TLE[:, :, :topk].astype(np.uint8), home_T)
    decode, works = bool(rng.integers(0, 2)), []
    for batch in range(2 if shape.mode == "two_batch" else 1):
        own_T = counter.chunk_of_token_T(home_T) == batch if shape.mode == "two_batch" else np.ones_like(home_T, bool)
        tokens_R = np.bincount(home_T[own_T], minlength=num_devices)
        works.append(
            HomeWork(
                decode=decode,
                tokens_R=tokens_R,
                requests_R=tokens_R,
                kv_tokens_R=5 * tokens_R,
                attention_pairs_R=7 * tokens_R,
                images_R=0 * tokens_R,
                outputs_R=(1 - batch) * np.bincount(home_T, minlength=num_devices),
            )
        )
    form = MessageFormat(
        dispatch_vector_bytes=float(rng.uniform(2, 12)), combine_vector_bytes=float(rng.uniform(2, 12)), pair_bytes=0.25
    )
    transmission = Transmission(
        mode=shape.mode,
        dedup=shape.dedup,
        num_chunks=shape.num_chunks,
        message_format=form,
        overlap_kv=shape.overlap_kv,
        overlap_shared=shape.overlap_shared,
    )
    moves_RR = rng.random((num_devices, num_devices)) < (shape.density if shape.kv else 0.0)
    kv_tokens_RR = rng.integers(1, 9, moves_RR.shape) * moves_RR
    return StepPlanner(model, cluster, RooflineCost(model, cluster), transmission).plan(works, traffic, kv_tokens_RR)
