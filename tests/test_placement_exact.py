"""`exact`: against every balanced assignment of small cases, by hand, and one message per refusal."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.fitted import make_fit_problem, random_fit_problem

from epsim.errors import PlacementError
from epsim.placement import FitTokens, PlacementProblem
from epsim.placement import exact as exact_module
from epsim.placement.exact import Exact

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def balanced_assignments(num_experts: int, num_devices: int) -> Iterator[tuple[int, ...]]:
    """Yield the device of each expert in every way to put as many on each device."""
    per_device = num_experts // num_devices
    for devices in itertools.product(range(num_devices), repeat=num_experts):
        if all(devices.count(device) == per_device for device in range(num_devices)):
            yield devices


def least_cost_L(problem: PlacementProblem) -> np.ndarray:
    assert problem.trace is not None
    tokens = FitTokens.of(problem.trace)
    costs = [
        problem.objective.cost_L(tokens, np.tile(np.array(devices, np.int32), (1, problem.num_layers, 1)))
        for devices in balanced_assignments(problem.num_experts, problem.num_devices)
    ]
    return np.min(costs, axis=0)


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_is_cheaper_than_the_exact_placement(seed: int) -> None:
    problem = random_fit_problem(np.random.default_rng(seed), min_devices=2, max_devices=3, max_experts=6)
    placement = Exact().place(problem)
    assert problem.trace is not None
    cost_L = problem.objective.cost_L(FitTokens.of(problem.trace), placement.device_of_expert_RLE)
    np.testing.assert_allclose(cost_L, least_cost_L(problem), rtol=0, atol=1e-9)


def test_by_hand() -> None:
    # Tokens {0, 2} three times, {1, 3} twice, {0, 1} once. With 0 and 2 on one device, 1 and 3 on the other, five
    # tokens touch one device and one touches two: 7 touches, each half remote. Any other split has at least 9.
    problem = make_fit_problem([[[0, 2]] * 3 + [[1, 3]] * 2 + [[0, 1]]], num_experts=4, node_R=[0, 0])
    placement = Exact().place(problem)
    assert placement.physical_to_logical_LP.tolist() == [[0, 2, 1, 3]]
    assert placement.policy == "exact"
    assert problem.trace is not None
    cost_L = problem.objective.cost_L(FitTokens.of(problem.trace), placement.device_of_expert_RLE)
    assert cost_L.tolist() == [7 / 2 / 6]


def test_too_large_a_problem_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # 4 experts x 2 devices = 8 x, and 2 sets x 2 devices = 4 touches.
    problem = make_fit_problem([[[0, 2], [1, 3]]], num_experts=4, node_R=[0, 0])
    monkeypatch.setattr(exact_module, "MAX_VARIABLES", 12)
    Exact().place(problem)
    monkeypatch.setattr(exact_module, "MAX_VARIABLES", 11)
    with pytest.raises(PlacementError) as error:
        Exact().place(problem)
    assert str(error.value) == (
        "placement.policy: exact would have 12 variables in layer 0, from 4 experts, 2 devices and 2 different expert "
        "sets; the most are 11; use placement.policy: coactivation, which searches without a proof"
    )


def test_time_without_a_proof_is_an_error() -> None:
    ids_TK = np.random.default_rng(0).permuted(np.tile(np.arange(16), (400, 1)), axis=1)[:, :4]
    problem = make_fit_problem([ids_TK.tolist()], num_experts=16, node_R=[0] * 4)
    with pytest.raises(PlacementError) as error:
        Exact(time_limit=0.05).place(problem)
    assert re.fullmatch(
        r"placement\.time_limit: 0\.05 s ended with (no placement|a placement, of which at most \d+ % could be saved), "
        r"before the optimum of layer 0 was proved; write more, or use placement\.policy: coactivation, which searches "
        r"without a proof",
        str(error.value),
    )


def test_only_loads_are_not_enough() -> None:
    loads = np.ones((2, 1, 4), np.int64)
    problem = PlacementProblem(
        num_layers=1, num_experts=4, node_of_device_R=np.zeros(2, np.int32), expert_load_MLE=loads
    )
    with pytest.raises(PlacementError, match=r"^placement\.policy: exact needs to know"):
        Exact().place(problem)
