"""DeepSeek's expert-parallel load balancer, layer by layer in plain Python: what the compiled one is held to."""

from collections.abc import Sequence
from fractions import Fraction


def replicate(load_E: Sequence[float], num_slots: int) -> list[int]:
    """Return the expert in each slot: all once, then again and again the one whose copies carry most."""
    slots = list(range(len(load_E)))
    while len(slots) < num_slots:
        per_copy_E = [load / slots.count(expert) for expert, load in enumerate(load_E)]
        in_turn = len(slots) % len(load_E)
        slots.append(per_copy_E.index(max(per_copy_E)) if any(load_E) else in_turn)
    return slots


def pack(load_N: Sequence[float], num_packs: int) -> list[list[int]]:
    """Return the items of each pack: heaviest first, each into the lightest pack with room."""
    room = len(load_N) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for item in sorted(range(len(load_N)), key=lambda item: (-load_N[item], item)):
        with_room = [number for number in range(num_packs) if len(packs[number]) < room]
        lightest = min(with_room, key=lambda number: (sum(load_N[i] for i in packs[number]), number))
        packs[lightest].append(item)
    return packs


def balance(load_E: Sequence[float], num_slots: int, num_devices: int) -> list[int]:
    """Return the expert in each slot, device after device: EPLB's global policy."""
    slots = replicate(load_E, num_slots)
    load_P = [load_E[expert] / slots.count(expert) for expert in slots]
    return [slots[slot] for slots_of_device in pack(load_P, num_devices) for slot in slots_of_device]


def balance_in_nodes(
    load_E: Sequence[float], num_slots: int, num_groups: int, num_nodes: int, num_devices: int
) -> list[int]:
    """Return the expert in each slot, device after device: EPLB's hierarchical policy."""
    size = len(load_E) // num_groups
    load_G = [sum(load_E[group * size : (group + 1) * size]) for group in range(num_groups)]
    placed = []
    for groups in pack(load_G, num_nodes):
        experts = [expert for group in groups for expert in range(group * size, (group + 1) * size)]
        local = balance([load_E[expert] for expert in experts], num_slots // num_nodes, num_devices // num_nodes)
        placed += [experts[i] for i in local]
    return placed


def device_loads(load_E: Sequence[int], slots: Sequence[int], num_devices: int) -> list[Fraction]:
    """Return the load of each device, exactly; that of an expert is split evenly over its copies."""
    per_device = len(slots) // num_devices
    return [
        sum((Fraction(load_E[e], slots.count(e)) for e in slots[d * per_device : (d + 1) * per_device]), Fraction())
        for d in range(num_devices)
    ]
