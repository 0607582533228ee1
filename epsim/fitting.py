"""From a scenario to what its placement policy may know: `placement_problem`, `make_policy`.

Letters: L MoE layers, E experts, R devices.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.layout import split_devices
from epsim.placement import (
    POLICIES,
    HomePlan,
    LayerClock,
    PlacementPolicy,
    PlacementProblem,
    TransferObjective,
    balanced,
    expected_by_modality,
)
from epsim.scenario.placement import PlacementSpec
from epsim.scenario.spec import AfdSpec, PdSpec, ScenarioSpec
from epsim.trace import TraceSource


def make_policy(spec: PlacementSpec) -> PlacementPolicy:
    """Return the policy of a scenario's `placement` section."""
    fields = spec.model_dump()
    policy_class = POLICIES[fields.pop("policy")]
    if "path" in fields:
        fields["path"] = Path(fields["path"])
    return policy_class(**fields)


def placement_problem(
    spec: ScenarioSpec,
    cluster: Cluster,
    trace: TraceSource,
    load_MLE: npt.NDArray[np.int64],
    clock: Callable[[], LayerClock] | None = None,
) -> PlacementProblem:
    """Return what the policy of a scenario is fitted to.

    load_MLE: how often the trace chose each expert. clock: makes the simulator's time of a layer, if it is asked for.
    """
    node_of_device_R = cluster.node_of_device_R.astype(np.int32)
    same_node, other_node = _link_costs(cluster)
    return PlacementProblem(
        num_layers=load_MLE.shape[1],
        num_experts=load_MLE.shape[2],
        node_of_device_R=node_of_device_R,
        expert_load_MLE=load_MLE,
        trace=trace,
        transfer=TransferObjective.of(
            node_of_device_R,
            expected_homes(spec, cluster.num_devices).share_FR(cluster.num_devices),
            by_node=spec.transmission.dedup == "node",
            per_pair=spec.transmission.dedup == "none",
            gateway_RN=cluster.gateway_RN,
            same_node=same_node,
            other_node=other_node,
        ),
        clock=clock,
    )


def expected_homes(spec: ScenarioSpec, num_devices: int) -> HomePlan:
    """Return where tokens will live; where that follows from the placement, what policies place for."""
    match spec.parallelism:
        case AfdSpec(attention_devices=first):
            attention, _ = split_devices(num_devices, first)
            return HomePlan(prefill_devices=attention, decode_devices=attention)
        case PdSpec(prefill_devices=first):
            prefill, decode = split_devices(num_devices, first)
            return HomePlan(prefill_devices=prefill, decode_devices=decode)
        case _:
            return balanced(num_devices) if spec.homes.policy == "balanced" else expected_by_modality(num_devices)


def _link_costs(cluster: Cluster) -> tuple[float, float]:
    """Return the mean time per byte between devices of one node, and of two, as shares of the larger."""
    node_R, s_per_byte_RR = cluster.node_of_device_R, cluster.route_s_per_byte_RR
    is_near_RR, is_pair_RR = node_R[:, None] == node_R, ~np.eye(cluster.num_devices, dtype=bool)
    means = [
        float(s_per_byte_RR[pairs_RR].mean()) if pairs_RR.any() else 0.0
        for pairs_RR in (is_near_RR & is_pair_RR, ~is_near_RR)
    ]
    dearest = max(means) or 1.0
    return means[0] / dearest, means[1] / dearest
