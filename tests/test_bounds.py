"""Lower bounds: never above what brute force finds over all placements, and tight where that can be worked out."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.tiny import make_placement

from epsim.placement import FitTokens, TransferObjective
from epsim.placement.bounds import gap, max_load_bound_L, transfer_bound_L

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)


def make_tokens(rng: np.random.Generator, num_tokens: int, num_experts: int, topk: int) -> FitTokens:
    ids_TK = np.stack([rng.permutation(num_experts)[:topk] for _ in range(num_tokens)])
    return FitTokens(
        ids_LTK=ids_TK[None].astype(np.uint8),
        phase_T=rng.integers(0, 2, num_tokens).astype(np.uint8),
    )


def full_slots(num_experts: int, num_devices: int, slots: int) -> Iterator[list[int]]:
    """Yield every way to fill the slots of all devices with different experts each, all experts there."""
    for filled in itertools.product(itertools.combinations(range(num_experts), slots), repeat=num_devices):
        row = [expert for device in filled for expert in device]
        if set(row) == set(range(num_experts)):
            yield row


@PROPERTY
@given(
    shape=st.sampled_from([(4, 2, 2), (6, 2, 3), (6, 3, 2), (3, 2, 2), (4, 2, 3), (4, 4, 1)]),
    seed=st.integers(0, 10**9),
)
def test_never_above_the_best_placement(shape: tuple[int, int, int], seed: int) -> None:
    num_experts, num_devices, slots = shape
    rng = np.random.default_rng(seed)
    node_R = (
        [0, 0, 1, 1]
        if num_devices == 4
        else list(rng.integers(0, 2, num_devices))
        if rng.random() < 0.5
        else [0] * num_devices
    )
    node_R = (np.array(node_R) - min(node_R)).astype(np.int32)
    share_FR = (
        rng.dirichlet(np.full(num_devices, 0.3), 2)
        if rng.random() < 0.7
        else np.full((2, num_devices), 1 / num_devices)
    )
    near = float(rng.random())
    objective = TransferObjective.of(node_R, share_FR, by_node=bool(rng.integers(2)), same_node=near, other_node=1.0)
    tokens = make_tokens(rng, int(rng.integers(1, 12)), num_experts, int(rng.integers(1, num_experts + 1)))
    bound = transfer_bound_L(objective, tokens, num_experts=num_experts, slots_per_device=slots, num_iterations=20)[0]
    best = min(
        objective.cost_L(tokens, make_placement([row], node_R.tolist(), num_experts).device_of_expert_RLE)[0]
        for row in full_slots(num_experts, num_devices, slots)
    )
    assert -1e-12 <= bound <= best + 1e-12


def test_tight_where_groups_are_perfect() -> None:
    # Two groups of four experts, every token chooses all of one: on two devices it touches one, remote from half the
    # homes: 0.5. No placement is better, and the bound says so.
    tokens = FitTokens(
        ids_LTK=np.array([[[0, 2, 4, 6], [1, 3, 5, 7]] * 8], np.uint8),
        phase_T=np.zeros(16, np.uint8),
    )
    objective = TransferObjective.uniform(np.zeros(2, np.int32))
    assert transfer_bound_L(objective, tokens, num_experts=8, slots_per_device=4) == pytest.approx([0.5], abs=1e-9)


def test_homes_of_a_modality_are_seen() -> None:
    # Prefill lives on device 0 and decode on device 1; all choose experts 0 and 1 of four, two to a device. Where the
    # two are together, tokens of the other phase pay 1, a mean of 1/2; where they are apart, all pay 1. At best 1/2.
    objective = TransferObjective.of(np.zeros(2, np.int32), np.eye(2), by_node=False)
    tokens = FitTokens(
        ids_LTK=np.array([[[0, 1]] * 8], np.uint8),
        phase_T=np.array([0, 1] * 4, np.uint8),
    )
    bound = transfer_bound_L(objective, tokens, num_experts=4, slots_per_device=2, num_iterations=300)[0]
    assert 0.4 < bound <= 0.5


def test_closer_than_the_spectral_bound() -> None:
    """On co-activated routing: 16 experts in 4 hidden groups, so that the hidden placement is known to be good."""
    rng = np.random.default_rng(0)
    logits_TE = np.where(np.arange(16) % 4 == rng.integers(0, 4, 400)[:, None], 2.0, 0.0) + rng.gumbel(size=(400, 16))
    ids_TK = np.argsort(-logits_TE, axis=1)[:, :4].astype(np.uint8)
    tokens = FitTokens(ids_LTK=ids_TK[None], phase_T=np.zeros(400, np.uint8))
    objective = TransferObjective.uniform(np.zeros(4, np.int32))
    hidden_LE = np.tile(np.arange(16) % 4, (4, 1, 1)).astype(np.int32)
    reached = objective.cost_L(tokens, hidden_LE)[0]
    bound = transfer_bound_L(objective, tokens, num_experts=16, slots_per_device=4, num_iterations=200)[0]
    assert spectral_bound(ids_TK, 16, 4) * 3 / 4 < bound <= reached
    assert bound > 0.9 * reached


def spectral_bound(ids_TK: np.ndarray, num_experts: int, num_devices: int) -> float:
    """Return Donath and Hoffman's bound on mean devices per token, for top-4: at most 0, 4, 5, 6 pairs are cut."""
    graph_EE = np.zeros((num_experts, num_experts))
    for row in ids_TK:
        for e, f in itertools.permutations(row, 2):
            graph_EE[e, f] += 1
    laplacian_EE = np.diag(graph_EE.sum(axis=1)) - graph_EE
    per_device = num_experts // num_devices
    cut = per_device / 2 * np.linalg.eigvalsh(laplacian_EE)[:num_devices].sum() / len(ids_TK)
    return 1 + float(np.interp(cut, [0, 4, 5, 6], [0, 1, 2, 3]))


