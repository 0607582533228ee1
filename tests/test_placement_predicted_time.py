"""The policy `predicted_time` and the clock that it goes by: a layer by hand, against whole runs, bounds, bad input."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.scenarios import fabric
from reference.tiny import star, tiny_model

from epsim.batch import step_inputs
from epsim.cluster import Cluster
from epsim.cost import HomeWork, RooflineCost
from epsim.errors import PlacementError, ScenarioError
from epsim.layer_clock import AnalyticClock, ClockStep, spaced_steps
from epsim.model import Moe
from epsim.placement import POLICIES, Placement, PlacementProblem
from epsim.placement.predicted_time import STARTS, PredictedTime
from epsim.run import assemble, build_clock, simulate
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.sim import StepPlanner, Transmission, simulate_step
from epsim.trace import TraceShape, synthetic
from epsim.traffic import Dedup, MessageFormat, TrafficCounter

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
Devices = npt.NDArray[np.integer]


def decode_step(num_devices: int, ids_TK: list[list[int]], home_T: list[int], weight: float = 1.0) -> ClockStep:
    """Return a decode step of one layer; each token is a request's first, and has an output."""
    tokens_R = np.bincount(home_T, minlength=num_devices)
    work = HomeWork(
        decode=True,
        tokens_R=tokens_R,
        requests_R=tokens_R,
        kv_tokens_R=tokens_R,
        attention_pairs_R=tokens_R,
        images_R=0 * tokens_R,
        outputs_R=tokens_R,
    )
    return ClockStep(
        weight=weight,
        topk_expert_ids_TLK=np.array(ids_TK, np.uint8)[:, None],
        home_T=np.array(home_T, np.int32),
        chunk_T=np.zeros(len(home_T), np.int64),
        works=(work,),
        kv_tokens_RR=np.zeros((num_devices,) * 2, np.int64),
    )


def sync_planner(cluster: Cluster, moe: Moe) -> StepPlanner:
    model = tiny_model(num_layers=1, dense_ffn_size=None, moe=moe)
    form = MessageFormat.of(2, "bf16", "bf16")
    transmission = Transmission(mode="sync", dedup="device", num_chunks=1, message_format=form, overlap_kv=True)
    return StepPlanner(model, cluster, RooflineCost(model, cluster), transmission)


def hand_clock(weight: float = 1.0) -> AnalyticClock:
    """Two tokens on two devices, one at home on each; the first wants experts 0 and 2, the second 1 and 3."""
    cluster = star(2, bandwidth=4.0)
    step = decode_step(2, [[0, 2], [1, 3]], [0, 1], weight)
    return AnalyticClock(
        sync_planner(cluster, Moe(num_experts=4, topk=2, expert_ffn_size=1)), cluster, [step], 4, growing=True
    )


def problem_of(num_devices: int, ids_TK: list[list[int]], **changes: Any) -> PlacementProblem:
    """Return the problem of one layer whose trace has these rows, all of text."""
    ids = np.array(ids_TK)
    num_experts = int(changes.pop("num_experts", ids.max() + 1))
    shape = TraceShape(layer_ids=(0,), num_experts=num_experts, topk=ids.shape[1])
    workload = synthetic.SyntheticWorkload(
        num_requests=1, num_vision_tokens=0, num_text_tokens=len(ids), num_decode_tokens=0
    )
    (drawn,) = synthetic.uniform(shape=shape, workload=workload, seed=0, model="tiny")
    trace = replace(drawn, topk_expert_ids_TLK=ids[:, None].astype(np.uint8))
    load_E = np.bincount(ids.reshape(-1), minlength=num_experts)
    fields: dict[str, Any] = {
        "num_layers": 1,
        "num_experts": num_experts,
        "node_of_device_R": np.zeros(num_devices, np.int32),
        "expert_load_MLE": np.stack([load_E, 0 * load_E])[:, None].astype(np.int64),
        "trace": trace,
    }
    return PlacementProblem(**{**fields, **changes})


# The clock.


