"""`StepPlanner`: from a step's traffic and home work to its `StepPlan`, with the costs of the devices.

Letters: L MoE layers, C chunks, R devices, N nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import Cost, HomeWork
from epsim.model import ModelCard
from epsim.sim.messaging import MessageCosts, background_s_per_byte_R
from epsim.sim.step import Barriers, Connections, Floats, Mode, StepPlan
from epsim.traffic import Counts, Dedup, MessageFormat, StepTraffic


@dataclass(frozen=True, kw_only=True)
class Transmission:
    """How tokens travel: the mode, dedup, the bytes, and what overlaps.

    num_chunks: 1 in mode sync, the two micro-batches in mode two_batch. connections, barriers: as in `StepPlan`.
    """

    mode: Mode
    dedup: Dedup
    num_chunks: int
    message_format: MessageFormat
    overlap_kv: bool
    overlap_shared: bool = False
    connections: Connections = "flow"
    barriers: Barriers = "all"


class StepPlanner:
    """Makes the plans of the steps of one deployment under expert parallelism."""

    def __init__(self, model: ModelCard, cluster: Cluster, cost: Cost, transmission: Transmission) -> None:
        self._model = model
        self._cost = cost
        self.transmission = transmission
        self._node_of_device_R = cluster.node_of_device_R.astype(np.int32)
        self._barrier_factor_R = np.ones(cluster.num_devices)
        if transmission.mode == "sync":
            self._barrier_factor_R += [device.barrier_slowdown_frac for device in cluster.devices]
        self._copy_time = _CopyTime(cluster) if transmission.mode == "async" else None
        self._message_costs = MessageCosts.of(cluster)
        self._background_s_per_byte_R = background_s_per_byte_R(cluster)
        self._step_s_R = np.array([device.step_overhead_s for device in cluster.devices])
        self._gateway_RN = None
        if transmission.dedup == "node":
            self._gateway_RN = cluster.gateway_RN

    def plan(self, works: Sequence[HomeWork], traffic: StepTraffic, kv_tokens_RR: Counts) -> StepPlan:
        """Return the plan of a step; kv_tokens_RR: tokens whose KV cache moves from device to device after it.

        works: what the home tokens ask for; in mode two_batch of each micro-batch, the chunks of the traffic.
        """
        if self.transmission.mode != "two_batch":
            return self._plan(works[0], traffic, kv_tokens_RR)
        first = self._plan(works[0], traffic.of_chunk(0), kv_tokens_RR)
        second = self._plan(works[1], traffic.of_chunk(1), np.zeros_like(kv_tokens_RR))
        return replace(first, second=second)

    def plan_layers(self, homes: Sequence[Mapping[str, Floats]], traffic: StepTraffic) -> StepPlan:
        """Return a plan whose layers are each a step by itself (`simulate_layers`), without KV caches.

        homes: of each micro-batch what homes compute in each of these steps, [L, R] under the names of `StepPlan`;
        copy_s_LR is added to that of the traffic.
        """
        chunks = (
            [traffic] if self.transmission.mode != "two_batch" else [traffic.of_chunk(c) for c in range(len(homes))]
        )
        no_kv_LRR = np.zeros((traffic.pairs_LCRR.shape[0], *traffic.pairs_LCRR.shape[2:]))
        plans = [self._served(fields, chunk, no_kv_LRR) for fields, chunk in zip(homes, chunks, strict=True)]
        return plans[0] if len(plans) == 1 else replace(plans[0], second=plans[1])

    def _plan(self, work: HomeWork, traffic: StepTraffic, kv_tokens_RR: Counts) -> StepPlan:
        num_layers = traffic.pairs_LCRR.shape[0]
        takes_part_R = (work.tokens_R > 0) | traffic.device_pairs_LR.any(axis=0)
        homes = self._home_times(work, num_layers)
        homes |= {"host_s_LR": self._host_s_LR(num_layers) * takes_part_R, "copy_s_LR": np.zeros(1)}
        return self._served(homes, traffic, self._kv_bytes(kv_tokens_RR, num_layers))

    def _served(self, homes: Mapping[str, Floats], traffic: StepTraffic, kv_bytes_LRR: Floats) -> StepPlan:
        """Return the plan of what homes compute, and of what follows from the traffic."""
        messages = self._messages(traffic)
        fields = {**homes, "copy_s_LR": homes["copy_s_LR"] + self._copy_s_LR(messages)}
        plan = StepPlan(
            mode=self.transmission.mode,
            **fields,
            **self._expert_times(traffic),
            **messages,
            **self._message_times(traffic),
            gateway_RN=self._gateway_RN,
            node_of_device_R=self._node_of_device_R,
            kv_bytes_LRR=kv_bytes_LRR,
            overlap_kv=self.transmission.overlap_kv,
            overlap_shared=self.transmission.overlap_shared,
            connections=self.transmission.connections,
            barriers=self.transmission.barriers,
            second=None,
            message_costs=self._message_costs,
            step_s_R=self._step_s_R,
        )
        if self.transmission.mode == "sync" or not self._background_s_per_byte_R.any():
            return plan
        return replace(plan, copy_s_LR=plan.copy_s_LR + plan.moved_bytes_LR * self._background_s_per_byte_R)

    def served_pairs_LR(self, traffic: StepTraffic) -> Counts:
        """Return the routed pairs that each device serves, [L, R]."""
        return traffic.device_pairs_LR

    def _home_times(self, work: HomeWork, num_layers: int) -> dict[str, Floats]:
        """What the homes compute; a barrier stretches it by its device's slowdown."""
        cost, factor_R, dense_layers = self._cost, self._barrier_factor_R, self._model.num_dense_layers

        def by_layer(seconds_R: Floats) -> Floats:
            return np.tile(factor_R * seconds_R, (num_layers, 1))

        attention_s_LR = by_layer(cost.attention_s_R(work))
        attention_s_LR[0] *= 1 + dense_layers
        dense_ffn_s_LR = np.zeros_like(attention_s_LR)
        dense_ffn_s_LR[0] = dense_layers * factor_R * cost.dense_ffn_s_R(work)
        return {
            "vision_s_R": factor_R * cost.vision_s_R(work),
            "attention_s_LR": attention_s_LR,
            "dense_ffn_s_LR": dense_ffn_s_LR,
            "router_s_LR": by_layer(cost.router_s_R(work)),
            "home_experts_s_LR": np.zeros_like(attention_s_LR),
            "shared_s_LR": by_layer(cost.shared_experts_s_R(work)),
            "head_s_R": factor_R * cost.head_s_R(work),
        }

    def _host_s_LR(self, num_layers: int) -> Floats:
        host_s_LR = np.tile(self._barrier_factor_R * self._cost.layer_floor_s_R, (num_layers, 1))
        host_s_LR[0] *= 1 + self._model.num_dense_layers
        return host_s_LR

    def _expert_times(self, traffic: StepTraffic) -> dict[str, Floats]:
        """Routed experts: all of a device in one kernel, or in mode async its own tokens and each message's apart."""
        cost = self._cost
        times = {
            "experts_s_LR": np.zeros(traffic.device_pairs_LR.shape),
            "local_s_LR": np.zeros(traffic.device_pairs_LR.shape),
            "remote_s_LCRR": np.zeros(traffic.pairs_LCRR.shape),
        }
        if self.transmission.mode == "async":
            local = np.arange(len(self._node_of_device_R))
            pairs_LR = traffic.pairs_LCRR.sum(axis=1)[:, local, local]
            times["local_s_LR"] = cost.experts_s(pairs_LR, traffic.source_experts_LRR[:, local, local])
            times["remote_s_LCRR"] = _off_diagonal(cost.experts_s(traffic.pairs_LCRR, traffic.experts_LCRR))
        else:
            experts_s_LR = cost.experts_s(traffic.device_pairs_LR, traffic.device_experts_LR)
            times["experts_s_LR"] = self._barrier_factor_R * experts_s_LR
        return times

    def _message_times(self, traffic: StepTraffic) -> dict[str, Floats]:
        """What homes do for each message that leaves and that comes back, and devices for each that arrives."""
        vectors_LCRR = traffic.pairs_LCRR if self.transmission.dedup == "none" else traffic.tokens_LCRR
        arrived_LCRR = vectors_LCRR * (1 - np.eye(len(self._node_of_device_R), dtype=np.int64))
        sent_LCRX = arrived_LCRR  # by home and destination
        if self._gateway_RN is not None:
            near_RR = self._node_of_device_R[:, None] == self._node_of_device_R
            sent_LCRX = np.concatenate((arrived_LCRR * near_RR, self._across_nodes(traffic)[0]), axis=3)
        cost, factor_R, sent_LCXR = self._cost, self._barrier_factor_R, sent_LCRX.swapaxes(2, 3)
        return {
            "pack_s_LR": factor_R * cost.pack_s(sent_LCXR).sum(axis=(1, 2)),
            "serve_s_LCRR": factor_R * cost.serve_s(arrived_LCRR),
            "reduce_s_LR": factor_R * cost.reduce_s(sent_LCXR).sum(axis=(1, 2)),
        }

    def _copy_s_LR(self, messages: dict[str, Floats]) -> Floats:
        """Return what a home's transfers, out and back, take from its compute."""
        out_LCRR = messages["dispatch_bytes_LCRR"]
        if self._copy_time is None or not self._copy_time.exposed:
            return np.zeros((out_LCRR.shape[0], out_LCRR.shape[2]))
        back_LCRR = messages["combine_bytes_LCRR"]
        if self._gateway_RN is None:
            return self._copy_time.seconds_LR(out_LCRR, back_LCRR)
        near_RR = self._node_of_device_R[:, None] == self._node_of_device_R
        near_s_LR = self._copy_time.seconds_LR(out_LCRR * near_RR, back_LCRR * near_RR)
        via_gateway = (
            _at_gateway(messages[name], self._gateway_RN)
            for name in ("node_dispatch_bytes_LCRN", "node_combine_bytes_LCRN")
        )
        return near_s_LR + self._copy_time.seconds_LR(*via_gateway)

    def _messages(self, traffic: StepTraffic) -> dict[str, Floats]:
        form = self.transmission.message_format
        pairs = traffic.pairs_LCRR
        vectors = pairs if self.transmission.dedup == "none" else traffic.tokens_LCRR
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


