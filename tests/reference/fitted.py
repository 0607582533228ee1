"""Problems of policies that are fitted to the rows of a trace: `make_fit_problem`, `random_fit_problem`."""

from typing import Any

import numpy as np

from epsim.placement import PlacementProblem, TransferObjective, expected_by_modality
from epsim.trace import RoutingTrace, TraceMeta
from epsim.trace.statistics import expert_load

Rng = np.random.Generator


def make_trace(
    ids_LTK: list[Any], *, num_experts: int, phases: list[int] | None = None, requests: list[int] | None = None
) -> RoutingTrace:
    """Return a trace whose tokens chose these experts; prefill is vision, decode text; by default one request."""
    ids = np.array(ids_LTK, np.uint8).transpose(1, 0, 2)
    num_tokens, num_layers, topk = ids.shape
    phase_T = np.array(phases or [0] * num_tokens, np.uint8)
    meta = TraceMeta(
        layer_ids=tuple(range(num_layers)),
        num_experts=num_experts,
        topk=topk,
        model="",
        origin="synthetic",
        description="",
        seed=None,
        software="test",
        mock=False,
    )
    return RoutingTrace(
        meta=meta,
        request_id_T=np.array(requests or [0] * num_tokens, np.int32),
        position_T=np.arange(num_tokens, dtype=np.int32),
        step_T=phase_T.astype(np.int32),
        phase_T=phase_T,
        modality_T=(1 - phase_T).astype(np.uint8),
        topk_expert_ids_TLK=np.ascontiguousarray(ids),
    )


def make_fit_problem(
    ids_LTK: list[Any],
    *,
    num_experts: int,
    node_R: list[int],
    phases: list[int] | None = None,
    transfer: TransferObjective | None = None,
) -> PlacementProblem:
    """Return the problem of placing for these tokens; by default a remote device costs 1 and homes are anywhere."""
    trace = make_trace(ids_LTK, num_experts=num_experts, phases=phases)
    return PlacementProblem(
        num_layers=len(ids_LTK),
        num_experts=num_experts,
        node_of_device_R=np.array(node_R, np.int32),
        expert_load_MLE=expert_load(trace),
        trace=trace,
        transfer=transfer,
    )


def random_fit_problem(rng: Rng, *, max_devices: int, max_experts: int, min_devices: int = 1) -> PlacementProblem:
    """Return a random problem: devices in 1 or 2 nodes, dedup by device or node, homes even, uneven or by modality."""
    num_devices = int(rng.integers(min_devices, max_devices + 1))
    num_experts = num_devices * int(rng.integers(1, max_experts // num_devices + 1))
    topk, num_tokens = int(rng.integers(1, num_experts + 1)), int(rng.integers(1, 13))
    ids_LTX = rng.permuted(np.tile(np.arange(num_experts), (2, num_tokens, 1)), axis=2)
    node_R = [0, *rng.integers(0, 2, num_devices - 1).tolist()]
    share_FR = [
        np.full((2, num_devices), 1 / num_devices),
        rng.dirichlet(np.ones(num_devices), 2),
        expected_by_modality(num_devices).share_FR(num_devices),
    ][int(rng.integers(3))]
    return make_fit_problem(
        ids_LTX[:, :, :topk].tolist(),
        num_experts=num_experts,
        node_R=node_R,
        phases=rng.integers(0, 2, num_tokens).tolist(),
        transfer=TransferObjective.of(
            np.array(node_R), share_FR, by_node=bool(rng.integers(2)), same_node=float(rng.choice([0.1, 0.5, 1.0]))
        ),
    )