def test_a_layer_by_hand() -> None:
    # One token a device. Attention reads 24 bytes of weights, 2 cached tokens of 4 and 2 vectors of 4: 40 / 10 = 4 s;
    # router 16 + 8 = 24: 2.4 s; head 20 + 8: 2.8 s; two pairs with two experts 2 * 12 + 2 * 8 = 40: 4 s.
    # At home: 13.2 s, and no placement can be faster: 4 experts on 2 devices are at least 2 experts and 2 pairs on one.
    clock = hand_clock()
    assert clock.seconds(0, np.array([0, 1, 0, 1])) == pytest.approx(13.2, rel=1e-12)
    assert clock.bound_seconds(0) == pytest.approx(13.2, rel=1e-12)
    # In the order of their ids each token also has one expert on the other device. Out: a vector of 4 and a pair of 8
    # bytes, 2 segments of 6, 1.5 s each, over 2 links: 4.5 s; home: 4 bytes, 1 s a link: 2 s.
    assert clock.seconds(0, np.array([0, 0, 1, 1])) == pytest.approx(19.7, rel=1e-12)
    # All on the first device: 4 pairs with 4 experts are 8 s, and the second token's 2 pairs out 4 + 16 bytes, 2
    # segments of 10: 2.5 s each, 7.5 s; home 2 s.
    assert clock.seconds(0, np.zeros(4, int)) == pytest.approx(4 + 2.4 + 7.5 + 8 + 2 + 2.8, rel=1e-12)
    assert hand_clock(weight=2.5).seconds(0, np.array([0, 1, 0, 1])) == pytest.approx(33.0, rel=1e-12)