def test_slots_must_hold_all_experts() -> None:
    tokens = make_tokens(np.random.default_rng(0), 3, 4, 2)
    objective = TransferObjective.uniform(np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="hold all experts"):
        transfer_bound_L(objective, tokens, num_experts=4, slots_per_device=1)
    with pytest.raises(ValueError, match="hold all experts"):
        max_load_bound_L(np.ones((1, 4), np.int64), 2, 1)


# Loads.


def test_load_bounds_by_hand() -> None:
    # Loads 9 1 1 1 on two devices: the mean is 6, the largest with the smallest beside it 10.
    # Loads 5 5 5 1: the mean is 8; two of the three fives share a device: 10.
    # Loads 9 1 1 1 with two spare slots: nine over three copies is 3, the mean 6.
    assert max_load_bound_L(np.array([[9, 1, 1, 1], [5, 5, 5, 1]]), 2, 2).tolist() == [10, 10]
    assert max_load_bound_L(np.array([[9, 1, 1, 1]]), 2, 3).tolist() == [6]


@PROPERTY
@given(shape=st.sampled_from([(4, 2, 2), (6, 2, 3), (6, 3, 2), (4, 2, 3), (3, 3, 2)]), seed=st.integers(0, 10**9))
def test_load_bound_is_never_above_the_best(shape: tuple[int, int, int], seed: int) -> None:
    num_experts, num_devices, slots = shape
    load_E = np.random.default_rng(seed).integers(0, 20, num_experts)
    best = np.inf
    for row in full_slots(num_experts, num_devices, slots):
        copies_E = np.bincount(row, minlength=num_experts)
        best = min(best, (load_E / copies_E)[np.array(row)].reshape(num_devices, -1).sum(axis=1).max())
    assert max_load_bound_L(load_E[None], num_devices, slots)[0] <= best + 1e-9


def test_gap_is_a_share_of_the_value() -> None:
    assert gap(4.0, 3.0) == 0.25
    assert gap(0.0, 0.0) is None
