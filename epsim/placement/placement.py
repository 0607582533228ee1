"""`Placement`: which physical expert (slot) of which device holds which logical expert, in every MoE layer.

Which of several replicas a device sends to is the rule of `nearness_RR` and `choose_replica`. Canonical form
`physical_to_logical_LP`, slots contiguous per device. Letters: L MoE layers, E logical experts, P physical experts
(slots), R devices, X replicas of an expert.
"""

from dataclasses import dataclass
from functools import cached_property

import numba
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

        Of several, the one that `choose_replica` says.
        """
        if self.physical_to_logical_LP.shape[1] > self.num_experts:
            nearness = nearness_RR(self.node_of_device_R, self.group_of_device_R)
            return np.asarray(
                _slot_table(self.physical_to_logical_LP, self.num_experts, self.slots_per_device, nearness)
            )
        slot_LE = np.argsort(self.physical_to_logical_LP, axis=1, kind="stable").astype(np.int32)
        return np.tile(slot_LE, (self.num_devices, 1, 1))

    @cached_property
    def device_of_expert_RLE(self) -> IntArray:
        """The device to which a source device sends the tokens of an expert: int32 [R, L, E]."""
        return (self.slot_of_expert_RLE // self.slots_per_device).astype(np.int32)


def nearness_RR(node_of_device_R: npt.NDArray[np.integer], group_of_device_R: IntArray | None = None) -> IntArray:
    """Return how near each device is to a source, int32 [source, device].

    4: itself, 3: in its group and node, 2: in its group, 1: in its node, 0: elsewhere. None: all in one group.
    """
    groups_R = np.zeros_like(node_of_device_R) if group_of_device_R is None else group_of_device_R
    same_group_RR, same_node_RR = (ids_R[:, None] == ids_R for ids_R in (groups_R, node_of_device_R))
    found_RR: IntArray = 2 * same_group_RR.astype(np.int32) + same_node_RR.astype(np.int32)
    np.fill_diagonal(found_RR, 4)
    return found_RR


@numba.njit(cache=True, nogil=True)
def choose_replica(device_X, num_replicas, source, nearness_R):  # type: ignore[no-untyped-def]
    """Return which of the first replicas, in the order of their slots, a source sends to: its place in `device_X`.

    device_X: the device of each. nearness_R: the source's row of `nearness_RR`. Of the n that are nearest the source
    takes number (source mod n), a choice fixed in advance as SGLang's static dispatch makes it.
    """
    nearest, num_nearest = -1, 0
    for x in range(num_replicas):
        near = nearness_R[device_X[x]]
        if near > nearest:
            nearest, num_nearest = near, 0
        num_nearest += near == nearest
    number = source % num_nearest
    for x in range(num_replicas):
        if nearness_R[device_X[x]] == nearest:
            if number == 0:
                return x
            number -= 1
    return -1  # there are no replicas


@numba.njit(cache=True, nogil=True)
def _slot_table(p2l_LP, num_experts, slots_per_device, nearness_RR):  # type: ignore[no-untyped-def]
    """Return `Placement.slot_of_expert_RLE`."""
    num_layers, num_slots = p2l_LP.shape
    num_sources = len(nearness_RR)
    table_RLE = np.empty((num_sources, num_layers, num_experts), np.int32)
    slot_EX = np.empty((num_experts, num_slots), np.int32)
    device_X = np.empty(num_slots, np.int64)
    for layer in range(num_layers):
        num_replicas_E = np.zeros(num_experts, np.int64)
        for slot in range(num_slots):
            expert = p2l_LP[layer, slot]
            if expert >= 0:
                slot_EX[expert, num_replicas_E[expert]] = slot
                num_replicas_E[expert] += 1
        for expert in range(num_experts):
            num_replicas = num_replicas_E[expert]
            device_X[:num_replicas] = slot_EX[expert, :num_replicas] // slots_per_device
            for source in range(num_sources):
                chosen = choose_replica(device_X, num_replicas, source, nearness_RR[source])
                table_RLE[source, layer, expert] = slot_EX[expert, chosen]
    return table_RLE
