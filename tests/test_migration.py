"""Tokens that stay where their first expert was: a path by hand, bytes, and placements for it against brute force."""

from dataclasses import fields, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import migration as slow
from reference.tiny import device_type, link, make_cluster, make_placement, star, tiny_model

from epsim.errors import PlacementError
from epsim.migration import MigrationTraffic, bytes_by_mode, least_exchange_s_L, migration_traffic
from epsim.placement import HomePlan, Placement, PlacementProblem, TransferObjective, balanced
from epsim.placement import token_migration_ilp as ilp
from epsim.placement.migration_cost import MigrationCost
from epsim.placement.policies import Contiguous
from epsim.placement.token_migration import TokenMigration
from epsim.trace import Phase, RoutingTrace, TraceMeta
from epsim.trace.primary import primary_first
from epsim.trace.statistics import expert_load
from epsim.traffic import MessageFormat, TrafficCounter

FORM = MessageFormat(dispatch_vector_bytes=100.0, combine_vector_bytes=10.0, pair_bytes=1.0)


def random_case(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int32], Placement]:
    """Return ids [T, L, K], homes and a placement, every third with replicas."""
    rng = np.random.default_rng(seed)
    num_devices, slots, num_layers = int(rng.integers(1, 6)), int(rng.integers(1, 5)), int(rng.integers(1, 5))
    num_experts = num_devices * slots
    spare = num_devices if seed % 3 == 0 else 0
    rows = [
        rng.permutation(np.append(np.arange(num_experts), rng.integers(0, num_experts, spare))).tolist()
        for _ in range(num_layers)
    ]
    placement = make_placement(rows, rng.integers(0, 2, num_devices).tolist(), num_experts)
    topk, num_tokens = int(rng.integers(1, min(4, num_experts) + 1)), int(rng.integers(0, 40))
    ids_TLE = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)
    homes = rng.integers(0, num_devices, num_tokens).astype(np.int32)
    return np.ascontiguousarray(ids_TLE[..., :topk].astype(np.uint8)), homes, placement


def make_trace(ids_TLK: NDArray[Any], num_experts: int = 4, **columns: Any) -> RoutingTrace:
    """Return a trace of one request per token, each a prompt of one token; `columns` replace columns."""
    num_tokens, num_layers, topk = ids_TLK.shape
    meta = TraceMeta(
        model="",
        num_experts=num_experts,
        topk=topk,
        layer_ids=tuple(range(num_layers)),
        origin="imported",
        description="",
    )
    zeros = np.zeros(num_tokens, np.int32)
    given = {
        "request_id_T": np.arange(num_tokens, dtype=np.int32),
        "position_T": zeros,
        "step_T": zeros,
        "phase_T": zeros.astype(np.uint8),
        "modality_T": zeros.astype(np.uint8),
        "topk_expert_ids_TLK": ids_TLK.astype(np.uint8),
    }
    return RoutingTrace(meta=meta, **{**given, **columns})


def problem_of(trace: RoutingTrace, num_devices: int, **changes: Any) -> PlacementProblem:
    fields: dict[str, Any] = {
        "num_layers": trace.meta.num_layers,
        "num_experts": trace.meta.num_experts,
        "node_of_device_R": np.zeros(num_devices, np.int32),
        "expert_load_MLE": expert_load(trace),
        "trace": trace,
    }
    return PlacementProblem(**{**fields, **changes})