@pytest.mark.parametrize(
    ("num_decode", "at_most", "expected"),
    [
        (0, 4, [(0, 1)]),
        (3, 4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (10, 2, [(0, 1), (3, 5), (8, 5)]),  # the middle of 1 to 5, and of 6 to 10
        (7, 2, [(0, 1), (2, 3), (5, 4)]),  # 1 to 3, and 4 to 7 where of two middles the earlier counts
    ],
)
def test_steps_stand_for_those_around_them(num_decode: int, at_most: int, expected: list[tuple[int, int]]) -> None:
    assert spaced_steps(num_decode, at_most) == expected


def scenario(num_layers: int, cluster: str, **changes: Any) -> ScenarioSpec:
    raw: dict[str, Any] = {
        "name": "small",
        "model": "olmoe",
        "cluster": cluster,
        "trace": {"kind": "zipf", "exponent": 0.7, "vision_tokens": 576, "text_tokens": 20, "output_tokens": 4},
        "workload": {"batch_sizes": [3]},
        "simulation": {"fidelity": "analytic"},
    }
    overrides = {"model.num_layers": num_layers, **changes.pop("overrides", {})}
    raw |= changes
    for path, value in overrides.items():
        apply_override(raw, path, value)
    return check_scenario(raw)


def clock_and_devices(spec: ScenarioSpec) -> tuple[AnalyticClock, Devices]:
    deployment = assemble(spec)
    clock = build_clock(spec, deployment.model, deployment.cluster, deployment.trace)
    return clock, deployment.layout.placement.device_of_expert_RLE[0]


@pytest.mark.parametrize(
    ("mode", "dedup", "cluster"),
    [
        *product(["sync", "async", "two_batch"], ["none", "device"], ["h200-1x8"]),
        *product(["sync", "async", "two_batch"], ["node"], ["h100-2x8"]),
    ],
)
def test_one_layer_is_the_whole_run(mode: str, dedup: str, cluster: str) -> None:
    spec = scenario(1, cluster, transmission={"mode": mode, "dedup": dedup, "num_chunks": 2})
    clock, device_LE = clock_and_devices(spec)
    steps = simulate(spec).steps[3]
    assert len(steps) == 4
    assert clock.seconds(0, device_LE[0]) == pytest.approx(sum(step.duration_s for step in steps), rel=1e-12)


@pytest.mark.parametrize("mode", ["sync", "async", "two_batch"])
def test_host_limits_and_moving_caches_count(mode: str) -> None:
    # With one bin of experts a device the vision experts are on the first, where the clock expects the prefill.
    spec = scenario(
        1,
        "orin-2x-10gbe",
        placement={"policy": "modality_bins"},
        homes={"policy": "by_modality"},
        transmission={"mode": mode},
        overrides={
            "cluster.device_types.orin": "orin-smoes-s11",
            "cluster.device_types.orin.messaging": {"background_bandwidth": "5 GB/s"},
            "cluster.device_types.orin.step_overhead": "1 ms",
        },
    )
    clock, device_LE = clock_and_devices(spec)
    expected_s = sum(step.duration_s for step in simulate(spec).steps[3])
    assert clock.seconds(0, device_LE[0]) == pytest.approx(expected_s, rel=1e-12)


def test_layers_of_sync_add_up() -> None:
    # Barriers: layer after layer all devices start together. Three layers, the first with the vision encoder, the last
    # with the head.
    spec = scenario(3, "h200-1x8", placement={"policy": "random"})
    clock, device_LE = clock_and_devices(spec)
    total_s = sum(clock.seconds(layer, device_E) for layer, device_E in enumerate(device_LE))
    assert total_s == pytest.approx(sum(step.duration_s for step in simulate(spec).steps[3]), rel=1e-12)


def test_batch_size_is_the_middle_one() -> None:
    spec = scenario(1, "h200-1x8", workload={"batch_sizes": [1, 3, 4]})
    clock, device_LE = clock_and_devices(spec)
    expected_s = sum(step.duration_s for step in simulate(spec).steps[3])
    assert clock.seconds(0, device_LE[0]) == pytest.approx(expected_s, rel=1e-12)


def random_clock(rng: np.random.Generator, mode: Any, dedup: Dedup) -> tuple[AnalyticClock, StepPlanner, Cluster, Any]:
    """Return a clock of one layer on random devices that share links, and what it stands on."""
    num_devices = int(rng.integers(1, 6))
    cluster = star(1, 4.0) if num_devices == 1 else fabric(rng, num_devices, int(rng.integers(1, 3)))
    num_experts, topk = 2 * num_devices, int(rng.integers(1, 3))
    shared = int(rng.integers(0, 2))
    moe = Moe(num_experts=num_experts, topk=topk, expert_ffn_size=2, num_shared_experts=shared)
    model = tiny_model(num_layers=1, dense_ffn_size=None, moe=moe)
    transmission = Transmission(
        mode=mode,
        dedup=dedup,
        num_chunks={"sync": 1, "async": 3, "two_batch": 2}[mode],
        message_format=MessageFormat.of(2, "bf16", "bf16"),
        overlap_kv=True,
        overlap_shared=bool(rng.integers(0, 2)),
    )
    planner = StepPlanner(model, cluster, RooflineCost(model, cluster), transmission)
    placement = random_placement(rng, cluster, num_experts)
    counter, steps = TrafficCounter(placement, transmission.num_chunks), []
    for decode in (False, True):
        num_tokens = int(rng.integers(1, 40))
        home_T = np.sort(rng.integers(0, num_devices, num_tokens)).astype(np.int32)
        ids_TLE = np.argsort(rng.random((num_tokens, 1, num_experts)) ** np.arange(1, num_experts + 1), axis=2)
        chunk_T = counter.chunk_of_token_T(home_T)
        num_batches = 2 if mode == "two_batch" else 1
        works = []
        for batch in range(num_batches):
            own_T = chunk_T == batch if num_batches == 2 else chunk_T >= 0
            tokens_R = np.bincount(home_T[own_T], minlength=num_devices)
            works.append(
                HomeWork(
                    decode=decode,
                    tokens_R=tokens_R,
                    requests_R=tokens_R,
                    kv_tokens_R=5 * tokens_R,
                    attention_pairs_R=7 * tokens_R,
                    images_R=0 * tokens_R,
                    outputs_R=tokens_R * (batch == 0),
                )
            )
        steps.append(
            ClockStep(
                weight=float(rng.integers(1, 5)),
                topk_expert_ids_TLK=ids_TLE[:, :, :topk].astype(np.uint8),
                home_T=home_T,
                chunk_T=chunk_T,
                works=tuple(works),
                kv_tokens_RR=np.zeros((num_devices,) * 2, np.int64),
            )
        )
    return AnalyticClock(planner, cluster, steps, num_experts, growing=True), planner, cluster, steps


def random_placement(rng: np.random.Generator, cluster: Cluster, num_experts: int) -> Placement:
    """Return a placement of one layer; devices differ in how many experts they have."""
    slots_P = np.full(num_experts * cluster.num_devices, -1, np.int32)
    slots_P[rng.permutation(len(slots_P))[:num_experts]] = np.arange(num_experts)
    return Placement(
        policy="test",
        num_experts=num_experts,
        physical_to_logical_LP=slots_P[None],
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
    )


@PROPERTY
@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(["sync", "async", "two_batch"]),
    dedup=st.sampled_from(["none", "device", "node"]),
)
def test_the_clock_equals_the_full_path_and_its_bound_holds(seed: int, mode: str, dedup: Dedup) -> None:
    rng = np.random.default_rng(seed)
    clock, planner, cluster, steps = random_clock(rng, mode, dedup)
    bound_s = clock.bound_seconds(0)
    for _ in range(3):
        placement = random_placement(rng, cluster, 2 * cluster.num_devices)
        counter, expected_s = TrafficCounter(placement, planner.transmission.num_chunks), 0.0
        for step in steps:
            traffic = counter.count(step.topk_expert_ids_TLK, step.home_T)
            plan = planner.plan(step.works, traffic, step.kv_tokens_RR)
            expected_s += step.weight * simulate_step(plan, cluster, "analytic")[0].end_s
        found_s = clock.seconds(0, placement.device_of_expert_RLE[0, 0])
        assert found_s == pytest.approx(expected_s, rel=1e-9)
        assert bound_s <= found_s * (1 + 1e-12)


