"""`Placement`: which physical expert (slot) of which device holds which logical expert, in every MoE layer.

Canonical form `physical_to_logical_LP`, slots contiguous per device. Letters: L MoE layers, E logical experts,
P physical experts (slots), R devices.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """An expert placement, the same number of slots on every device.

    physical_to_logical_LP: int32, the logical expert in each slot, -1 if empty; slot p lies on device p // (P / R).
    node_of_device_R: int32, the node of each device (a replica in the sender's node is preferred).
    group_of_device_R: int32, the group of each device (a replica in the sender's group is preferred to one in its
    node); None: all in one group.
    Raises PlacementError when P does not divide over the devices or a layer lacks an expert.
    """

    policy: str
    num_experts: int
    physical_to_logical_LP: IntArray
    node_of_device_R: IntArray
    group_of_device_R: IntArray | None = None

    def __post_init__(self) -> None:
        p2l_LP = self.physical_to_logical_LP
        if p2l_LP.ndim != 2 or p2l_LP.dtype != np.int32:
            raise ValueError("physical_to_logical_LP must be int32 of shape (layers, slots)")
        num_slots = p2l_LP.shape[1]
        if num_slots % self.num_devices:
            raise PlacementError(
                f"placement: {num_slots} slots do not divide over {self.num_devices} devices; "
                f"use a multiple of {self.num_devices} slots"
            )
        if p2l_LP.size and (p2l_LP.min() < -1 or p2l_LP.max() >= self.num_experts):
            layer, slot = np.argwhere((p2l_LP < -1) | (p2l_LP >= self.num_experts))[0]
            raise PlacementError(
                f"placement: layer {layer}, slot {slot} holds expert {p2l_LP[layer, slot]}; "
                f"experts are numbered 0 to {self.num_experts - 1}, and -1 is an empty slot"
            )
        placed_LE = np.zeros((len(p2l_LP), self.num_experts + 1), np.bool_)  # the last column is of empty slots, -1
        np.put_along_axis(placed_LE, p2l_LP, True, axis=1)
        missing = np.argwhere(~placed_LE[:, :-1])
        if missing.size:
            layer, expert = missing[0]
            raise PlacementError(
                f"placement: layer {layer} has no slot for expert {expert}; every expert must be on some device"
            )

    @property
    def num_devices(self) -> int:
        return len(self.node_of_device_R)

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_LP.shape[0])

    @property
    def slots_per_device(self) -> int:
        return int(self.physical_to_logical_LP.shape[1]) // self.num_devices

    @property
    def filled_slots_R(self) -> IntArray:
        """How many experts each device holds, in all layers together: int32 [R]."""
        filled_LRX = (self.physical_to_logical_LP >= 0).reshape(self.num_layers, self.num_devices, -1)
        return np.asarray(filled_LRX.sum(axis=(0, 2)), dtype=np.int32)

    @cached_property
    def slot_of_expert_RLE(self) -> IntArray:
        """The slot to which a source device sends the tokens of an expert: int32 [R, L, E].

        A replica on the source device itself, else one in its group and node, else in its group, else in its node, else
        any; among several candidates the source takes number (source mod candidates), a choice fixed in advance as
        SGLang's static dispatch makes it.
        """
        if self.physical_to_logical_LP.shape[1] > self.num_experts:
            return self._choose_replicas()
        slot_LE = np.argsort(self.physical_to_logical_LP, axis=1, kind="stable").astype(np.int32)
        return np.tile(slot_LE, (self.num_devices, 1, 1))

    @cached_property
    def _nearness_RR(self) -> IntArray:
        """How near each device is to a source [source, device]: 4 itself, 3 group and node, 2 group, 1 node, 0 else."""
        node_R = self.node_of_device_R
        group_R = np.zeros_like(node_R) if self.group_of_device_R is None else self.group_of_device_R
        same_group_RR, same_node_RR = (ids_R[:, None] == ids_R for ids_R in (group_R, node_R))
        nearness_RR: IntArray = 2 * same_group_RR.astype(np.int32) + same_node_RR.astype(np.int32)
        np.fill_diagonal(nearness_RR, 4)
        return nearness_RR

    def _choose_replicas(self) -> IntArray:
        table_RLE = np.empty((self.num_devices, self.num_layers, self.num_experts), np.int32)
        for layer, row_P in enumerate(self.physical_to_logical_LP):
            for expert in range(self.num_experts):
                slots = np.flatnonzero(row_P == expert)
                nearness_RX = self._nearness_RR[:, slots // self.slots_per_device]
                for source, nearness_X in enumerate(nearness_RX):
                    candidates = slots[nearness_X == nearness_X.max()]
                    table_RLE[source, layer, expert] = candidates[source % len(candidates)]
        return table_RLE

    @cached_property
    def device_of_expert_RLE(self) -> IntArray:
        """The device to which a source device sends the tokens of an expert: int32 [R, L, E]."""
        return (self.slot_of_expert_RLE // self.slots_per_device).astype(np.int32)