def follow(num_layers: int, num_tokens: int, topk: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return ids [T, L, K] of 4 experts whose choice in one layer mostly tells that in the next."""
    rng = np.random.default_rng(seed)
    ids_TLK = np.empty((num_tokens, num_layers, topk), np.uint8)
    next_LE = np.array([rng.permutation(4) for _ in range(num_layers)])
    for t in range(num_tokens):
        expert = int(rng.integers(4))
        for layer in range(num_layers):
            expert = int(next_LE[layer, expert]) if rng.random() < 0.7 else int(rng.integers(4))
            others = rng.permutation(np.delete(np.arange(4), expert))
            ids_TLK[t, layer] = [expert, *others[: topk - 1]]
    return ids_TLK


# The path of a token.


def test_the_largest_gate_weight_is_first() -> None:
    ids_TLK = np.array([[[3, 1, 2], [0, 2, 3]]])
    weights = np.array([[[0.2, 0.5, 0.5], [0.6, 0.1, 0.1]]], np.float16)
    trace = make_trace(ids_TLK, gate_weights_TLK=weights)
    assert primary_first(trace).tolist() == [[[1, 3, 2], [0, 2, 3]]]  # of two equals the first
    assert primary_first(make_trace(ids_TLK)).tolist() == ids_TLK.tolist()


def test_a_path_by_hand() -> None:
    # Three devices with experts {0, 1}, {2, 3}, {4, 5} in both layers; a token at home on device 0.
    # Layer 0, experts 2, 0, 3 (2 first): one pair stays, two go to device 1 with one vector; the token goes on from
    # device 1, to which device 0 sends a result. Layer 1, experts 4, 5, 2: one pair stays on device 1, two go to device
    # 2, where the token ends; device 1 sends it a result.
    placement = make_placement([[0, 1, 2, 3, 4, 5]] * 2, [0, 0, 0], 6)
    traffic = migration_traffic(np.array([[[2, 0, 3], [4, 5, 2]]], np.uint8), np.array([0], np.int32), placement)
    assert traffic.dispatch_tokens_LRR.tolist() == [
        [[1, 1, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 1], [0, 0, 0]],
    ]
    assert traffic.dispatch_pairs_LRR.tolist() == [[[1, 2, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 2], [0, 0, 0]]]
    assert traffic.combine_tokens_LRR.tolist() == [[[0, 1, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1], [0, 0, 1]]]
    assert traffic.tokens_at_LR.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(24))
def test_kernel_equals_the_reference(seed: int) -> None:
    case = random_case(seed)
    fast, reference = migration_traffic(*case), slow.count_migration(*case)
    for name in (field.name for field in fields(MigrationTraffic)):
        np.testing.assert_array_equal(getattr(fast, name), getattr(reference, name), err_msg=name)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_sent_is_conserved(seed: int) -> None:
    ids_TLK, home_T, placement = random_case(seed)
    traffic, (num_tokens, _, topk) = migration_traffic(ids_TLK, home_T, placement), ids_TLK.shape
    assert (traffic.tokens_at_LR.sum(axis=1) == num_tokens).all()
    assert (traffic.dispatch_pairs_LRR.sum(axis=(1, 2)) == num_tokens * topk).all()
    # Each device that gets a token sends a result, and each token has one from the device where it goes on.
    np.testing.assert_array_equal(traffic.dispatch_tokens_LRR.sum(axis=1), traffic.combine_tokens_LRR.sum(axis=2))
    np.testing.assert_array_equal(np.diagonal(traffic.combine_tokens_LRR, 0, 1, 2), traffic.tokens_at_LR[1:])
    # In the first layer tokens leave from home in both modes.
    home = TrafficCounter(placement).count(ids_TLK, home_T)
    np.testing.assert_array_equal(traffic.dispatch_tokens_LRR[0], home.tokens_LCRR[0, 0])
    if placement.physical_to_logical_LP.shape[1] == placement.num_experts:  # else the source decides on the replica
        np.testing.assert_array_equal(traffic.dispatch_tokens_LRR.sum(axis=1), home.tokens_LCRR.sum(axis=(1, 2)))


# Bytes in both modes.


def test_bytes_by_hand() -> None:
    # Two devices with experts {0, 1} and {2, 3}; requests 0 and 1 live on devices 0 and 1, each a prompt of one token;
    # request 1 has a decode token. Top 1, two layers; the model has a leading dense layer and 4 bytes of KV per layer.
    # Home mode: prompt 0 goes to experts 2, 2: 101 out, 10 back, twice. Prompt 1 (experts 2, 3) stays. Decode token
    # (0, 0): 111 twice. Migration: prompt 0 goes once, 101, and stays; so does the decode token.
    # Coherence: each token's KV of layer 0 with the dense one (8 bytes) from home, of layer 1 (4) from where it is.
    ids_TLK = np.array([[[2], [2]], [[2], [3]], [[0], [0]]])
    trace = make_trace(
        ids_TLK,
        request_id_T=np.array([7, 9, 9], np.int32),
        position_T=np.array([0, 0, 1], np.int32),
        step_T=np.array([0, 0, 1], np.int32),
        phase_T=np.array([0, 0, 1], np.uint8),
    )
    placement = make_placement([[0, 1, 2, 3]] * 2, [0, 0], 4)
    sent = bytes_by_mode(trace, placement, balanced(2), tiny_model(), FORM)
    assert sent.num_tokens_F.tolist() == [2, 1]
    assert sent.home_dispatch_FLRR[0].tolist() == [[[0, 101], [0, 0]]] * 2
    assert sent.home_combine_FLRR[1].tolist() == [[[0, 0], [10, 0]]] * 2
    assert sent.migrate_dispatch_FLRR[0].tolist() == [[[0, 101], [0, 0]], [[0, 0], [0, 0]]]
    assert sent.migrate_dispatch_FLRR[1].tolist() == [[[0, 0], [101, 0]], [[0, 0], [0, 0]]]
    assert not sent.migrate_combine_FLRR.any()
    assert sent.coherence_FLRR.tolist() == [[[[0, 8], [8, 0]], [[0, 0], [8, 0]]], [[[0, 0], [8, 0]], [[0, 4], [0, 0]]]]
    assert sent.per_token(sent.home_FLRR) == pytest.approx(4 * 111 / 3)
    assert sent.per_token(sent.migrate_FLRR, Phase.DECODE) == 101 + 12
    assert not sent.home_kv_FLRR.any()
    # With other homes for decode, the prompt of request 1 moves there: 8 and 4 bytes. That of 0 has no decode.
    apart = HomePlan(prefill_devices=np.array([0], np.int32), decode_devices=np.array([1], np.int32))
    moved = bytes_by_mode(trace, placement, apart, tiny_model(), FORM).home_kv_FLRR
    assert moved.tolist() == [[[[0, 8], [0, 0]], [[0, 4], [0, 0]]], [[[0, 0], [0, 0]]] * 2]


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_coherence_depends_on_tokens_and_devices_alone(num_devices: int) -> None:
    trace = make_trace(follow(2, 50, 2))
    sent = bytes_by_mode(
        trace, Contiguous().place(problem_of(trace, num_devices)), balanced(num_devices), tiny_model(), FORM
    )
    assert sent.per_token(sent.coherence_FLRR) == pytest.approx((num_devices - 1) * 3 * 4)
    for field in fields(sent):
        if field.name.endswith("FLRR"):
            assert not np.diagonal(getattr(sent, field.name), 0, 2, 3).any(), field.name


def test_least_time_by_hand() -> None:
    # On a star each device has a link at 2 B/s in each direction. Device 0 sends 10 and 20 bytes: 15 s on its own
    # link; device 1 gets 10 and 50: 30 s. The second layer sends nothing.
    bytes_LRR = np.zeros((2, 3, 3))
    bytes_LRR[0, 0] = [0, 10, 20]
    bytes_LRR[0, 2, 1] = 50
    assert least_exchange_s_L(bytes_LRR, star(3, 2.0)).tolist() == [30.0, 0.0]
    # A frame overhead of 1/2 makes 15 of 10 bytes, of which a burst lets 5 through at once: 10 bytes at 2 B/s.
    wire = link("d0", "d1", 2.0, frame_overhead=0.5, burst=5.0)
    pair = make_cluster([device_type()] * 2, [wire])
    assert least_exchange_s_L(np.array([[[0.0, 10.0], [0.0, 0.0]]]), pair).tolist() == pytest.approx([5.0])


# Placements.


def cost_of(trace: RoutingTrace, num_devices: int) -> MigrationCost:
    ids_LTK = np.ascontiguousarray(primary_first(trace).transpose(1, 0, 2))
    return MigrationCost(ids_LTK=ids_LTK, num_experts=trace.meta.num_experts, num_devices=num_devices)


def device_LE(placement: Placement) -> NDArray[np.int32]:
    return placement.device_of_expert_RLE[0]


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_cost_is_what_crosses(topk: int, num_devices: int) -> None:
    """With a copy of every token at home on each device, the vectors that leave a device are the cost, exactly."""
    trace = make_trace(follow(3, 40, topk))
    placement = Contiguous().place(problem_of(trace, num_devices))
    ids_TLK = np.tile(primary_first(trace), (num_devices, 1, 1))
    traffic = migration_traffic(ids_TLK, np.repeat(np.arange(num_devices, dtype=np.int32), 40), placement)
    sent_LRR = traffic.dispatch_tokens_LRR + traffic.combine_tokens_LRR
    crossing = sent_LRR.sum() - np.trace(sent_LRR, axis1=1, axis2=2).sum()
    assert cost_of(trace, num_devices).of(device_LE(placement)) == pytest.approx(crossing / len(ids_TLK))


def all_placements(num_layers: int) -> list[NDArray[np.int32]]:
    """Return every placement of 4 experts on 2 devices."""
    rows = [[int(e not in own) for e in range(4)] for own in combinations(range(4), 2)]
    return [np.array(layers, np.int32) for layers in product(rows, repeat=num_layers)]


@pytest.mark.parametrize(("topk", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_ilp_equals_brute_force(topk: int, seed: int) -> None:
    trace = make_trace(follow(3, 30, topk, seed))
    cost = cost_of(trace, 2)
    best = min(cost.of(placement) for placement in all_placements(3))  # of 6^3
    exact = TokenMigration(method="ilp").place(problem_of(trace, 2))
    assert cost.of(device_LE(exact)) == pytest.approx(best)
    searched = TokenMigration().place(problem_of(trace, 2))
    assert best - 1e-9 <= cost.of(device_LE(searched)) <= cost.of(device_LE(Contiguous().place(problem_of(trace, 2))))


def test_affinity_is_followed_to_the_end() -> None:
    # Experts 0 and 3 of each layer lead to 0 and 3 of the next, 1 and 2 to 1 and 2: nothing needs to cross after the
    # first dispatch, which crosses for half of the tokens. Contiguous ({0, 1}, {2, 3}) sends every other token on.
    ids_TLK = np.array([[[a], [b], [a]] for a, b in [(0, 3), (3, 0), (1, 2), (2, 1), (0, 0), (1, 1), (2, 2), (3, 3)]])
    trace = make_trace(ids_TLK)
    cost = cost_of(trace, 2)
    for method in ("sweep", "ilp"):
        placement = TokenMigration(method=method).place(problem_of(trace, 2))  # type: ignore[arg-type]
        assert cost.of(device_LE(placement)) == pytest.approx(0.5)
    assert cost.of(device_LE(Contiguous().place(problem_of(trace, 2)))) == pytest.approx(0.5 + 2 * 0.5)


@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_the_search_keeps_its_promise(topk: int, seed: int) -> None:
    """Names and swaps never raise the cost, nor with K = 1 do sweeps; each device keeps as many experts."""
    rng = np.random.default_rng(seed)
    ids_TLE = np.argsort(rng.random((80, 4, 12)) * np.arange(1, 13), axis=2)  # low ids more often
    cost = cost_of(make_trace(ids_TLE[..., :topk], 12), 4)
    begin_LE = rng.permuted(np.tile(np.arange(12, dtype=np.int32) % 4, (4, 1)), axis=1)
    for step, falls in ((cost.assigned, topk == 1), (cost.relabelled, True), (cost.swapped, True)):
        end_LE = step(begin_LE)
        assert not falls or cost.of(end_LE) <= cost.of(begin_LE) + 1e-9
        assert (np.sort(end_LE, axis=1) == np.repeat(np.arange(4), 3)).all()
    settled_LE = cost.swapped(begin_LE)
    for layer, (a, b) in product(range(4), combinations(range(12), 2)):  # no swap that is left would help
        other_LE = settled_LE.copy()
        other_LE[layer, [a, b]] = other_LE[layer, [b, a]]
        assert cost.of(other_LE) >= cost.of(settled_LE) - 1e-9


def test_the_same_seed_gives_the_same_placement() -> None:
    trace = make_trace(follow(4, 60, 2))
    first, again = (TokenMigration(starts=3, seed=5).place(problem_of(trace, 2)) for _ in range(2))
    np.testing.assert_array_equal(first.physical_to_logical_LP, again.physical_to_logical_LP)


def test_only_tokens_of_the_phases_that_come_here_count() -> None:
    # Prompts go from 0 to 1, decode tokens from 0 to 2: each wants another pair on one device in the second layer.
    ids_TLK = np.array([[[0], [1]]] * 3 + [[[0], [2]]] * 4)
    phase_T = np.array([0] * 3 + [1] * 4, np.uint8)
    trace = make_trace(ids_TLK, phase_T=phase_T)
    uniform_cost = TransferObjective.uniform(np.zeros(2, np.int32))
    for phases, expert in (((Phase.PREFILL,), 1), ((Phase.DECODE,), 2), (tuple(Phase), 2)):
        transfer = uniform_cost.on_devices(np.arange(2), phases)
        placed = device_LE(TokenMigration().place(problem_of(trace, 2, transfer=transfer)))
        assert placed[0, 0] == placed[1, expert], phases


@pytest.mark.parametrize(
    ("num_devices", "changes", "message"),
    [
        (3, {}, "placement: 4 experts do not divide over 3 devices; use"),
        (2, {"trace": None}, "placement.policy: token_migration needs to know which experts"),
    ],
)
def test_what_is_refused(num_devices: int, changes: dict[str, Any], message: str) -> None:
    problem = problem_of(make_trace(follow(2, 5, 1)), num_devices)
    with pytest.raises(PlacementError) as error:
        TokenMigration().place(replace(problem, **changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_ilp_says_why_there_is_no_solution() -> None:
    # Three experts do not lie evenly on two devices, which the policy refuses before: no solution, whatever the time.
    cost = MigrationCost(ids_LTK=np.array([[[0], [1]]]), num_experts=3, num_devices=2)
    with pytest.raises(PlacementError, match=r"^placement.method: ilp failed: .*infeasible.*; write sweep$"):
        ilp.solve_exactly(cost)


def test_ilp_refuses_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace(follow(2, 5, 1))
    # 2 layers of 4 experts on 2 devices: 16 binary variables; 5 tokens follow at most 5 paths in each.
    monkeypatch.setattr(ilp, "MAX_BINARIES", 15)
    with pytest.raises(PlacementError, match=r"placement.method: ilp would have 16 binary and \d+ variables") as error:
        TokenMigration(method="ilp").place(problem_of(trace, 2))
    assert "write sweep" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr(ilp, "TIME_LIMIT_S", 0.0)
    with pytest.raises(PlacementError, match=r"placement.method: ilp was not solved in 0 s; write sweep"):
        TokenMigration(method="ilp").place(problem_of(trace, 2))
