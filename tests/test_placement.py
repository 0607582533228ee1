"""Placements and homes: each policy by hand, what holds for all of them, and one message per bad file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.fitted import make_trace
from reference.tiny import make_placement
from reference.traffic import slot_for

from epsim.errors import PlacementError
from epsim.placement import (
    POLICIES,
    HomePlan,
    Homes,
    Placement,
    PlacementPolicy,
    PlacementProblem,
    balanced,
    by_modality,
)
from epsim.placement.from_file import FromFile
from epsim.placement.policies import Contiguous, ModalityBins, Random, RoundRobin, moving_load, text_bias
from epsim.placement.predicted_time import STARTS
from epsim.scenario.placement import PlacementSpec, SearchStart
from epsim.trace import RoutingTrace
from epsim.trace.statistics import expert_load

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def make_problem(
    num_layers: int, num_experts: int, node_R: list[int], load_MLE: list[Any] | None = None
) -> PlacementProblem:
    load = np.ones((2, num_layers, num_experts)) if load_MLE is None else np.array(load_MLE)
    return PlacementProblem(
        num_layers=num_layers,
        num_experts=num_experts,
        node_of_device_R=np.array(node_R, np.int32),
        expert_load_MLE=load.astype(np.int64),
    )


def one_line(error: pytest.ExceptionInfo[PlacementError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# The policies.


def test_contiguous_by_hand() -> None:
    placement = Contiguous().place(make_problem(2, 4, [0, 0]))
    assert placement.physical_to_logical_LP.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert placement.device_of_expert_RLE[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert (placement.policy, placement.slots_per_device) == ("contiguous", 2)


def test_round_robin_by_hand() -> None:
    # Six experts on three devices: 0 and 3, 1 and 4, 2 and 5.
    placement = RoundRobin().place(make_problem(1, 6, [0, 0, 0]))
    assert placement.physical_to_logical_LP.tolist() == [[0, 3, 1, 4, 2, 5]]
    assert placement.device_of_expert_RLE[1].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_random_depends_on_the_seed_alone() -> None:
    problem = make_problem(8, 16, [0, 0])
    first, again, other = (Random(seed=seed).place(problem).physical_to_logical_LP for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(row) for row in first.tolist()}) == 8  # a permutation of its own in every layer


def test_modality_bins_by_hand() -> None:
    # Text bias: 9/10, 1/10, 5/10, and 1/2 for the expert that never fired. From vision to text: 1, 2, 3, 0;
    # two bins {1, 2} and {0, 3}, ids ascending inside.
    load_MLE = [[[9, 1, 5, 0]], [[1, 9, 5, 0]]]
    problem = make_problem(1, 4, [0, 0], load_MLE)
    assert ModalityBins().place(problem).physical_to_logical_LP.tolist() == [[1, 2, 0, 3]]
    assert ModalityBins(num_bins=4).place(problem).physical_to_logical_LP.tolist() == [[1, 2, 3, 0]]
    assert ModalityBins(num_bins=1).place(problem).physical_to_logical_LP.tolist() == [[0, 1, 2, 3]]


def test_text_bias_by_hand() -> None:
    load_MLE = np.array([[[3, 0, 0, 2]], [[1, 4, 0, 2]]])
    assert text_bias(load_MLE).tolist() == [[0.75, 0.0, 0.5, 0.5]]


def momentum_trace() -> RoutingTrace:
    """Expert 0: text in requests 3 and 5, vision in 9; expert 1: vision in 3, text in 5 and 9; rows in any order."""
    rows = [(9, 0, 0), (3, 1, 0), (5, 1, 1), (9, 1, 1), (3, 0, 1), (5, 1, 0)]  # request, phase, expert
    requests, phases, experts = ([row[i] for row in rows] for i in range(3))
    return make_trace([[[e] for e in experts]], num_experts=2, phases=phases, requests=requests)


def test_moving_load_by_hand() -> None:
    # Momentum 1/4, batches of one request, 3, 5, 9: weights 3/4 x (1/16, 1/4, 1) = 3/64, 12/64, 48/64.
    load_MLE = moving_load(momentum_trace(), momentum=0.25, batch_requests=1)
    assert (load_MLE[:, 0] * 64).tolist() == [[3 + 12, 12 + 48], [48, 3]]
    # Batches {3, 5} and {9}: 3/16, 12/16.
    load_MLE = moving_load(momentum_trace(), momentum=0.25, batch_requests=2)
    assert (load_MLE[:, 0] * 16).tolist() == [[3 + 3, 3 + 12], [12, 3]]
    # Momentum 0 is the last batch alone; a batch of all requests has all.
    assert moving_load(momentum_trace(), momentum=0, batch_requests=1)[:, 0].tolist() == [[0, 1], [1, 0]]
    assert moving_load(momentum_trace(), momentum=0, batch_requests=7)[:, 0].tolist() == [[2, 2], [1, 1]]


def test_momentum_follows_the_latest_requests() -> None:
    # Plain counts: both 2 of text and 1 of vision, a tie. Of late expert 0 is vision's; of old it was text's.
    trace = momentum_trace()
    problem = replace(make_problem(1, 2, [0, 0], [[[2, 2]], [[1, 1]]]), trace=trace)
    assert ModalityBins().place(problem).physical_to_logical_LP.tolist() == [[0, 1]]
    assert ModalityBins(momentum=0.25).place(problem).physical_to_logical_LP.tolist() == [[0, 1]]
    renamed = make_trace(
        (1 - trace.topk_expert_ids_TLK).transpose(1, 0, 2).tolist(),
        num_experts=2,
        phases=trace.phase_T.tolist(),
        requests=trace.request_id_T.tolist(),
    )
    placement = ModalityBins(momentum=0.25).place(replace(problem, trace=renamed))
    assert placement.physical_to_logical_LP.tolist() == [[1, 0]]


def test_momentum_needs_a_trace() -> None:
    with pytest.raises(PlacementError) as error:
        ModalityBins(momentum=0.5).place(make_problem(1, 2, [0, 0]))
    assert one_line(error).startswith("placement.policy: modality_bins with momentum needs to know which experts each")


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), momentum=st.floats(0, 0.99), batch_requests=st.integers(1, 4))
def test_moving_load_equals_the_recurrence(seed: int, momentum: float, batch_requests: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(1, 20))
    requests, phases = rng.integers(0, 9, num_tokens).tolist(), rng.integers(0, 2, num_tokens).tolist()
    ids = rng.integers(0, 3, (2, num_tokens, 1)).tolist()
    trace = make_trace(ids, num_experts=3, phases=phases, requests=requests)
    mean_MLE = np.zeros((2, 2, 3))
    names = sorted(set(requests))
    for batch in (names[i : i + batch_requests] for i in range(0, len(names), batch_requests)):
        mean_MLE = momentum * mean_MLE + (1 - momentum) * expert_load(trace.select(batch))
    np.testing.assert_allclose(
        moving_load(trace, momentum=momentum, batch_requests=batch_requests), mean_MLE, atol=1e-12
    )


def test_modality_bins_sort_each_layer_by_itself() -> None:
    load_MLE = [[[1, 9], [9, 1]], [[9, 1], [1, 9]]]
    placement = ModalityBins().place(make_problem(2, 2, [0, 0], load_MLE))
    assert placement.physical_to_logical_LP.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("policy", [Contiguous(), RoundRobin(), Random(seed=0), ModalityBins()])
def test_experts_must_divide_over_the_devices(policy: PlacementPolicy) -> None:
    with pytest.raises(PlacementError) as error:
        policy.place(make_problem(1, 6, [0, 0, 0, 0]))
    assert one_line(error).startswith("placement: 6 experts do not divide over 4 devices; use ")


def test_bins_must_divide_the_experts() -> None:
    with pytest.raises(PlacementError) as error:
        ModalityBins(num_bins=3).place(make_problem(1, 4, [0, 0]))
    assert one_line(error) == "placement.num_bins: 3 does not divide 4 experts; use a divisor, e.g. 2"


def test_policies_are_listed_by_kind() -> None:
    assert list(POLICIES) == [
        get_args(spec.model_fields["policy"].annotation)[0] for spec in get_args(get_args(PlacementSpec)[0])
    ]
    assert all(policy.kind == kind for kind, policy in POLICIES.items())
    assert get_args(SearchStart) == tuple(STARTS)


@PROPERTY
@given(
    num_layers=st.integers(1, 4),
    num_devices=st.integers(1, 9),
    slots_per_device=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_policy_places_every_expert_once(
    num_layers: int, num_devices: int, slots_per_device: int, seed: int
) -> None:
    num_experts = num_devices * slots_per_device
    load_MLE = np.random.default_rng(seed).integers(0, 5, (2, num_layers, num_experts))
    problem = make_problem(num_layers, num_experts, [0] * num_devices, load_MLE.tolist())
    bins = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
    policies: list[PlacementPolicy] = [Contiguous(), RoundRobin(), Random(seed=seed)]
    for policy in policies + [ModalityBins(num_bins=num_bins) for num_bins in [None, *bins]]:
        placement = policy.place(problem)
        p2l_LP = placement.physical_to_logical_LP
        assert p2l_LP.dtype == np.int32
        assert p2l_LP.shape == (num_layers, num_experts)
        np.testing.assert_array_equal(np.sort(p2l_LP, axis=1), np.tile(np.arange(num_experts), (num_layers, 1)))
        assert placement.slots_per_device == slots_per_device
        layers = np.arange(num_layers)[:, None]
        for slot_LE in placement.slot_of_expert_RLE:  # the slot of an expert holds that expert
            np.testing.assert_array_equal(p2l_LP[layers, slot_LE], np.tile(np.arange(num_experts), (num_layers, 1)))


# The canonical form and its replicas.


def test_own_device_is_preferred_then_own_node() -> None:
    # One slot a device, nodes {0, 1} and {2, 3}. Expert 0 on devices 0, 2, 3; expert 1 on device 1 alone.
    placement = make_placement([[0, 1, 0, 0]], [0, 0, 1, 1], 2)
    assert placement.slot_of_expert_RLE[:, 0, 0].tolist() == [0, 0, 2, 3]
    assert placement.slot_of_expert_RLE[:, 0, 1].tolist() == [1, 1, 1, 1]


def test_among_equals_the_source_number_decides() -> None:
    # Nodes {0, 1}, {2, 3}, {4, 5}. Expert 0 on 0 and 1: sources 2, 3, 4, 5 take number source mod 2.
    # Expert 1 on 2 to 5: source 0 takes number 0 (device 2), source 1 number 1 (device 3); the others their own.
    placement = make_placement([[0, 0, 1, 1, 1, 1]], [0, 0, 1, 1, 2, 2], 2)
    assert placement.device_of_expert_RLE[:, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert placement.device_of_expert_RLE[:, 0, 1].tolist() == [2, 3, 2, 3, 4, 5]


def test_two_replicas_on_one_device() -> None:
    # Two slots a device, one node: device 0 has expert 0 twice, so source 1 takes number 1 mod 2, slot 1.
    placement = make_placement([[0, 0, 1, 1]], [0, 0], 2)
    assert placement.slot_of_expert_RLE[:, 0, 0].tolist() == [0, 1]
    assert placement.slot_of_expert_RLE[:, 0, 1].tolist() == [2, 3]


def test_own_group_goes_before_own_node() -> None:
    # Nodes {0, 1} and {2, 3}, groups {0, 2, 3} and {1}. Expert 0 on 1, 2 and 3: source 0 passes over device 1 in its
    # node and takes number 0 mod 2 of its group, device 2; source 1 has its own.
    placement = make_placement([[1, 0, 0, 0]], [0, 0, 1, 1], 2, [0, 1, 0, 0])
    assert placement.device_of_expert_RLE[:, 0, 0].tolist() == [2, 1, 2, 3]
    # Expert 1 is in group 0 alone: there source 1 takes what there is.
    assert placement.device_of_expert_RLE[:, 0, 1].tolist() == [0, 0, 0, 0]
    # With expert 0 in the node and elsewhere in the group, the one in both comes first, for odd sources too.
    both = make_placement([[1, 0, 0, 1]], [1, 0, 1, 1], 2, [0, 0, 0, 0])
    assert both.device_of_expert_RLE[:, 0, 0].tolist() == [2, 1, 2, 2]


def test_empty_slots_hold_nothing() -> None:
    # Device 0 has no expert in layer 0 and one in layer 1, where expert 0 is twice.
    placement = make_placement([[-1, -1, 0, 1], [-1, 0, 1, 0]], [0, 0], 2)
    assert placement.filled_slots_R.tolist() == [1, 4]
    assert placement.slot_of_expert_RLE[0].tolist() == [[2, 3], [1, 2]]
    assert placement.slot_of_expert_RLE[1].tolist() == [[2, 3], [3, 2]]


def test_by_modality_does_not_see_empty_slots() -> None:
    # Expert 1 is vision, expert 0 text; -1 would index the last expert, which would make device 0 the vision device.
    placement = make_placement([[0, -1, -1, 1, -1, -1]], [0, 0], 2)
    plan = by_modality(placement, np.array([[[9, 0]], [[0, 9]]]))
    assert (plan.prefill_devices.tolist(), plan.decode_devices.tolist()) == ([1], [0])


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), num_devices=st.integers(1, 8), num_experts=st.integers(1, 9))
def test_slot_choice_equals_the_reference(seed: int, num_devices: int, num_experts: int) -> None:
    rng = np.random.default_rng(seed)
    num_slots = num_devices * (-(-num_experts // num_devices) + int(rng.integers(0, 3)))
    extra = rng.integers(-1, num_experts, (2, num_slots - num_experts))
    p2l_LP = rng.permuted(np.hstack([np.tile(np.arange(num_experts), (2, 1)), extra]), axis=1)
    nodes, groups = (rng.integers(0, 3, num_devices).tolist() for _ in range(2))
    placement = make_placement(p2l_LP.tolist(), nodes, num_experts, groups if rng.random() < 0.5 else None)
    for (source, layer, expert), slot in np.ndenumerate(placement.slot_of_expert_RLE):
        assert slot == slot_for(placement, source, layer, expert)


@pytest.mark.parametrize(
    ("p2l_LP", "message"),
    [
        ([[0, 1, 2]], "placement: 3 slots do not divide over 2 devices; use a multiple of 2 slots"),
        (
            [[0, 1, 2, 3], [0, 1, 2, 4]],
            "placement: layer 1, slot 3 holds expert 4; experts are numbered 0 to 3, and -1 is an empty slot",
        ),
        (
            [[0, 1, 2, -2]],
            "placement: layer 0, slot 3 holds expert -2; experts are numbered 0 to 3, and -1 is an empty slot",
        ),
        (
            [[0, 1, 2, 2]],
            "placement: layer 0 has no slot for expert 3; every expert must be on some device",
        ),
    ],
)
def test_what_is_no_placement(p2l_LP: list[list[int]], message: str) -> None:
    with pytest.raises(PlacementError) as error:
        make_placement(p2l_LP, [0, 0], 4)
    assert one_line(error) == message


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="int32"):
        Placement(
            policy="test",
            num_experts=2,
            physical_to_logical_LP=np.array([[0, 1]], np.int64),
            node_of_device_R=np.zeros(2, np.int32),
        )
    with pytest.raises(ValueError, match="expert_load_MLE"):
        make_problem(2, 4, [0, 0], [[[1, 1, 1, 1]], [[1, 1, 1, 1]]])
    with pytest.raises(ValueError, match="same length"):
        Homes(prefill_Q=np.zeros(2, np.int32), decode_Q=np.zeros(3, np.int32))


# From a file.


def place_file(tmp_path: Path, content: object, problem: PlacementProblem) -> Placement:
    path = tmp_path / "placement.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return FromFile(path=path).place(problem)


def test_file_without_replicas(tmp_path: Path) -> None:
    rows = [[3, 1, 2, 0], [0, 2, 1, 3]]
    placement = place_file(tmp_path, {"physical_to_logical_map": rows}, make_problem(2, 4, [0, 0]))
    assert placement.physical_to_logical_LP.tolist() == rows
    assert placement.policy == "file"


def test_file_with_redundant_experts(tmp_path: Path) -> None:
    rows = [[0, 1, 0, 2, 0, 3]]
    placement = place_file(tmp_path, {"physical_to_logical_map": rows}, make_problem(1, 4, [0, 1]))
    assert placement.slots_per_device == 3
    assert placement.device_of_expert_RLE[:, 0, 0].tolist() == [0, 1]


def test_file_with_redundant_experts_where_the_experts_do_not_divide(tmp_path: Path) -> None:
    # Six experts on four devices: eight slots do what the message for six recommends.
    rows = [[0, 1, 2, 3, 4, 5, 0, 1]]
    placement = place_file(tmp_path, {"physical_to_logical_map": rows}, make_problem(1, 6, [0, 0, 0, 0]))
    assert placement.slots_per_device == 2


FORM = 'write a JSON object {"physical_to_logical_map": [layers][slots]} of expert ids'


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", f"is not JSON; {FORM}"),
        ('{"physical_to_logical_map": [[0, 1', f"is not JSON; {FORM}"),
        ([[0, 1, 2, 3]], f"has another form; {FORM}"),
        ({"logical_to_physical_map": [[0, 1, 2, 3]]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": []}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [[]]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [0, 1, 2, 3]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [["0", 1, 2, 3]]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [[0, 1, 2, 3.0]]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [[0, True, 2, 3]]}, f"has another form; {FORM}"),
        ({"physical_to_logical_map": [[0, 1, 2, 2**31]]}, f"has another form; {FORM}"),
        (
            {"physical_to_logical_map": [[0, 1, 2, 3]] * 3},
            "has 3 layers, the trace 2; write one row per MoE layer",
        ),
        (
            {"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]},
            "differ in length; each layer needs all slots",
        ),
        ({"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 9]]}, "layer 1, slot 3 holds expert 9"),
        ({"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 2]]}, "layer 1 has no slot for expert 3"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 0]] * 2}, "5 slots do not divide over 2 devices"),
    ],
)
def test_bad_file(tmp_path: Path, content: object, rule: str) -> None:
    with pytest.raises(PlacementError) as error:
        place_file(tmp_path, content, make_problem(2, 4, [0, 0]))
    message = one_line(error)
    assert message.startswith("placement")
    assert rule in message


def test_unreadable_file(tmp_path: Path) -> None:
    problem = make_problem(2, 4, [0, 0])
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(PlacementError) as error:
            FromFile(path=path).place(problem)
        assert one_line(error).startswith(f"placement.path: cannot read {path}: ")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlacementError, match="is not JSON"):
        FromFile(path=binary).place(problem)


# Homes.


def test_balanced_by_hand() -> None:
    homes = balanced(3).assign(5)
    assert homes.prefill_Q.tolist() == [0, 1, 2, 0, 1]
    assert homes.decode_Q.tolist() == [0, 1, 2, 0, 1]
    assert balanced(3).home_devices.tolist() == [0, 1, 2]
    assert balanced(3).assign(0).prefill_Q.shape == (0,)


def test_home_plan_takes_devices_in_turn() -> None:
    plan = HomePlan(prefill_devices=np.array([3, 1], np.int32), decode_devices=np.array([2], np.int32))
    homes = plan.assign(3)
    assert homes.prefill_Q.tolist() == [3, 1, 3]
    assert homes.decode_Q.tolist() == [2, 2, 2]
    assert plan.home_devices.tolist() == [1, 2, 3]


def test_by_modality_by_hand() -> None:
    # One expert a device. Shares of text: 4/16, 8/16, 1/16, 3/16; of vision: 1/8, 1/8, 5/8, 1/8. Vision among both:
    # 2/6, 2/10, 10/11, 2/5. From vision to text: 2, 3, 0, 1; the first half prefills, the second decodes.
    placement = make_placement([[0, 1, 2, 3]], [0, 0, 0, 0], 4)
    plan = by_modality(placement, np.array([[[4, 8, 1, 3]], [[1, 1, 5, 1]]]))
    assert plan.prefill_devices.tolist() == [2, 3]
    assert plan.decode_devices.tolist() == [0, 1]
    assert plan.assign(3).prefill_Q.tolist() == [2, 3, 2]


def test_by_modality_adds_layers_and_follows_the_placement() -> None:
    # The vision expert is 0 in layer 0 and 1 in layer 1; both lie on device 1.
    load_MLE = np.array([[[0, 5], [5, 0]], [[5, 0], [0, 5]]])
    plan = by_modality(make_placement([[1, 0], [0, 1]], [0, 0], 2), load_MLE)
    assert (plan.prefill_devices.tolist(), plan.decode_devices.tolist()) == ([1], [0])


def test_by_modality_splits_the_load_of_replicas() -> None:
    # Expert 0 on device 0; expert 1 on devices 1 and 2, half of its load on each: a tie, kept in device order.
    plan = by_modality(make_placement([[0, 1, 1]], [0, 0, 0], 2), np.array([[[0, 6]], [[4, 2]]]))
    assert (plan.prefill_devices.tolist(), plan.decode_devices.tolist()) == ([0], [1, 2])


def test_by_modality_at_the_edges() -> None:
    one = by_modality(make_placement([[0, 1]], [0], 2), np.ones((2, 1, 2), np.int64))
    assert (one.prefill_devices.tolist(), one.decode_devices.tolist()) == ([0], [0])
    silent = by_modality(make_placement([[0, 1]], [0, 0], 2), np.zeros((2, 1, 2), np.int64))
    assert (silent.prefill_devices.tolist(), silent.decode_devices.tolist()) == ([0], [1])
