"""From one placement to the next with as few weights on the way as can be: `settle`, `moved_experts_RR`.

Letters: L MoE layers, E experts, P slots, R devices (sender, then receiver), D devices alike, X slots of a device.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.placement import Placement

Ints = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int32]


def settle(old: Placement, new: Placement, cluster: Cluster, *, match_devices: bool) -> Placement:
    """Return the new placement with what it has in common with the old one left where it is.

    An expert that stays on its device keeps its slot. match_devices: before that, in each layer, devices of one node
    with the same figures trade all that they hold, so that most experts stay (an assignment problem; where nothing is
    gained, each keeps its own): they are alike to a policy as long as homes do not follow the placement.
    """
    slots_LRX = _by_device(new).copy()
    if match_devices:
        for devices in _alike(cluster):
            _match(old, slots_LRX, devices)
    if slots_LRX.shape == _by_device(old).shape:
        for old_X, new_X in zip(_rows(_by_device(old)), _rows(slots_LRX), strict=True):
            new_X[:] = _keep_slots(old_X, new_X)
    return replace(new, physical_to_logical_LP=slots_LRX.reshape(new.num_layers, -1))


def moved_experts_RR(old: Placement, new: Placement, cluster: Cluster) -> Ints:
    """Return how many experts, of all layers, each device sends to each other one to get to the new placement.

    A device that holds an expert in the old placement needs nothing, and takes it once however many slots it gets.
    Others take it from the holder with the widest route, of several from the one with the fewest links between, then
    from the one that sends least so far, then from the first; layer by layer, device by device.
    """
    has_old_LRE, has_new_LRE = (_held(_by_device(placement), placement.num_experts) for placement in (old, new))
    num_links_RR = (cluster.routes_RRH >= 0).sum(axis=2)
    experts_RR = np.zeros((cluster.num_devices,) * 2, dtype=np.int64)
    for layer, device, expert in np.argwhere(has_new_LRE & ~has_old_LRE):
        holders = np.flatnonzero(has_old_LRE[layer, :, expert])
        far = cluster.route_s_per_byte_RR[holders, device], num_links_RR[holders, device]
        order = np.lexsort((holders, experts_RR[holders].sum(axis=1), far[1], far[0]))
        experts_RR[holders[order[0]], device] += 1
    return experts_RR


def _by_device(placement: Placement) -> Slots:
    return placement.physical_to_logical_LP.reshape(placement.num_layers, placement.num_devices, -1)


def _rows(slots_LRX: Slots) -> Iterator[Slots]:
    """Yield the slots of each layer and device, as views."""
    yield from slots_LRX.reshape(-1, slots_LRX.shape[2])


def _held(slots_LRX: Slots, num_experts: int) -> npt.NDArray[np.bool_]:
    """Return whether a device holds an expert, bool [L, R, E]."""
    held_LRE = np.zeros((*slots_LRX.shape[:2], num_experts + 1), dtype=np.bool_)  # the last column: empty slots, -1
    np.put_along_axis(held_LRE, slots_LRX.astype(np.int64), True, axis=2)
    return held_LRE[:, :, :-1]


def _alike(cluster: Cluster) -> Iterator[Ints]:
    """Yield the devices of each node that have the same figures, where there are two or more."""
    figures = [replace(device, name="", type_name="") for device in cluster.devices]
    left = list(range(cluster.num_devices))
    while left:
        devices = [device for device in left if figures[device] == figures[left[0]]]
        left = [device for device in left if device not in devices]
        if len(devices) > 1:
            yield np.array(devices, dtype=np.int64)


def _match(old: Placement, slots_LRX: Slots, devices: Ints) -> None:
    """Trade what these devices hold in each layer."""
    from scipy.optimize import linear_sum_assignment  # here: slow to load

    old_LDE = _held(_by_device(old)[:, devices], old.num_experts).astype(np.int64)
    new_LDE = _held(slots_LRX[:, devices], old.num_experts).astype(np.int64)
    for layer, common_DD in enumerate(new_LDE @ old_LDE.swapaxes(1, 2)):  # [new, old]
        source, target = linear_sum_assignment(common_DD, maximize=True)
        if common_DD[source, target].sum() > np.trace(common_DD):
            slots_LRX[layer, devices[target]] = slots_LRX[layer, devices[source]]


def _keep_slots(old_X: Slots, new_X: Slots) -> list[int]:
    """Return the experts of new_X, those that are in old_X in their former slots, the others in their order."""
    left = Counter(new_X.tolist())
    kept: list[int | None] = [None] * len(new_X)
    for slot, expert in enumerate(old_X.tolist()):
        if left[expert]:
            left[expert] -= 1
            kept[slot] = expert
    others = iter(list(left.elements()))  # in the order in which new_X first has them
    return [next(others) if expert is None else expert for expert in kept]