def test_without_growing_costs_the_bound_leaves_experts_out() -> None:
    # 13.2 s less the 4 s of the experts.
    cluster = star(2, bandwidth=4.0)
    step = decode_step(2, [[0, 2], [1, 3]], [0, 1])
    planner = sync_planner(cluster, Moe(num_experts=4, topk=2, expert_ffn_size=1))
    clock = AnalyticClock(planner, cluster, [step], 4, growing=False)
    assert clock.bound_seconds(0) == pytest.approx(9.2, rel=1e-12)


@pytest.mark.parametrize("devices", [[0, 1, 0], [0, 1, 0, 2], [0, 1, 0, -1]])
def test_devices_of_experts_are_checked(devices: list[int]) -> None:
    with pytest.raises(ValueError, match="the device of each expert"):
        hand_clock().seconds(0, np.array(devices))


# The policy.


class CountingClock:
    """A clock whose time is a sum over pairs of experts on one device; counts how often it is asked."""

    def __init__(self, apart_EE: npt.NDArray[np.float64]) -> None:
        self.apart_EE, self.asked = apart_EE, 0

    def seconds(self, layer: int, device_of_expert_E: Devices) -> float:
        self.asked += 1
        together_EE = device_of_expert_E[:, None] == device_of_expert_E
        return 1.0 + float((self.apart_EE * together_EE).sum())

    def bound_seconds(self, layer: int) -> float:
        return 1.0


def test_the_obvious_placement_is_found() -> None:
    # By hand (above): experts 0 and 2 belong with the first token, 1 and 3 with the second. Both starts are 0, 1 |
    # 2, 3, one time asked for; the swaps that would do are 0 with 3 and 1 with 2, two of four.
    # Each then has all it needs.
    problem = problem_of(2, [[0, 2], [1, 3]], clock=hand_clock)
    placement = PredictedTime(max_evaluations=5).place(problem)
    device_E = placement.device_of_expert_RLE[0, 0]
    assert device_E[0] == device_E[2] != device_E[1] == device_E[3]
    assert hand_clock().seconds(0, device_E) == pytest.approx(13.2, rel=1e-12)


