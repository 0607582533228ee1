"""`StepPlanner`: from a step's traffic and home work to its `StepPlan`, with the costs of the devices.

Letters: L MoE layers, C chunks, R devices, N nodes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import HomeWork, RooflineCost
from epsim.model import ModelCard
from epsim.sim.step import Floats, Mode, StepPlan
from epsim.traffic import Counts, Dedup, MessageFormat, StepTraffic


@dataclass(frozen=True, kw_only=True)
class Transmission:
    """How tokens travel: the mode, dedup, the number of chunks (1 in mode sync), the bytes, and KV overlap."""

    mode: Mode
    dedup: Dedup
    num_chunks: int
    message_format: MessageFormat
    overlap_kv: bool


class StepPlanner:
    """Makes the plans of the steps of one deployment."""

    def __init__(self, model: ModelCard, cluster: Cluster, cost: RooflineCost, transmission: Transmission) -> None:
        self._model = model
        self._cost = cost
        self._transmission = transmission
        self._node_of_device_R = cluster.node_of_device_R.astype(np.int32)
        self._gateway_RN = None
        if transmission.dedup == "node":
            gateways = [[cluster.gateway(r, n) for n in range(cluster.num_nodes)] for r in range(cluster.num_devices)]
            self._gateway_RN = np.array(gateways, dtype=np.int32)

    def plan(self, work: HomeWork, traffic: StepTraffic, kv_tokens_RR: Counts) -> StepPlan:
        """Return the plan of a step; kv_tokens_RR: tokens whose KV cache moves from device to device after it."""
        cost, num_layers = self._cost, traffic.pairs_LCRR.shape[0]
        dense_layers = self._model.num_dense_layers
        attention_s_LR = np.tile(cost.attention_s_R(work), (num_layers, 1))
        dense_ffn_s_LR = np.zeros_like(attention_s_LR)
        attention_s_LR[0] *= 1 + dense_layers
        dense_ffn_s_LR[0] = dense_layers * cost.dense_ffn_s_R(work)
        local = np.arange(len(self._node_of_device_R))
        pairs_LRR = traffic.pairs_LCRR.sum(axis=1)
        return StepPlan(
            mode=self._transmission.mode,
            vision_s_R=cost.vision_s_R(work),
            attention_s_LR=attention_s_LR,
            dense_ffn_s_LR=dense_ffn_s_LR,
            router_s_LR=np.tile(cost.router_s_R(work), (num_layers, 1)),
            shared_s_LR=np.tile(cost.shared_experts_s_R(work), (num_layers, 1)),
            home_experts_s_LR=np.zeros_like(attention_s_LR),
            experts_s_LR=cost.experts_s(traffic.device_pairs_LR, traffic.device_experts_LR),
            local_s_LR=cost.experts_s(pairs_LRR[:, local, local], traffic.source_experts_LRR[:, local, local]),
            remote_s_LCRR=_off_diagonal(cost.experts_s(traffic.pairs_LCRR, traffic.experts_LCRR)),
            head_s_R=cost.head_s_R(work),
            gateway_RN=self._gateway_RN,
            node_of_device_R=self._node_of_device_R,
            kv_bytes_LRR=self._kv_bytes(kv_tokens_RR, num_layers),
            overlap_kv=self._transmission.overlap_kv,
            **self._messages(traffic),
        )

    def served_pairs_LR(self, traffic: StepTraffic) -> Counts:
        """Return the routed pairs that each device serves, [L, R]."""
        return traffic.device_pairs_LR

    def _messages(self, traffic: StepTraffic) -> dict[str, Floats]:
        form = self._transmission.message_format
        pairs = traffic.pairs_LCRR
        vectors = pairs if self._transmission.dedup == "none" else traffic.tokens_LCRR
        node_tokens, node_pairs = self._across_nodes(traffic)
        return {
            "dispatch_bytes_LCRR": _off_diagonal(form.dispatch_bytes(vectors, pairs)),
            "combine_bytes_LCRR": _off_diagonal(form.combine_bytes(vectors)),
            "node_dispatch_bytes_LCRN": form.dispatch_bytes(node_tokens, node_pairs),
            "node_combine_bytes_LCRN": form.combine_bytes(node_tokens),
        }

    def _across_nodes(self, traffic: StepTraffic) -> tuple[Counts, Counts]:
        """Return tokens and pairs that leave for another node, [L, C, R, N]; nothing without node-level dedup."""
        if self._gateway_RN is None:
            empty = np.zeros_like(traffic.node_tokens_LCRN)
            return empty, empty
        num_nodes = self._gateway_RN.shape[1]
        members = (self._node_of_device_R[:, None] == np.arange(num_nodes)).astype(np.int64)
        elsewhere_RN = 1 - members
        return traffic.node_tokens_LCRN * elsewhere_RN, (traffic.pairs_LCRR @ members) * elsewhere_RN

    def _kv_bytes(self, kv_tokens_RR: Counts, num_layers: int) -> Floats:
        per_layer_RR = _off_diagonal(kv_tokens_RR.astype(np.float64) * float(self._model.kv_bytes_per_token))
        layers_before_L = np.ones(num_layers)
        layers_before_L[0] += self._model.num_dense_layers
        return layers_before_L[:, None, None] * per_layer_RR


def _off_diagonal(values_xRR: npt.NDArray[np.float64]) -> Floats:
    """Return a copy with zeros where source and destination are the same device."""
    return values_xRR * (1.0 - np.eye(values_xRR.shape[-1]))
