"""The swap search and its two policies: exact costs, equal experts per device, and cases whose best is known."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.fitted import make_fit_problem, random_fit_problem

from epsim.errors import PlacementError
from epsim.placement import FitTokens, PlacementPolicy, PlacementProblem, TransferObjective
from epsim.placement.balanced_coactivation import BalancedCoactivation
from epsim.placement.bounds import transfer_bound_L
from epsim.placement.coactivation import Coactivation
from epsim.placement.eplb_global import EplbGlobal
from epsim.placement.swap_search import COST_SCALE, Effort, LayerTokens, integer_costs, search_layer
from epsim.trace import Phase

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def devices_of(policy: PlacementPolicy, problem: PlacementProblem) -> npt.NDArray[np.int32]:
    """Return the device of each expert, [L, E]."""
    return policy.place(problem).device_of_expert_RLE[0]


def cost(problem: PlacementProblem, device_LE: npt.NDArray[np.int32]) -> float:
    tokens = FitTokens.of(problem.require_trace("test"))
    return float(problem.objective.cost_L(tokens, np.tile(device_LE, (problem.num_devices, 1, 1))).mean())


@PROPERTY
@given(seed=st.integers(0, 10**9), num_swaps=st.integers(0, 40))
def test_the_cost_that_is_kept_is_the_cost(seed: int, num_swaps: int) -> None:
    rng = np.random.default_rng(seed)
    num_bins = int(rng.integers(1, 5))
    num_experts, num_tokens = num_bins * int(rng.integers(1, 5)), int(rng.integers(1, 40))
    topk = int(rng.integers(1, num_experts + 1))
    ids_TK = np.stack([rng.permutation(num_experts)[:topk] for _ in range(num_tokens)]).astype(np.int32)
    ids_TK[rng.random(ids_TK.shape) < 0.2] = -1  # choices that do not concern these bins
    tokens = LayerTokens(
        ids_TK=ids_TK, phase_T=rng.integers(0, 2, num_tokens).astype(np.uint8), num_experts=num_experts
    )
    cost_FB, load_E = rng.integers(0, 9, (2, num_bins)), rng.integers(0, 9, num_experts)
    start_E = rng.permutation(np.arange(num_experts) % num_bins).astype(np.int32)
    most = int(load_E.sum() / num_bins)
    effort = Effort(num_swaps=num_swaps, patience=num_swaps + 1)

    def judge(bin_E: npt.NDArray[np.int32]) -> tuple[int, int]:
        touched = [{int(bin_E[e]) for e in row if e >= 0} for row in ids_TK]
        total = sum(int(cost_FB[phase, b]) for phase, bins in zip(tokens.phase_T, touched, strict=True) for b in bins)
        return int(np.maximum(np.bincount(bin_E, weights=load_E, minlength=num_bins) - most, 0).sum()), total

    found_E, excess, total = search_layer(
        tokens, cost_FB, start_E, effort=effort, seed=0, load_E=load_E, max_load_B=np.full(num_bins, most)
    )
    assert (excess, total) == judge(found_E) <= judge(start_E)
    assert np.bincount(found_E).tolist() == np.bincount(start_E).tolist()


def test_integer_costs_round_to_a_fixed_unit() -> None:
    assert integer_costs(np.array([[0.0, 0.5, 1.0]])).tolist() == [[0, COST_SCALE // 2, COST_SCALE]]


def test_layer_tokens_are_checked() -> None:
    with pytest.raises(ValueError, match="experts below"):
        LayerTokens(ids_TK=np.array([[4]], np.int32), phase_T=np.zeros(1, np.uint8), num_experts=4)
    with pytest.raises(ValueError, match="phase_T"):
        LayerTokens(ids_TK=np.array([[3]], np.int32), phase_T=np.zeros(2, np.uint8), num_experts=4)


@PROPERTY
@given(seed=st.integers(0, 10**9))
def test_small_cases_reach_the_best_of_all(seed: int) -> None:
    problem = random_fit_problem(np.random.default_rng(seed), max_devices=3, max_experts=6)
    assume(not problem.objective.node_cost_FN.any())  # nodes first, then devices: not always the best
    device_LE = devices_of(Coactivation(), problem)
    sizes = np.bincount(device_LE[0], minlength=problem.num_devices)
    assert (sizes == problem.num_experts // problem.num_devices).all()
    order = np.repeat(np.arange(problem.num_devices), sizes)
    assignments = np.unique(list(itertools.permutations(order)), axis=0).astype(np.int32)
    tokens = FitTokens.of(problem.require_trace("test"))
    shape = (problem.num_devices, problem.num_layers, 1)
    costs_XL = np.stack([problem.objective.cost_L(tokens, np.tile(row_E, shape)) for row_E in assignments])
    assert cost(problem, device_LE) == pytest.approx(costs_XL.min(axis=0).mean(), abs=1e-3)  # units of integer costs


def test_hidden_groups_are_found() -> None:
    # Tokens of two kinds choose the even or the odd ones of eight experts: one device for each, half of the homes.
    problem = make_fit_problem([[[0, 2, 4, 6], [1, 3, 5, 7]] * 4], num_experts=8, node_R=[0, 0])
    device_LE = devices_of(Coactivation(), problem)
    assert len(set(device_LE[0, ::2].tolist())) == len(set(device_LE[0, 1::2].tolist())) == 1
    assert cost(problem, device_LE) == 0.5


def test_homes_of_a_modality_count() -> None:
    # The same two kinds, one in prefill on device 0 and one in decode on device 1: each at home, nothing is sent.
    transfer = TransferObjective.of(np.zeros(2, np.int32), np.eye(2), by_node=False)
    ids = [[[1, 3, 5, 7], [0, 2, 4, 6]] * 4]
    problem = make_fit_problem(ids, num_experts=8, node_R=[0, 0], phases=[0, 1] * 4, transfer=transfer)
    device_LE = devices_of(Coactivation(), problem)
    assert device_LE.tolist() == [[1, 0, 1, 0, 1, 0, 1, 0]]
    assert cost(problem, device_LE) == 0.0


def test_nodes_come_before_devices() -> None:
    # Pairs (0, 1), (4, 5), (2, 3), (6, 7) are chosen often; 0 with 4, 1 with 5, 2 with 6, 3 with 7 now and then. With
    # node-level dedup 0 1 4 5 are a node, so that no token crosses, and each frequent pair is a device.
    ids = [[[0, 1], [2, 3], [4, 5], [6, 7]] * 3 + [[0, 4], [1, 5], [2, 6], [3, 7]]]
    node_R = np.array([0, 0, 1, 1], np.int32)
    transfer = TransferObjective.of(node_R, np.full((2, 4), 0.25), by_node=True, same_node=0.1, other_node=1.0)
    problem = make_fit_problem(ids, num_experts=8, node_R=node_R.tolist(), transfer=transfer)
    device_E = devices_of(Coactivation(), problem)[0]
    assert len(set(node_R[device_E[[0, 1, 4, 5]]].tolist())) == len(set(node_R[device_E[[2, 3, 6, 7]]].tolist())) == 1
    assert device_E[::2].tolist() == device_E[1::2].tolist()


@PROPERTY
@given(seed=st.integers(0, 10**9), node_R=st.sampled_from([[0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0]]))
def test_a_cap_holds_over_nodes_of_any_size(seed: int, node_R: list[int]) -> None:
    rng = np.random.default_rng(seed)
    num_devices, num_experts = len(node_R), 2 * len(node_R)
    ids = [rng.choice(num_experts, 2, replace=False, p=rng.dirichlet(np.ones(num_experts))).tolist() for _ in range(60)]
    share_FR = np.full((2, num_devices), 1 / num_devices)
    transfer = TransferObjective.of(np.array(node_R), share_FR, by_node=True, same_node=0.1)
    problem = make_fit_problem([ids], num_experts=num_experts, node_R=node_R, transfer=transfer)
    load_E = problem.load_LE[0]
    device_E = devices_of(BalancedCoactivation(max_load=1.2), problem)[0]
    reached = int(np.bincount(device_E, weights=load_E).max())
    assert np.bincount(device_E).tolist() == [2] * num_devices
    fullest = [max(load_E[list(pair)].sum() for pair in matching) for matching in matchings(list(range(num_experts)))]
    assert reached <= max(np.floor(1.2 * load_E.sum() / num_devices), min(fullest))


def matchings(experts: list[int]) -> list[list[tuple[int, int]]]:
    """Return every way to part the experts into pairs."""
    if not experts:
        return [[]]
    first, *rest = experts
    return [
        [(first, other), *others]
        for other in rest
        for others in matchings([expert for expert in rest if expert != other])
    ]


def test_a_cap_on_the_load_is_kept() -> None:
    # Experts 0 and 1 are chosen together by 8 of 12 tokens, 2 and 3 by 4: together each pair sends least, but device 0
    # then serves 16 of 24 pairs, 1.33 of the mean. Under a cap of 1.1 each device has one of 0 and 1.
    problem = make_fit_problem([[[0, 1]] * 8 + [[2, 3]] * 4], num_experts=4, node_R=[0, 0])
    free_E, capped_E = (devices_of(policy, problem)[0] for policy in (Coactivation(), BalancedCoactivation()))
    assert free_E[0] == free_E[1] != free_E[2]
    assert capped_E[0] != capped_E[1]
    loose_E = devices_of(BalancedCoactivation(max_load=1.5), problem)[0]
    assert loose_E.tolist() == free_E.tolist()


def test_a_cap_that_nothing_keeps_becomes_the_least() -> None:
    # Expert 0 alone serves 10 of 16 pairs: with the smallest beside it, device 0 has 12 of 16 at least.
    problem = make_fit_problem([[[0]] * 10 + [[1]] * 2 + [[2]] * 2 + [[3]] * 2], num_experts=4, node_R=[0, 0])
    device_E = devices_of(BalancedCoactivation(max_load=1.0), problem)[0]
    assert np.bincount(device_E, weights=[10, 2, 2, 2]).max() == 12


def test_large_traces_are_searched_in_part_and_finished_on_all() -> None:
    rng = np.random.default_rng(0)
    logits_TE = np.where(np.arange(16) % 4 == rng.integers(0, 4, 500)[:, None], 2.0, 0.0) + rng.gumbel(size=(500, 16))
    ids = [np.argsort(-logits_TE, axis=1)[:, :4].tolist()]
    problem = make_fit_problem(ids, num_experts=16, node_R=[0] * 4)
    whole, part = (cost(problem, devices_of(Coactivation(search_tokens=n), problem)) for n in (500, 50))
    assert part == pytest.approx(whole, rel=0.02)
    assert devices_of(Coactivation(seed=3), problem).tolist() == devices_of(Coactivation(seed=3), problem).tolist()


def test_only_the_phase_of_a_pool_counts() -> None:
    # In the decode pool of prefill and decode apart, what prefill chose is nothing to place for.
    ids = [[[0, 1], [2, 3]] * 3 + [[0, 2], [1, 3]]]
    share_FR = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    transfer = TransferObjective.of(np.zeros(4, np.int32), share_FR, by_node=False)
    problem = make_fit_problem(ids, num_experts=4, node_R=[0] * 4, phases=[0] * 6 + [1] * 2, transfer=transfer)
    decode = problem.on_devices(np.array([2, 3]), (Phase.DECODE,))
    device_E = devices_of(Coactivation(), decode)[0]
    assert device_E[0] == device_E[2] != device_E[1] == device_E[3]


def test_a_pool_balances_what_it_serves() -> None:
    # Prefill chooses experts 0 and 1, decode 0 and 2 as often as each other and 1 and 3 never: a decode pool that went
    # by both phases would part 0 and 1.
    ids = [[[0, 1]] * 90 + [[0, 2]] * 10]
    share_FR = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    transfer = TransferObjective.of(np.zeros(4, np.int32), share_FR, by_node=False)
    problem = make_fit_problem(ids, num_experts=4, node_R=[0] * 4, phases=[0] * 90 + [1] * 10, transfer=transfer)
    decode = problem.on_devices(np.array([2, 3]), (Phase.DECODE,))
    assert decode.load_LE.tolist() == [[10, 0, 10, 0]]
    for policy in (BalancedCoactivation(), EplbGlobal()):
        device_E = devices_of(policy, decode)[0]
        assert device_E[0] != device_E[2]


def test_without_dedup_every_expert_is_paid_for() -> None:
    # Prefill lives on device 0 and chooses 0 and 1 twice as often as 2 and 3, decode on 1 and the other way round. Per
    # pair it pays to have 0 and 1 on device 0. A token of 0 and 2 pays one pair wherever it lives.
    transfer = TransferObjective.of(np.zeros(2, np.int32), np.eye(2), by_node=False, per_pair=True)
    ids = [[[0, 1], [0, 1], [2, 3], [2, 3], [2, 3], [0, 1], [0, 2]]]
    problem = make_fit_problem(ids, num_experts=4, node_R=[0, 0], phases=[0, 0, 0, 1, 1, 1, 0], transfer=transfer)
    device_LE = devices_of(Coactivation(), problem)
    assert device_LE.tolist() == [[0, 0, 1, 1]]
    assert cost(problem, device_LE) == pytest.approx((2 + 2 + 1) / 7)
    tokens = FitTokens.of(problem.require_trace("test"))
    bound = transfer_bound_L(problem.objective, tokens, num_experts=4, slots_per_device=2)[0]
    assert 0 <= bound <= 5 / 7 + 1e-12


def test_a_gateway_is_not_passed_what_it_passes_on() -> None:
    # Two nodes of two. From device 0 a token pays 1 for node 1 and 0.1 for each device that gets a copy inside a node:
    # device 1, and of node 1 device 3, for device 2 is where the vector arrives.
    objective = TransferObjective.of(
        np.array([0, 0, 1, 1]),
        np.full((2, 4), 0.25),
        by_node=True,
        same_node=0.1,
        gateway_RN=np.array([[0, 2], [1, 3], [0, 2], [1, 3]]),
    )
    assert objective.device_cost_SR.tolist()[0] == [0.0, 0.1, 0.0, 0.1]
    assert objective.node_cost_SN.tolist()[0] == [0.0, 1.0]


@pytest.mark.parametrize("policy", [Coactivation(), BalancedCoactivation()])
def test_what_it_needs(policy: PlacementPolicy) -> None:
    loads = PlacementProblem(
        num_layers=1,
        num_experts=4,
        node_of_device_R=np.zeros(2, np.int32),
        expert_load_MLE=np.ones((2, 1, 4), np.int64),
    )
    with pytest.raises(PlacementError, match="needs to know which experts each token chose") as error:
        policy.place(loads)
    assert "\n" not in str(error.value)
    with pytest.raises(PlacementError, match="do not divide over 3 devices"):
        policy.place(make_fit_problem([[[0, 1]]], num_experts=4, node_R=[0] * 3))
