"""`replicated`: what a copy changes beside the objective, greedy choices by hand, invariants, and its memory."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.fitted import make_fit_problem, make_trace, random_fit_problem

from epsim.errors import PlacementError
from epsim.placement import FitTokens, Placement, PlacementProblem, TransferObjective
from epsim.placement.policies import Contiguous
from epsim.placement.replicated import BASES, CopyState, Replicated
from epsim.report.trace_stats import notes
from epsim.run import check, simulate
from epsim.scenario import check_scenario
from epsim.scenario.placement import ReplicatedSpec
from epsim.trace_stats import Spread, trace_stats

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def states(problem: PlacementProblem) -> tuple[FitTokens, list[CopyState]]:
    """Return the tokens of a problem, and the state of each layer in which the experts lie contiguously."""
    assert problem.trace is not None
    tokens = FitTokens.of(problem.trace)
    device_of_expert_LE = Contiguous().place(problem).device_of_expert_RLE[0]
    return tokens, [
        CopyState.of(ids_TK, tokens.phase_T, problem.objective, device_E, num_experts=problem.num_experts)
        for ids_TK, device_E in zip(tokens.ids_LTK, device_of_expert_LE, strict=True)
    ]


def placement_of(problem: PlacementProblem, holds_LER: np.ndarray) -> Placement:
    """Return the placement in which devices hold these experts, with empty slots where there are fewer."""
    slots = np.full((len(holds_LER), problem.num_devices, problem.num_experts), -1, np.int32)
    for layer, expert, device in np.argwhere(holds_LER):
        slots[layer, device, expert] = expert
    return problem.placement("test", slots.reshape(len(holds_LER), -1))


def total_cost_L(problem: PlacementProblem, tokens: FitTokens, placement: Placement) -> np.ndarray:
    return problem.objective.cost_L(tokens, placement.device_of_expert_RLE) * tokens.num_tokens


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_each_copy_changes_the_objective_by_what_it_says_and_none_would_be_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_fit_problem(rng, min_devices=2, max_devices=5, max_experts=10)
    tokens, (state, other) = states(problem)
    spare_slots = min(2, problem.num_experts - problem.num_experts // problem.num_devices)

    def cost(holds_ER: np.ndarray) -> float:
        return float(total_cost_L(problem, tokens, placement_of(problem, np.stack([holds_ER, other.holds_ER])))[0])

    for expert, device, change in state.copies(spare_slots):
        before, change_ER = cost(state.holds_ER), state.change_ER
        assert np.isinf(change_ER[state.holds_ER]).all()
        for e, d in rng.permutation(np.argwhere(~state.holds_ER))[:4]:
            with_copy = state.holds_ER.copy()
            with_copy[e, d] = True
            assert change_ER[e, d] == pytest.approx(cost(with_copy) - before, abs=1e-9)
        has_room_R = state.num_copies_R < spare_slots
        assert has_room_R[device]
        assert change == change_ER[expert, device] <= change_ER[:, has_room_R].min() + 1e-9


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_what_holds_for_every_replicated_placement(seed: int, data: st.DataObject) -> None:
    problem = random_fit_problem(np.random.default_rng(seed), min_devices=2, max_devices=4, max_experts=8)
    per_device = problem.num_experts // problem.num_devices
    spare_slots = data.draw(st.integers(0, problem.num_experts - per_device))
    placement = Replicated(base="contiguous", spare_slots=spare_slots).place(problem)
    assert placement.slots_per_device == per_device + spare_slots
    slots_LRX = placement.physical_to_logical_LP.reshape(problem.num_layers, problem.num_devices, -1)
    np.testing.assert_array_equal(slots_LRX[:, :, :per_device].reshape(2, -1), [range(problem.num_experts)] * 2)
    assert all(len(set(slots)) == len(slots) and min(slots) >= 0 for row in slots_LRX.tolist() for slots in row)
    # The changes of the copies add up to the change of the whole; on two devices none of them can be a loss.
    tokens, layers = states(problem)
    changes_L = [sum(change for _, _, change in state.copies(spare_slots)) for state in layers]
    base_L = total_cost_L(problem, tokens, Contiguous().place(problem))
    np.testing.assert_allclose(total_cost_L(problem, tokens, placement), base_L + changes_L, atol=1e-9)
    if problem.num_devices == 2:
        assert max(changes_L) <= 1e-9


def test_by_hand() -> None:
    # Devices {0, 1} and {2, 3}, half of the tokens live on either. {0, 2} four times and {1, 3} twice touch the other
    # device wherever they live, {0, 1} three times from device 1 alone: 4 + 2 + 3/2 = 7.5 transfers.
    # A copy of 2 on device 0, or of 0 on device 1, saves 4/2; of 3 on 0, or of 1 on 1, 2/2; {0, 1} needs both there.
    # Of the two best the expert chosen more often: 0 (7 times, 2 only 4 times). Then 2 on device 0 still saves 4/2.
    ids = [[0, 2]] * 4 + [[1, 3]] * 2 + [[0, 1]] * 3
    problem = make_fit_problem([ids], num_experts=4, node_R=[0, 0])
    tokens, (state,) = states(problem)
    assert list(state.copies(1)) == [(0, 1, -2.0), (2, 0, -2.0)]
    placement = Replicated(base="contiguous").place(problem)
    assert placement.physical_to_logical_LP.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert placement.policy == "replicated"
    assert total_cost_L(problem, tokens, placement).tolist() == [3.5]


def test_a_slot_is_filled_even_where_every_copy_is_a_loss() -> None:
    # Four devices of two experts, a token for each device's pair, homes anywhere. Alone no copy saves anything: the
    # other expert of the pair stays away. 2 is copied from device 1 to all others, where each takes its own. Left is
    # device 1, which may have any but 2 and 3. With 0 there, source 2 takes number 2 mod 2 (device 0, as before) and
    # source 3 number 1 (device 1), and touches two devices for {0, 1}: 1/4 more. With 4 (on 1 and 2) so does source 0;
    # with 6 (on 1 and 3) sources 0 and 2 do. Least is 0.
    problem = make_fit_problem([[[0, 1], [2, 3], [4, 5], [6, 7]]], num_experts=8, node_R=[0] * 4)
    _, (state,) = states(problem)
    assert list(state.copies(1)) == [(2, 3, 0.0), (2, 2, 0.0), (2, 0, 0.0), (0, 1, 0.25)]


def test_a_node_is_paid_for_once() -> None:
    # Nodes {0, 1} and {2, 3}, one expert a device, dedup by node: a node costs 1, a device in it 1/8. All live on
    # device 0. {2, 3} twice pays 1 + 2/8, {1, 2} three times 1/8 + 1 + 1/8. A copy on device 0 saves for 1 3/8; for 2
    # 2/8 (the node stays) + 3 (1 + 1/8) = 29/8; for 3 2/8. On device 1 a copy of 2 is in the node of device 0: {1, 2}
    # saves 3 + 3/8 (device 1 is touched anyway), {2, 3} has 1/8 for device 1 instead of device 2: 27/8.
    share_FR = np.array([[1.0, 0, 0, 0]] * 2)
    transfer = TransferObjective.of(np.array([0, 0, 1, 1]), share_FR, by_node=True, same_node=0.125)
    ids = [[2, 3]] * 2 + [[1, 2]] * 3
    _, (state,) = states(make_fit_problem([ids], num_experts=4, node_R=[0, 0, 1, 1], transfer=transfer))
    assert state.change_ER[:, 0].tolist() == [np.inf, -3 / 8, -29 / 8, -2 / 8]
    assert state.change_ER[2, 1] == -27 / 8


# Where it is used.


def test_copies_take_memory() -> None:
    # OLMoE: 16 MoE layers, 64 experts, 32 a device on two; with 3 spare slots 35.
    raw: dict[str, Any] = {
        "name": "small",
        "model": "olmoe",
        "cluster": "orin-2x-10gbe",
        "trace": {"kind": "zipf", "vision_tokens": 20, "text_tokens": 7, "output_tokens": 4},
        "workload": {"batch_sizes": [2]},
    }
    none = {"policy": "contiguous"}
    copies = {"policy": "replicated", "base": "contiguous", "spare_slots": 3}
    plain, spare = (simulate(check_scenario({**raw, "placement": policy})) for policy in (none, copies))
    expert_bytes = 3 * 2048 * 1024 * 2
    for outcome, num_experts in ((plain, 32), (spare, 35)):
        memory = outcome.results["batch_sizes"][0]["memory_bytes"]
        assert [device["experts"] for device in memory.values()] == [16 * num_experts * expert_bytes] * 2
    ratios = [outcome.results["batch_sizes"][0]["transfer_ratio"]["without_dedup"] for outcome in (plain, spare)]
    assert ratios[1]["decode_text"] < ratios[0]["decode_text"]


def test_bases_are_those_of_scenarios() -> None:
    assert set(get_args(ReplicatedSpec.model_fields["base"].annotation)) == set(BASES)


@pytest.mark.parametrize("kind", ["afd", "pd"])
def test_tokens_must_live_where_the_experts_are(kind: str) -> None:
    raw: dict[str, Any] = {
        "name": "small",
        "model": "olmoe",
        "cluster": "orin-2x-10gbe",
        "trace": {"kind": "uniform", "vision_tokens": 2, "text_tokens": 2, "output_tokens": 2},
        "parallelism": {"kind": kind},
        "placement": {"policy": "replicated"},
    }
    with pytest.raises(PlacementError) as error:
        check(check_scenario(raw))
    assert str(error.value) == (
        "placement.policy: replicated needs tokens to live on the devices that hold experts, and under "
        "parallelism.kind afd or pd they do not; write another policy, e.g. coactivation"
    )


def test_no_device_holds_an_expert_twice() -> None:
    problem = make_fit_problem([[[0, 2]]], num_experts=4, node_R=[0, 0])
    placement = Replicated(base="contiguous", spare_slots=2).place(problem)
    assert placement.physical_to_logical_LP.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1]]
    with pytest.raises(PlacementError) as error:
        Replicated(spare_slots=3).place(problem)
    assert str(error.value) == (
        "placement.spare_slots: 3 is above 2, where every device has all of the 4 experts; write 2 or less"
    )


def test_only_loads_are_not_enough() -> None:
    with pytest.raises(PlacementError, match=r"^placement\.policy: replicated needs to know"):
        Replicated().place(replace(make_fit_problem([[[0, 1]]], num_experts=2, node_R=[0]), trace=None))


@pytest.mark.parametrize("policy", ["coactivation", "replicated"])
def test_trace_stats_under_a_fitted_placement(policy: str) -> None:
    trace = make_trace([[[0, 2], [1, 3], [0, 2]]], num_experts=4, phases=[0, 0, 1])
    stats = trace_stats(trace, Spread(placement=policy))
    assert stats["parameters"]["placement_fitted_to_this_trace"]
    assert any(note.startswith(f"In sample: placement {policy} is fitted") for note in notes(stats))
