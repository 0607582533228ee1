"""The traffic kernel said slowly, token by token: `count_traffic`, `count_remote`, and the rules that they need.

Letters as in `epsim.traffic`: T tokens, L layers, K top-k, E experts, P slots, R devices, N nodes, C chunks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from epsim.placement import Placement
from epsim.traffic import StepTraffic


def slot_for(placement: Placement, source: int, layer: int, expert: int) -> int:
    """Return the slot that serves `expert` for the tokens of `source`: the nearest.

    Own device, else own group and node, else own group, else own node, else any.
    """
    slots = [p for p, e in enumerate(placement.physical_to_logical_LP[layer]) if e == expert]
    node_R = placement.node_of_device_R
    device = {p: p // placement.slots_per_device for p in slots}
    own_device = [p for p in slots if device[p] == source]
    own_node = [p for p in slots if node_R[device[p]] == node_R[source]]
    group_R = placement.group_of_device_R
    own_group = [p for p in slots if group_R is None or group_R[device[p]] == group_R[source]]
    own_group_and_node = [p for p in own_group if p in own_node]
    candidates = own_device or own_group_and_node or own_group or own_node or slots
    return candidates[source % len(candidates)]


def slots_of(placement: Placement) -> Callable[[int, int, int], int]:
    """Return `slot_for` of one placement, each answer worked out once."""
    return cache(lambda source, layer, expert: slot_for(placement, source, layer, expert))


def chunk_of_token(home_T: NDArray[np.int32], num_chunks: int) -> list[int]:
    """Return each token's chunk: token i of a home's n is in chunk c where n c // C <= i < n (c + 1) // C."""
    position: defaultdict[int, int] = defaultdict(int)
    total_of_home = Counter(home_T.tolist())
    chunks = []
    for home in home_T.tolist():
        total, i = total_of_home[home], position[home]
        chunks.append(next(c for c in range(num_chunks) if i < total * (c + 1) // num_chunks))
        position[home] += 1
    return chunks


def count_traffic(
    ids_TLK: NDArray[np.integer], home_T: NDArray[np.int32], placement: Placement, num_chunks: int
) -> StepTraffic:
    """Return what `TrafficCounter(placement, num_chunks).count(ids_TLK, home_T)` must return."""
    num_layers, num_slots = placement.physical_to_logical_LP.shape
    num_devices, num_nodes = placement.num_devices, int(placement.node_of_device_R.max()) + 1
    by_device = (num_layers, num_chunks, num_devices, num_devices)
    pairs, tokens = np.zeros(by_device, np.int64), np.zeros(by_device, np.int64)
    node_tokens = np.zeros((num_layers, num_chunks, num_devices, num_nodes), np.int64)
    slot_load = np.zeros((num_layers, num_chunks, num_slots), np.int64)
    find_slot = slots_of(placement)
    slots_used: defaultdict[tuple[int, int, int, int], set[int]] = defaultdict(set)
    source_slots_used: defaultdict[tuple[int, int, int], set[int]] = defaultdict(set)
    for home, chunk, ids_LK in zip(home_T.tolist(), chunk_of_token(home_T, num_chunks), ids_TLK, strict=True):
        for layer, ids_K in enumerate(ids_LK.tolist()):
            devices = []
            for expert in ids_K:
                slot = find_slot(home, layer, expert)
                device = slot // placement.slots_per_device
                devices.append(device)
                pairs[layer, chunk, home, device] += 1
                slot_load[layer, chunk, slot] += 1
                slots_used[layer, chunk, home, device].add(slot)
                source_slots_used[layer, home, device].add(slot)
            for device in set(devices):
                tokens[layer, chunk, home, device] += 1
            for node in {placement.node_of_device_R[device] for device in devices}:
                node_tokens[layer, chunk, home, node] += 1
    experts = np.zeros(by_device, np.int64)
    for index, used in slots_used.items():
        experts[index] = len(used)
    source_experts = np.zeros((num_layers, num_devices, num_devices), np.int64)
    for where, used in source_slots_used.items():
        source_experts[where] = len(used)
    return StepTraffic(
        pairs_LCRR=pairs,
        tokens_LCRR=tokens,
        node_tokens_LCRN=node_tokens,
        experts_LCRR=experts,
        source_experts_LRR=source_experts,
        slot_load_LCP=slot_load,
    )


def count_remote(
    ids_TLK: NDArray[np.integer], home_T: NDArray[np.int32], modality_T: NDArray[np.uint8], placement: Placement
) -> NDArray[np.int64]:
    """Return [modality, (pairs, remote pairs, visits, remote visits)]."""
    counts = np.zeros((2, 4), np.int64)
    find_slot = slots_of(placement)
    for home, modality, ids_LK in zip(home_T.tolist(), modality_T.tolist(), ids_TLK, strict=True):
        for layer, ids_K in enumerate(ids_LK.tolist()):
            slots = [find_slot(home, layer, expert) for expert in ids_K]
            remote = [slot for slot in slots if slot // placement.slots_per_device != home]
            counts[modality] += [len(slots), len(remote), 1, bool(remote)]
    return counts
