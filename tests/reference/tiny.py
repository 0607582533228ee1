"""Things so small that their numbers fit into a comment: `tiny_model`, `make_cluster`, `star`, `make_placement`."""

from typing import Any

import numpy as np

from epsim.cluster import Cluster, build_cluster
from epsim.model import GroupedQueryAttention, ModelCard, Moe
from epsim.placement import Placement


def tiny_model(**changes: Any) -> ModelCard:
    """Return a card with round bytes and FLOPs; `changes` replace fields.

    Hidden 2 (4 bytes a vector), 3 layers of which the first is dense, 4 experts, top 2. Parameters: attention
    2*2*1*(2+1) = 12, expert 3*2*1 = 6, shared experts 3*2*2 = 12, dense FFN 3*2*4 = 24, router 2*4 = 8, head 2*5 = 10;
    each has 2 bytes and 2 FLOPs per token. A (query, key) pair costs 2*2*2*1 = 8 FLOPs, a cached token is
    2*1*1*2 = 4 bytes.
    """
    fields: dict[str, Any] = {
        "name": "tiny",
        "hidden_size": 2,
        "num_layers": 3,
        "vocab_size": 5,
        "attention": GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=1),
        "dense_ffn_size": 4,
        "moe": Moe(
            num_experts=4,
            topk=2,
            expert_ffn_size=1,
            num_dense_layers=1,
            num_shared_experts=1,
            shared_expert_ffn_size=2,
        ),
    }
    return ModelCard(**{**fields, **changes})


def device_type(**changes: Any) -> dict[str, Any]:
    """Return a device type that reaches 50 FLOP/s and 10 B/s; `changes` replace fields."""
    fields: dict[str, Any] = {
        "memory": 1000.0,
        "memory_usable": 0.9,
        "memory_bandwidth": 20.0,
        "memory_efficiency": 0.5,
        "flops": {"bf16": 100.0},
        "compute_efficiency": 0.5,
        "efficiency_exponent": 0.0,
        "launch_overhead": 0.0,
        "layer_overhead": 0.0,
        "request_overhead": 0.0,
        "expert_overhead": 0.0,
        "barrier_slowdown": 0.0,
        "transfer_overlap": 1.0,
        "step_overhead": 0.0,
        "messaging": None,
        "staging": None,
    }
    return {**fields, **changes}


def link(source: str, target: str, bandwidth: float, latency: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Return one entry of `links`, in both directions unless `duplex` is changed."""
    fields: dict[str, Any] = {
        "name": None,
        "source": source,
        "target": target,
        "bandwidth": bandwidth,
        "latency": latency,
        "message_overhead": 0.0,
        "message_header": 0.0,
        "frame_overhead": 0.0,
        "burst": 0.0,
        "ack_overhead": 0.0,
        "duplex": True,
        "each": {},
    }
    return {**fields, **changes}


def make_cluster(
    types: list[dict[str, Any]],
    links: list[dict[str, Any]],
    *,
    nodes: list[int] | None = None,
    switches: tuple[str, ...] = (),
    segment_bytes: float = 10.0,
) -> Cluster:
    """Return the devices d0, d1, … with one type each; nodes: the node of each (default: one node a device)."""
    node_R = list(range(len(types))) if nodes is None else nodes
    return build_cluster(
        {
            "name": "test",
            "segment": segment_bytes,
            "device_types": {f"t{r}": fields for r, fields in enumerate(types)},
            "devices": [
                {"name": f"d{r}", "node": f"n{node}", "type": f"t{r}", "each": {}} for r, node in enumerate(node_R)
            ],
            "nics": [],
            "switches": [{"name": name, "each": {}} for name in switches],
            "links": links,
        }
    )


def star(num_devices: int, bandwidth: float, latency: float = 0.0, **type_changes: Any) -> Cluster:
    """Return equal devices on one switch."""
    links = [link(f"d{r}", "switch", bandwidth, latency) for r in range(num_devices)]
    return make_cluster([device_type(**type_changes)] * num_devices, links, switches=("switch",))


def make_placement(
    p2l_LP: list[list[int]], node_R: list[int], num_experts: int, group_R: list[int] | None = None
) -> Placement:
    """Return a placement with these slots on devices in these nodes and groups."""
    return Placement(
        policy="test",
        num_experts=num_experts,
        physical_to_logical_LP=np.array(p2l_LP, np.int32),
        node_of_device_R=np.array(node_R, np.int32),
        group_of_device_R=None if group_R is None else np.array(group_R, np.int32),
    )