@PROPERTY
@given(
    seed=st.integers(0, 2**32 - 1),
    num_devices=st.integers(1, 4),
    per_device=st.integers(1, 4),
    max_evaluations=st.integers(1, 300),
)
def test_the_search(seed: int, num_devices: int, per_device: int, max_evaluations: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts = num_devices * per_device
    topk = min(2, num_experts)
    ids_TK = np.argsort(rng.random((30, num_experts)), axis=1)[:, :topk]
    clock = CountingClock(rng.random((num_experts,) * 2))
    problem = problem_of(num_devices, ids_TK.tolist(), num_experts=num_experts, clock=lambda: clock)
    policy = PredictedTime(max_evaluations=max_evaluations, seed=seed % 5)
    placement = policy.place(problem)
    asked, clock.asked = clock.asked, 0
    assert asked <= max_evaluations
    np.testing.assert_array_equal(np.sort(placement.physical_to_logical_LP[0]), np.arange(num_experts))
    again = policy.place(problem)
    np.testing.assert_array_equal(placement.physical_to_logical_LP, again.physical_to_logical_LP)
    device_E = placement.device_of_expert_RLE[0, 0]
    found_s = clock.seconds(0, device_E)
    for start in list(STARTS)[:max_evaluations]:
        assert found_s <= clock.seconds(0, POLICIES[start]().place(problem).device_of_expert_RLE[0, 0])
    if asked < max_evaluations:  # it ended by itself: no swap is faster
        for first, second in product(range(num_experts), repeat=2):
            swapped_E = device_E.copy()
            swapped_E[[first, second]] = device_E[[second, first]]
            assert clock.seconds(0, swapped_E) >= found_s * (1 - 2e-9)


def test_a_scenario_gets_faster_and_others_make_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    start, searched = (
        scenario(2, "h200-1x8", placement=placement)
        for placement in ({"policy": "contiguous"}, {"policy": "predicted_time", "max_evaluations": 60})
    )
    before, after = (sum(step.duration_s for step in simulate(spec).steps[3]) for spec in (start, searched))
    assert after < before
    monkeypatch.setattr("epsim.run.layer_clock", lambda *_: pytest.fail("asked for a clock"))
    assemble(start)


# Bad input.


def test_where_the_policy_does_not_go() -> None:
    problem = problem_of(2, [[0, 2], [1, 3]], clock=hand_clock)
    for changes, message in (
        (
            {"clock": None},
            "placement.policy: predicted_time goes with experts spread over all devices; "
            "write parallelism.kind: ep, or another policy",
        ),
        ({"trace": None}, "placement.policy: predicted_time needs to know which experts each token chose"),
    ):
        with pytest.raises(PlacementError) as error:
            PredictedTime().place(problem_of(2, [[0, 2], [1, 3]], **{"clock": hand_clock, **changes}))
        assert str(error.value).startswith(message)
    with pytest.raises(PlacementError, match="predicted_time goes with experts spread over all"):
        PredictedTime().place(problem.on_devices(np.arange(2)))
    with pytest.raises(PlacementError, match="3 experts do not divide over 2 devices"):
        PredictedTime().place(problem_of(2, [[0, 1], [1, 2]], clock=hand_clock))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallelism": {"kind": "afd"}},
            "placement.policy: predicted_time goes with experts spread over all devices",
        ),
        ({"parallelism": {"kind": "pd"}}, "placement.policy: predicted_time goes with experts spread over all devices"),
        (
            {"transmission": {"barriers": "own"}, "simulation": {"fidelity": "event"}},
            'placement.policy: "predicted_time" has no formula for transmission.barriers: own; write another policy',
        ),
        (
            {"overrides": {"cluster.links.0.burst": "1 MB"}, "simulation": {"fidelity": "event"}},
            'placement.policy: "predicted_time" has no formula for burst (of the link ',
        ),
    ],
)
def test_what_a_scenario_cannot_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PlacementError, ScenarioError)) as error:
        assemble(scenario(1, "h200-1x8", placement={"policy": "predicted_time"}, **changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_evaluations": 0}, "placement.max_evaluations: 0 "),
        ({"start": []}, "placement.start: "),
        ({"start": ["random"]}, "placement.start"),
        ({"seed": -1}, "placement.seed: -1 "),
    ],
)
def test_what_the_fields_refuse(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ScenarioError) as error:
        scenario(1, "h200-1x8", placement={"policy": "predicted_time", **fields})
    assert str(error.value).startswith(where)


def test_the_clock_stands_on_the_steps_of_a_run() -> None:
    spec = scenario(1, "h200-1x8")
    deployment = assemble(spec)
    ids = deployment.trace.requests.request_id_Q[:3]
    weights = [1 for _ in step_inputs(deployment, ids, None)]
    assert spaced_steps(len(weights) - 1, 16) == list(enumerate(weights))