class _CopyTime:
    """How long transfers keep a device from computing: (1 - transfer_overlap) of their time on an idle network."""

    def __init__(self, cluster: Cluster) -> None:
        self._exposed_frac_R = np.array([1.0 - device.transfer_overlap_frac for device in cluster.devices])
        self.exposed = bool(self._exposed_frac_R.any())
        # One more entry at the end, for the -1 that pads a route.
        overhead_s_X = np.append(cluster.link_message_s_X, 0.0)
        self._s_per_byte_RR = cluster.route_s_per_byte_RR
        self._message_s_RR = overhead_s_X[cluster.routes_RRH].sum(axis=2)

    def seconds_LR(self, out_LCRR: Floats, back_LCRR: Floats) -> Floats:
        """Return [L, R] for the messages of each home, out and back: overheads, and bytes at the narrowest link."""
        out_s = out_LCRR * self._s_per_byte_RR + (out_LCRR > 0) * self._message_s_RR
        back_s = back_LCRR * self._s_per_byte_RR.T + (back_LCRR > 0) * self._message_s_RR.T
        seconds_LR: Floats = (out_s + back_s).sum(axis=(1, 3)) * self._exposed_frac_R
        return seconds_LR


def _at_gateway(bytes_LCRN: Floats, gateway_RN: npt.NDArray[np.int32]) -> Floats:
    """Return the bytes by home and gateway, [L, C, R, R]."""
    layers, chunks, num_devices, _ = bytes_LCRN.shape
    bytes_LCRR = np.zeros((layers, chunks, num_devices, num_devices))
    for node, gateway_R in enumerate(gateway_RN.T):
        bytes_LCRR[:, :, np.arange(num_devices), gateway_R] += bytes_LCRN[..., node]
    return bytes_LCRR


def _off_diagonal(values_xRR: npt.NDArray[np.float64]) -> Floats:
    """Return a copy with zeros where source and destination are the same device."""
    return values_xRR * (1.0 - np.eye(values_xRR.shape[-1]))
