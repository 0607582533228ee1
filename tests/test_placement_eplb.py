"""EPLB's two policies: each step by hand, the published example, a plain reference, what always holds, errors.

Letters: L layers, E experts, P slots, R devices.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.eplb import balance, balance_in_nodes, device_loads

from epsim.errors import EpsimError, PlacementError
from epsim.metrics import balancedness
from epsim.placement import PlacementProblem
from epsim.placement.eplb_global import EplbGlobal
from epsim.placement.eplb_hierarchical import EplbHierarchical
from epsim.placement.eplb_packing import pack, replicate
from epsim.scenario import check_scenario

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

# The example of EPLB's README: 2 layers, 12 experts, 16 slots, 4 groups, 2 nodes of 4 devices, and its map.
PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def make_problem(load_LE: list[list[int]], node_R: list[int]) -> PlacementProblem:
    """Return a problem in which text has a third of the loads, rounded down, and vision the rest."""
    loads = np.array(load_LE, np.int64)
    return PlacementProblem(
        num_layers=loads.shape[0],
        num_experts=loads.shape[1],
        node_of_device_R=np.array(node_R, np.int32),
        expert_load_MLE=np.stack([loads // 3, loads - loads // 3]),
    )


def slots_of(policy: EplbGlobal | EplbHierarchical, load_LE: list[list[int]], node_R: list[int]) -> list[list[int]]:
    placement = policy.place(make_problem(load_LE, node_R))
    assert placement.policy == policy.kind
    return placement.physical_to_logical_LP.tolist()


# The steps.


def test_replicate_by_hand() -> None:
    # Loads 12, 7, 5. Slot 3: expert 0 carries most; its copies then 6 each. Slot 4: expert 1 with 7, then 3.5 each.
    # Slot 5: expert 0 with 6, then 4 each. Slot 6: expert 2 with 5.
    expert_XP, load_XP = replicate(np.array([[12.0, 7.0, 5.0]]), 7)
    assert expert_XP.tolist() == [[0, 1, 2, 0, 1, 0, 2]]
    assert load_XP.tolist() == [[4.0, 3.5, 2.5, 4.0, 3.5, 4.0, 2.5]]


def test_replicate_takes_the_lower_of_equals() -> None:
    # 6 and 6: expert 0 (then 3 and 6), expert 1 (3 and 3), expert 0 again.
    assert replicate(np.array([[6.0, 6.0]]), 5)[0].tolist() == [[0, 1, 0, 1, 0]]


def test_rows_without_load_are_copied_in_turn() -> None:
    expert_XP, load_XP = replicate(np.array([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), 8)
    assert expert_XP.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 1, 1, 1, 1, 1]]
    assert load_XP[0].tolist() == [0.0] * 8
    assert load_XP[1].sum() == pytest.approx(4.0)


def test_pack_by_hand() -> None:
    # Loads 5, 9, 1, 7, 2, 4 into two packs of three, heaviest first: item 1 (9) into pack 0; 3 (7) into 1, 0 (5) into
    # 1 (7 < 9, then 12), 5 (4) into 0 (then 13), 4 (2) into 1 (12 < 13, then 14 and full), 2 (1) into 0.
    assert pack(np.array([[5.0, 9.0, 1.0, 7.0, 2.0, 4.0]]), 2).tolist() == [[1, 5, 2, 3, 0, 4]]


def test_pack_ties() -> None:
    # All equal: item 0 into pack 0, 1 into 1, 2 into 0, 3 into 1. Without load pack 0 stays the lightest until full.
    assert pack(np.array([[3.0] * 4, [0.0] * 4]), 2).tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]


def test_packs_of_one_item_keep_the_order() -> None:
    assert pack(np.array([[1.0, 3.0, 2.0]]), 3).tolist() == [[0, 1, 2]]


def test_global_by_hand() -> None:
    # Loads 8, 2, 3, 1 and two more slots: expert 0 (4 each), again expert 0 (8/3 each; 4 > 3). Copies of experts 0, 1,
    # 2, 3, 0, 0 with 8/3, 2, 3, 1, 8/3, 8/3. Heaviest first: 2 (3) on device 0, 0 (8/3) on 1, 0 on 1 (8/3 < 3; then
    # 16/3), 0 on 0 (3 < 16/3, then 17/3), 1 (2) on 1 (full, 22/3), 3 (1) on 0 (20/3).
    policy = EplbGlobal(redundant_experts=2)
    assert slots_of(policy, [[8, 2, 3, 1]], [0, 1]) == [[2, 0, 3, 0, 0, 1]]


def test_hierarchical_by_hand() -> None:
    # Groups {0, 1}, {2, 3}, {4, 5}, {6, 7} with 3, 10, 7, 8: group 1 (10) to node 0, 3 (8) to node 1, 2 (7) to node 1
    # (8 < 10, full), 0 to node 0. Node 0 has experts 2, 3, 0, 1 with 9, 1, 2, 1 and two slots more: both to expert 2
    # (4.5, then 3 each). Copies 3, 1, 2, 1, 3, 3 of 2, 3, 0, 1, 2, 2 on devices 0 and 1: 3 on 0, 3 on 1, 3 on 0 (6),
    # 2 (expert 0) on 1 (5), 1 (expert 3) on 1 (6, full), 1 (expert 1) on 0.
    # Node 1 has experts 6, 7, 4, 5 with 4, 4, 3, 4: one copy more of 6, one of 7. Copies of 6, 7, 4, 5, 6, 7 with 2, 2,
    # 3, 4, 2, 2 on devices 2 and 3: 4 (expert 5) on 2, 3 (expert 4) on 3, 2 (6) on 3 (5), 2 (7) on 2 (6), 2 (6) on 3
    # (full), 2 (7) on 2.
    load_LE = [[2, 1, 9, 1, 3, 4, 4, 4]]
    policy = EplbHierarchical(num_groups=4, redundant_experts=4)
    assert slots_of(policy, load_LE, [0, 0, 1, 1]) == [[2, 2, 1, 2, 0, 3, 5, 7, 7, 4, 6, 6]]


def test_the_published_example() -> None:
    node_R = [0, 0, 0, 0, 1, 1, 1, 1]
    ours = slots_of(EplbHierarchical(num_groups=4, redundant_experts=4), PUBLISHED_LOADS, node_R)
    assert ours == PUBLISHED_MAP
    # Layer 0, by hand: devices of node 0 carry 165/2 + 39, 165/2 + 4, 73 + 104/2, 61 + 104/2, those of node 1
    # 183/2 + 56, 183/2 + 40, 90 + 132/2, 86 + 132/2: at most 156, where the mean is 1033 / 8 = 129.125.
    loads = [device_loads(load_E, slots, 8) for load_E, slots in zip(PUBLISHED_LOADS, ours, strict=True)]
    assert [float(load) for load in loads[0]] == [121.5, 86.5, 125.0, 113.0, 147.5, 131.5, 156.0, 152.0]
    # Layer 1: experts 7, 10 | 6, 8 | 6, 11 | 8, 9 | 2, 4 | 5, 1 | 5, 0 | 3, 1; the fullest 187/2 + 172/2 = 179.5.
    assert float(max(loads[1])) == 179.5
    found = balancedness([np.array(loads[:1], float)])
    assert found is not None
    assert found["ratio_of_sums"] == 129.125 / 156


# Against the reference, and what always holds.


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int, int]:
    """Draw loads [L][E], the node of each device, the number of groups, and of redundant experts."""
    num_nodes, devices_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    num_groups = num_nodes * draw(st.integers(1, 3))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_devices = num_nodes * devices_per_node
    fewest = -(-num_experts // num_devices)
    redundant = draw(st.integers(fewest, min(fewest + 2, num_experts))) * num_devices - num_experts
    load = st.integers(0, draw(st.sampled_from([0, 3, 1000, 10**9])))
    row = st.lists(load, min_size=num_experts, max_size=num_experts)
    load_LE = draw(st.lists(row, min_size=1, max_size=3))
    return load_LE, [node for node in range(num_nodes) for _ in range(devices_per_node)], num_groups, redundant


def check_slots(slots: list[int], load_E: list[int], num_devices: int, redundant: int) -> None:
    assert set(slots) == set(range(len(load_E)))
    assert len(slots) == len(load_E) + redundant  # Placement gives each device the same number
    if any(load_E):  # a copy more goes only where no expert's copies carry more
        per_copy = [load / slots.count(expert) for expert, load in enumerate(load_E)]
        before = [load / (slots.count(e) - 1) for e, load in enumerate(load_E) if slots.count(e) > 1]
        assert min(before, default=np.inf) >= max(per_copy) or redundant == 0
    assert sum(device_loads(load_E, slots, num_devices)) == sum(load_E)


@PROPERTY
@given(problems())
def test_global_equals_the_reference(drawn: tuple[list[list[int]], list[int], int, int]) -> None:
    load_LE, node_R, _, redundant = drawn
    num_slots = len(load_LE[0]) + redundant
    found = slots_of(EplbGlobal(redundant_experts=redundant), load_LE, node_R)
    for load_E, slots in zip(load_LE, found, strict=True):
        assert slots == balance(load_E, num_slots, len(node_R))
        check_slots(slots, load_E, len(node_R), redundant)


@PROPERTY
@given(problems())
def test_hierarchical_equals_the_reference(drawn: tuple[list[list[int]], list[int], int, int]) -> None:
    load_LE, node_R, num_groups, redundant = drawn
    num_experts, num_nodes = len(load_LE[0]), node_R[-1] + 1
    policy = EplbHierarchical(num_groups=num_groups, redundant_experts=redundant)
    for load_E, slots in zip(load_LE, slots_of(policy, load_LE, node_R), strict=True):
        assert slots == balance_in_nodes(load_E, num_experts + redundant, num_groups, num_nodes, len(node_R))
        nodes = np.array_split(slots, num_nodes)
        groups = [set((node // (num_experts // num_groups)).tolist()) for node in nodes]
        assert sum(map(len, groups)) == len(set().union(*groups)) == num_groups  # no group in two nodes
        assert {len(group) for group in groups} == {num_groups // num_nodes}
        for node, devices in zip(nodes, np.array_split(node_R, num_nodes), strict=True):
            experts = np.unique(node)
            local = np.searchsorted(experts, node).tolist()
            check_slots(local, [load_E[e] for e in experts], len(devices), redundant // num_nodes)


def test_one_group_in_one_node_is_global() -> None:
    hierarchical = EplbHierarchical(num_groups=1, redundant_experts=4)
    assert slots_of(hierarchical, PUBLISHED_LOADS, [0] * 8) == slots_of(
        EplbGlobal(redundant_experts=4), PUBLISHED_LOADS, [0, 0, 1, 1, 2, 2, 3, 3]
    )


def test_nodes_may_have_any_numbers() -> None:
    policy = EplbHierarchical(num_groups=4, redundant_experts=4)
    assert slots_of(policy, PUBLISHED_LOADS, [7, 7, 7, 7, 2, 2, 2, 2]) == PUBLISHED_MAP


# Where a policy does not apply.

INSTEAD = "or policy eplb_global, which knows neither groups nor nodes"


@pytest.mark.parametrize(
    ("policy", "node_R", "message"),
    [
        (
            EplbGlobal(redundant_experts=3),
            [0, 0, 1, 1],
            "placement.redundant_experts: 12 experts + 3 = 15 slots do not divide over 4 devices; use e.g. 4",
        ),
        (
            EplbGlobal(),
            [0] * 5,
            "placement.redundant_experts: 12 experts + 0 = 12 slots do not divide over 5 devices; use e.g. 3",
        ),
        (
            EplbGlobal(redundant_experts=14),
            [0, 0],
            "placement.redundant_experts: 14 is more than a copy of each of 12 experts on each of 2 devices; "
            "use 12 or less",
        ),
        (
            EplbHierarchical(num_groups=4, redundant_experts=2),
            [0, 0, 1, 1],
            "placement.redundant_experts: 12 experts + 2 = 14 slots do not divide over 4 devices; use e.g. 4",
        ),
        (
            EplbHierarchical(num_groups=5),
            [0, 0],
            "placement.num_groups: 5 does not divide 12 experts; use the number of groups of the router, " + INSTEAD,
        ),
        (
            EplbHierarchical(num_groups=3),
            [0, 0, 1, 1],
            "placement.num_groups: 3 groups do not divide over 2 nodes; use a number of nodes that divides the groups, "
            + INSTEAD,
        ),
        (
            EplbHierarchical(num_groups=4),
            [0, 0, 1],
            "placement.policy: eplb_hierarchical needs nodes of the same number of devices, one after the other; here "
            "2 nodes come in turns of 2, 1 devices; use such a cluster, " + INSTEAD,
        ),
        (
            EplbHierarchical(num_groups=4),
            [0, 1, 0, 1],
            "placement.policy: eplb_hierarchical needs nodes of the same number of devices, one after the other; here "
            "2 nodes come in turns of 1, 1, 1, 1 devices; use such a cluster, " + INSTEAD,
        ),
    ],
)
def test_a_policy_that_does_not_apply_says_so(
    policy: EplbGlobal | EplbHierarchical, node_R: list[int], message: str
) -> None:
    with pytest.raises(PlacementError) as error:
        policy.place(make_problem(PUBLISHED_LOADS, node_R))
    assert str(error.value) == message


SCENARIO: dict[str, Any] = {"name": "s", "model": "olmoe", "cluster": "h100-2x8", "trace": {"kind": "zipf"}}


def test_the_fields_of_a_scenario() -> None:
    placement = {"policy": "eplb_hierarchical", "num_groups": 8}
    shown = check_scenario({**SCENARIO, "placement": placement}).placement.model_dump()
    assert shown == {**placement, "redundant_experts": 0}


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"policy": "eplb_hierarchical"}, "placement.num_groups: is missing; write it"),
        (
            {"policy": "eplb_hierarchical", "num_groups": 0},
            "placement.num_groups: 0 is not above 0; write a larger number",
        ),
        (
            {"policy": "eplb_global", "redundant_experts": -1},
            "placement.redundant_experts: -1 is below 0; write 0 or more",
        ),
        (
            {"policy": "eplb_global", "num_groups": 4},
            "placement.num_groups: is not a known field; known are policy, redundant_experts",
        ),
    ],
)
def test_bad_fields(placement: dict[str, Any], message: str) -> None:
    with pytest.raises(EpsimError) as error:
        check_scenario({**SCENARIO, "placement": placement})
    assert str(error.value) == message
