"""The two steps that the EPLB policies share: `replicate` copies loaded experts, `pack` deals loads into equal packs.

The algorithm is that of deepseek-ai/EPLB, written anew: greedy, compiled, in float64, all rows at once. A row is a
layer, or a node in a layer. The load of an expert is split evenly over its copies. Letters: X rows, E experts of a row,
P slots of a row, N items.
"""

import numba
import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.placement import IntArray
from epsim.placement.problem import PlacementProblem

Loads = npt.NDArray[np.float64]


def count_slots(problem: PlacementProblem, redundant_experts: int) -> int:
    """Return the slots of a layer, experts and redundant ones.

    Raises PlacementError unless they divide over the devices and no device gets more slots than there are experts.
    """
    num_experts, num_devices = problem.num_experts, problem.num_devices
    num_slots = num_experts + redundant_experts
    most = num_experts * (num_devices - 1)
    if redundant_experts > most:
        raise PlacementError(
            f"placement.redundant_experts: {redundant_experts} is more than a copy of each of {num_experts} experts on "
            f"each of {num_devices} devices; use {most} or less"
        )
    if num_slots % num_devices:
        raise PlacementError(
            f"placement.redundant_experts: {num_experts} experts + {redundant_experts} = {num_slots} slots do not "
            f"divide over {num_devices} devices; use e.g. {redundant_experts + -num_slots % num_devices}"
        )
    return num_slots


def replicate_and_pack(load_XE: Loads, num_slots: int, num_devices: int) -> IntArray:
    """Return the expert in each slot, [X, P], the slots of device 0 of the row first."""
    expert_XP, load_XP = replicate(load_XE, num_slots)
    return np.take_along_axis(expert_XP, pack(load_XP, num_devices), axis=1)


def replicate(load_XE: Loads, num_slots: int) -> tuple[IntArray, Loads]:
    """Give each slot beyond the first E to the expert whose copies carry most, one after the other.

    Returns the expert in each slot and the load of that copy, both [X, P]: slots 0 to E - 1 hold experts 0 to E - 1,
    the others what was added, in order. Of equals the expert with the lower number is copied; a row without any load
    says nothing of its experts, and they are copied in turn.
    """
    expert_XP = np.empty((len(load_XE), num_slots), np.int32)
    load_XP = np.empty((len(load_XE), num_slots))
    _replicate(np.ascontiguousarray(load_XE), expert_XP, load_XP)
    return expert_XP, load_XP


def pack(load_XN: Loads, num_packs: int) -> IntArray:
    """Deal N items into packs of N / num_packs, the heaviest first, each into the lightest pack that has room.

    Returns the item at each place, [X, N], the places of pack 0 first, within a pack in the order of arrival. Of equal
    items the one with the lower number goes first, of equal packs the one with the lower number takes it. Packs of one
    item have nothing to balance: item i is pack i.
    """
    num_rows, num_items = load_XN.shape
    if num_packs == num_items:
        return np.tile(np.arange(num_items, dtype=np.int32), (num_rows, 1))
    heaviest_first_XN = np.argsort(-load_XN, axis=1, kind="stable").astype(np.int32)
    item_XN = np.empty_like(heaviest_first_XN)
    _pack(load_XN, heaviest_first_XN, num_packs, item_XN)
    return item_XN


@numba.njit(cache=True)
def _replicate(load_XE, expert_XP, load_XP):  # type: ignore[no-untyped-def]
    num_rows, num_experts = load_XE.shape
    for x in range(num_rows):
        copies_E = np.ones(num_experts, np.int64)
        load_per_copy_E = load_XE[x].copy()
        for p in range(num_experts):
            expert_XP[x, p] = p
        for p in range(num_experts, expert_XP.shape[1]):
            fullest = 0
            for e in range(1, num_experts):
                if load_per_copy_E[e] > load_per_copy_E[fullest]:
                    fullest = e
            if load_per_copy_E[fullest] == 0.0:
                fullest = p % num_experts
            copies_E[fullest] += 1
            load_per_copy_E[fullest] = load_XE[x, fullest] / copies_E[fullest]
            expert_XP[x, p] = fullest
        for p in range(expert_XP.shape[1]):
            load_XP[x, p] = load_per_copy_E[expert_XP[x, p]]


@numba.njit(cache=True)
def _pack(load_XN, heaviest_first_XN, num_packs, item_XN):  # type: ignore[no-untyped-def]
    num_rows, num_items = load_XN.shape
    room = num_items // num_packs
    for x in range(num_rows):
        pack_load = np.zeros(num_packs)
        pack_items = np.zeros(num_packs, np.int64)
        for n in range(num_items):
            item = heaviest_first_XN[x, n]
            lightest = -1
            for candidate in range(num_packs):
                if pack_items[candidate] < room and (lightest < 0 or pack_load[candidate] < pack_load[lightest]):
                    lightest = candidate
            item_XN[x, lightest * room + pack_items[lightest]] = item
            pack_load[lightest] += load_XN[x, item]
            pack_items[lightest] += 1
