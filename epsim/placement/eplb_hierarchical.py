"""`EplbHierarchical`: DeepSeek's expert-parallel load balancer (deepseek-ai/EPLB), its policy of groups within nodes.

Letters: L MoE layers, E experts, G expert groups, N nodes, X (layer, node), S experts of a node, P slots.
"""

from typing import ClassVar

import numpy as np

from epsim.errors import PlacementError
from epsim.placement.eplb_global import EplbGlobal
from epsim.placement.eplb_packing import count_slots, pack, replicate_and_pack
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem


class EplbHierarchical:
    """Keeps each expert group, with all copies, in one node: EPLB's policy for prefill with group-limited routing.

    In each layer, by the loads of the whole trace:
    1. groups onto nodes: the groups, heaviest first, each go to the node with the least load that has room for one; all
       nodes take G / N;
    2. replicate, in each node by itself: each of its redundant slots goes to the expert whose copies carry most;
    3. pack, in each node by itself: the copies, heaviest first, each go to the device with the least load that has a
       slot left.
    Ties: the lower group, node, copy or device number; an expert's number in its node follows the order in which the
    groups came. Two copies of an expert may meet on a device, as in EPLB.

    num_groups: group g is experts g * E / G to (g + 1) * E / G - 1, as group-limited routers count them.
    redundant_experts: slots beyond one per expert; all together must divide over the devices.
    """

    kind: ClassVar[str] = "eplb_hierarchical"

    def __init__(self, *, num_groups: int, redundant_experts: int = 0) -> None:
        self.num_groups = num_groups
        self.redundant_experts = redundant_experts

    def place(self, problem: PlacementProblem) -> Placement:
        """Raise PlacementError where groups, nodes or slots do not divide: nothing else is placed in their stead."""
        num_slots, num_nodes = self._validate(problem)
        num_layers, group_size = problem.num_layers, problem.num_experts // self.num_groups
        load_LE = problem.load_LE.astype(float)
        load_LG = load_LE.reshape(num_layers, self.num_groups, group_size).sum(axis=2)
        group_LG = pack(load_LG, num_nodes)
        expert_LE = (group_LG[:, :, None] * group_size + np.arange(group_size)).reshape(num_layers, -1)
        expert_XS = expert_LE.reshape(num_layers * num_nodes, -1)
        load_XS = np.take_along_axis(load_LE, expert_LE, axis=1).reshape(expert_XS.shape)
        slot_XP = replicate_and_pack(load_XS, num_slots // num_nodes, problem.num_devices // num_nodes)
        return problem.placement(self.kind, np.take_along_axis(expert_XS, slot_XP, axis=1).reshape(num_layers, -1))

    def _validate(self, problem: PlacementProblem) -> tuple[int, int]:
        """Return the number of slots and of nodes."""
        instead = f"or policy {EplbGlobal.kind}, which knows neither groups nor nodes"
        if problem.num_experts % self.num_groups:
            raise PlacementError(
                f"placement.num_groups: {self.num_groups} does not divide {problem.num_experts} experts; use the "
                f"number of groups of the router, {instead}"
            )
        node_R = problem.node_of_device_R
        num_nodes = len(np.unique(node_R))
        runs = np.diff(np.flatnonzero(np.diff(node_R, prepend=-1, append=-1)))
        if len(runs) != num_nodes or len(set(runs.tolist())) != 1:
            raise PlacementError(
                f"placement.policy: {self.kind} needs nodes of the same number of devices, one after the other; here "
                f"{num_nodes} nodes come in turns of {', '.join(map(str, runs))} devices; use such a cluster, {instead}"
            )
        if self.num_groups % num_nodes:
            raise PlacementError(
                f"placement.num_groups: {self.num_groups} groups do not divide over {num_nodes} nodes; use a number of "
                f"nodes that divides the groups, {instead}"
            )
        return count_slots(problem, self.redundant_experts), num_nodes
