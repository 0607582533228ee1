"""`ReplicaPlanner`: the `StepPlan` of replicas, each one device (data parallel) or a group of them (tensor parallel).

Every device of a group computes its slice of every layer for all tokens of the group (Megatron-LM, arXiv:1909.08053).
The partial results are added twice a layer, after the attention and after the FFN or experts, by an all-reduce, which
is a reduce-scatter and an all-gather (arXiv:2205.05198): in each every device sends every other one 1 / size of the
tokens, in all 2 (size - 1) / size of their bytes, as a ring does. The plan of groups has two layers per layer of the
model, 2 l with the attention and 2 l + 1 with the FFN or experts: dispatch is the reduce-scatter, combine the
all-gather. Devices alone have nothing to send and a plan layer per layer of the model.

Letters: L layers of the plan, C chunks, R devices, N nodes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import Cost, HomeWork
from epsim.model import ModelCard
from epsim.sim.messaging import MessageCosts
from epsim.sim.step import Floats, StepPlan
from epsim.traffic import Counts, StepTraffic


class ReplicaPlanner:
    """Makes the plans of the steps of one deployment.

    A group's work and traffic are those of its first device, where all of its requests live.
    """

    def __init__(self, card: ModelCard, cluster: Cluster, cost: Cost, *, group_size: int, vector_bytes: float) -> None:
        """card: what one device holds of the model; cost: of that card. vector_bytes: of one hidden vector sent."""
        self._card = card
        self._cost = cost
        self._group_size = group_size
        self._vector_bytes = vector_bytes
        self._node_of_device_R = cluster.node_of_device_R.astype(np.int32)
        self._leader_R = np.arange(cluster.num_devices) // group_size * group_size
        self._plan_layers = 1 if group_size == 1 else 2  # per layer of the model
        self._message_costs = MessageCosts.of(cluster)
        self._step_s_R = np.array([device.step_overhead_s for device in cluster.devices])
        self._barrier_factor_R = np.ones(cluster.num_devices)
        if group_size > 1:
            self._barrier_factor_R += [device.barrier_slowdown_frac for device in cluster.devices]

    def plan(self, works: Sequence[HomeWork], traffic: StepTraffic, kv_tokens_RR: Counts) -> StepPlan:
        """Return the plan of a step; works: only one. kv_tokens_RR: nothing off its diagonal, as no request moves."""
        if (kv_tokens_RR * (1 - np.eye(len(kv_tokens_RR)))).any():
            raise ValueError("kv_tokens_RR moves requests between replicas")
        (work,) = map(self._of_group, works)
        bytes_LCRR = self._exchange_bytes(work.tokens_R)
        zeros_LR = np.zeros((len(bytes_LCRR), len(self._leader_R)))
        nodes_LCRN = np.zeros((*bytes_LCRR.shape[:3], int(self._node_of_device_R.max()) + 1))
        fronts = self._fronts(work, traffic)
        return StepPlan(
            mode="sync" if self._group_size > 1 else "async",
            vision_s_R=self._barrier_factor_R * self._cost.vision_s_R(work),
            attention_s_LR=fronts["attention_s_LR"],
            dense_ffn_s_LR=fronts["dense_ffn_s_LR"],
            router_s_LR=fronts["router_s_LR"],
            home_experts_s_LR=fronts["home_experts_s_LR"],
            host_s_LR=fronts["host_s_LR"],
            shared_s_LR=zeros_LR,
            copy_s_LR=zeros_LR,
            pack_s_LR=zeros_LR,
            reduce_s_LR=zeros_LR,
            experts_s_LR=zeros_LR,
            local_s_LR=zeros_LR,
            remote_s_LCRR=np.zeros_like(bytes_LCRR),
            head_s_R=self._barrier_factor_R * self._cost.head_s_R(work),
            dispatch_bytes_LCRR=bytes_LCRR,
            combine_bytes_LCRR=bytes_LCRR,
            node_dispatch_bytes_LCRN=nodes_LCRN,
            node_combine_bytes_LCRN=nodes_LCRN,
            gateway_RN=None,
            node_of_device_R=self._node_of_device_R,
            kv_bytes_LRR=np.zeros_like(bytes_LCRR[:, 0]),
            overlap_kv=False,
            overlap_shared=False,
            second=None,
            message_costs=self._message_costs,
            step_s_R=self._step_s_R,
        )

    def served_pairs_LR(self, traffic: StepTraffic) -> Counts:
        """Return the pairs of which each device computes its slice, [MoE layers, R]: all of its group."""
        return traffic.device_pairs_LR[:, self._leader_R]

    def _of_group(self, work: HomeWork) -> HomeWork:
        """Give every device the work of its group."""
        counts: dict[str, Any] = {name: value for name, value in vars(work).items() if isinstance(value, np.ndarray)}
        return replace(work, **{name: value_R[self._leader_R] for name, value_R in counts.items()})

    def _fronts(self, work: HomeWork, traffic: StepTraffic) -> dict[str, Floats]:
        """Return what the devices compute, [L, R]: the FFN or experts in a layer of their own where there are two."""
        cost, factor_R, step = self._cost, self._barrier_factor_R, self._plan_layers
        shape = (step * self._card.num_layers, len(self._leader_R))
        names = ("attention_s_LR", "dense_ffn_s_LR", "router_s_LR", "home_experts_s_LR")
        fronts = {name: np.zeros(shape) for name in names}
        moe = slice(step * self._card.num_dense_layers + step - 1, None, step)
        fronts["attention_s_LR"][::step] = factor_R * cost.attention_s_R(work)
        fronts["dense_ffn_s_LR"][step - 1 : moe.start : step] = factor_R * cost.dense_ffn_s_R(work)
        if self._card.moe is not None:
            experts_LR = traffic.device_experts_LR[:, self._leader_R]
            experts_s_LR = cost.experts_s(self.served_pairs_LR(traffic), experts_LR) + cost.shared_experts_s_R(work)
            fronts["router_s_LR"][moe] = factor_R * cost.router_s_R(work)
            fronts["home_experts_s_LR"][moe] = factor_R * experts_s_LR
        floor_s_R = factor_R * cost.layer_floor_s_R * (work.tokens_R > 0)  # a replica without requests does nothing
        return {**fronts, "host_s_LR": np.tile(floor_s_R / step, (shape[0], 1))}

    def _exchange_bytes(self, tokens_R: npt.NDArray[np.int64]) -> Floats:
        """Return what each device sends each other one in a reduce-scatter or an all-gather, [L, 1, R, R]."""
        num_devices = len(self._leader_R)
        partners_RR = (self._leader_R[:, None] == self._leader_R) & ~np.eye(num_devices, dtype=bool)
        bytes_RR = partners_RR * (tokens_R[:, None] * self._vector_bytes / self._group_size)
        return np.tile(bytes_RR, (self._plan_layers * self._card.num_layers, 1, 1, 1))
