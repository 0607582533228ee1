"""The placement lab: intervals, splits and crossings by hand, and that what is held out stays held out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reference.captured import by_hand
from reference.lab import mixed_trace, write_question
from reference.tiny import device_type as any_device
from reference.tiny import link, make_cluster, make_placement

from epsim.errors import InputError
from epsim.lab.choice import best_policy
from epsim.lab.crossing import count_crossing
from epsim.lab.experiment import Design, compare_policies, count_steps
from epsim.lab.interval import Estimate
from epsim.lab.question import Question, ask, choose
from epsim.lab.split import split_requests
from epsim.lab.trial import Sample, Trial, fit_to_all, replica_bytes, run_trial
from epsim.layout import Layout
from epsim.placement import balanced
from epsim.run import build_transmission, deploy, replay
from epsim.sim import Transmission
from epsim.trace import RoutingTrace
from epsim.traffic import Dedup, MessageFormat

SPREAD = ["cluster.devices[0].each={i: 2, j: 2}", "cluster.nics[0].each={i: 2, j: 2}"]
SPREAD += [f"cluster.links[{name}].each={{i: 2, j: 2}}" for name in ("nvlink", "pcie", "ndr")]


def question(folder: Path, trace: RoutingTrace, overrides: Sequence[str] = (), **scenario: str) -> Question:
    folder.mkdir(exist_ok=True)
    path, file = write_question(folder, trace, **scenario)
    return ask(path, scenario=file, overrides=overrides)


def trial(asked: Question, policy: str, seed: int = 0, *, with_bounds: bool = False) -> Trial:
    (choice,) = choose([policy], None, asked).choices
    sample = Sample.of(asked, split_requests(asked.trace.requests, 0.5, seed))
    return run_trial(asked, choice, sample, lambda: None, with_bounds=with_bounds)


def test_an_interval_by_hand() -> None:
    # Values 1, 2, 3: mean 2, s^2 = 1, n = 3, t(2, 0.975) = 4.302653. As many held out as fitted to:
    # half = 4.302653 * sqrt((1/3 + 1) * 1) = 4.968276. Without the correction: 4.302653 / sqrt(3) = 2.484138.
    found = Estimate.of([1.0, 2.0, 3.0], 1.0)
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.968276, abs=1e-5)
    assert found.high == pytest.approx(2 + 4.968276, abs=1e-5)
    assert found.contains_zero
    assert Estimate.of([1.0, 2.0, 3.0], 0.0).high == pytest.approx(2 + 2.484138, abs=1e-5)
    assert not Estimate.of([10.0, 11.0, 12.0], 1.0).contains_zero


def test_one_split_has_no_interval() -> None:
    found = Estimate.of([5.0], 1.0)
    assert (found.mean, found.low, found.high, found.contains_zero) == (5.0, None, None, None)


def test_splits_are_disjoint_stratified_and_of_their_seed() -> None:
    requests = mixed_trace(6, 4).requests
    for seed in range(5):
        split = split_requests(requests, 0.5, seed)
        both = np.concatenate((split.fit_ids, split.held_out_ids))
        assert sorted(both) == list(requests.request_id_Q)
        # Ids from 16 have no image: 3 of 6 and 2 of 4 are fitted to.
        assert [np.count_nonzero(split.fit_ids < 16), np.count_nonzero(split.fit_ids >= 16)] == [3, 2]
        assert split.test_to_fit == 1.0
        assert (split.fit_ids == split_requests(requests, 0.5, seed).fit_ids).all()
    assert len({tuple(split_requests(requests, 0.5, seed).fit_ids) for seed in range(5)}) > 1
    # A quarter: 1.5 of 6, to the nearest and a half more, is 2; 1 of 4. So 7 are held out of 3.
    assert split_requests(requests, 0.25, 0).test_to_fit == 7 / 3


@pytest.mark.parametrize(
    ("num_requests", "share", "words"),
    [
        (3, 0.5, "3 requests are too few"),
        (4, 0.0, "0.0 is not between 0 and 1"),
        (4, 1.0, "1.0 is not between 0 and 1"),
        (4, 0.9, "leaves none that is held out"),
        (4, 0.1, "leaves none that is fitted to"),
    ],
)
def test_splits_that_leave_nothing_are_refused(num_requests: int, share: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        split_requests(mixed_trace(num_requests, 0).requests, share, 0)


def transmission(dedup: Dedup) -> Transmission:
    form = MessageFormat(dispatch_vector_bytes=10.0, combine_vector_bytes=4.0, pair_bytes=1.0)
    return Transmission(mode="sync", dedup=dedup, num_chunks=1, message_format=form, overlap_kv=True)


def two_requests() -> RoutingTrace:
    """Return a token of experts 1 and 2, and another request's of experts 2 and 3."""
    one = by_hand([("T", [1, 2], [1, 1]), ("T", [2, 3], [1, 1])])
    return dataclasses.replace(one, request_id_T=np.array([0, 1], np.int32), position_T=np.zeros(2, np.int32))


@pytest.mark.parametrize(("dedup", "total"), [("device", 60.0), ("node", 61.0)])
def test_what_crosses_by_hand(dedup: Dedup, total: float) -> None:
    # Devices 0, 1 in node 0 and 2, 3 in node 1, expert e on device e. Request 0 lives on device 0: it touches 1, 2 and
    # node 1. Request 1 lives on device 1: it touches 2, 3 and node 1. So 2 remote devices and 1 remote node each.
    # Out 10 + 1 a vector with a pair, back 4. device: four such messages, 4 * 15 = 60. node: 0 to 1 is 15 in all;
    # 0 to its gateway 2 is 15; 1 to its gateway 3 is 10 + 2 pairs + 4 = 16, and from there to 2 it is 15. In all 61.
    links = [link(f"d{r}", "switch", 1.0) for r in range(4)]
    cluster = make_cluster([any_device()] * 4, links, nodes=[0, 0, 1, 1], switches=("switch",))
    placement = make_placement([[0, 1, 2, 3]], [0, 0, 1, 1], 4)
    layout = Layout(description="ep", card=None, placement=placement, homes=balanced(4))  # type: ignore[arg-type]
    found = count_crossing(two_requests(), layout, cluster, transmission(dedup))
    assert found.remote_devices == 2.0
    assert found.remote_nodes == 1.0
    assert found.bytes_RR.sum() == total
    assert found.bytes_per_token == total / 2
    assert (found.bytes_RR[0, 1], found.bytes_RR[1, 0]) == (11.0, 4.0)
    assert found.bytes_RR[1, 3] == (11.0 if dedup == "device" else 12.0)
    assert found.bytes_RR[3, 2] == (0.0 if dedup == "device" else 11.0)
    assert not found.bytes_RR.diagonal().any()
    assert found.served_LR.tolist() == [[0, 1, 2, 1]]


@pytest.mark.parametrize("dedup", ["none", "device", "node"])
def test_bytes_are_those_that_the_simulator_sends(tmp_path: Path, dedup: Dedup) -> None:
    asked = question(tmp_path, mixed_trace(), SPREAD, cluster="h100-2x8", dedup=dedup)
    (choice,) = choose(["random,seed=4"], None, asked).choices
    layout = fit_to_all(asked, choice)
    whole = asked.trace.select(asked.trace.requests.request_id_Q)
    found = count_crossing(whole, layout, asked.cluster, build_transmission(choice.spec, asked.model))
    workload = choice.spec.workload.model_copy(update={"batch_sizes": [10], "num_batches": 1})
    spec = choice.spec.model_copy(update={"workload": workload})
    steps = replay(deploy(spec, asked.model, asked.cluster, whole, layout), spec).steps[10]
    assert found.bytes_RR.sum() == pytest.approx(sum(step.sent_bytes for step in steps), rel=1e-12)
    assert found.num_tokens == sum(step.num_tokens for step in steps)


def with_rows(trace: RoutingTrace, ids: np.ndarray, seed: int) -> RoutingTrace:
    """Return the trace with other experts for the tokens of these requests."""
    other = mixed_trace(seed=seed).topk_expert_ids_TLK
    own_T = np.isin(trace.request_id_T, ids)
    chosen = np.where(own_T[:, None, None], other, trace.topk_expert_ids_TLK)
    return dataclasses.replace(trace, topk_expert_ids_TLK=chosen)


def test_held_out_figures_do_not_see_what_was_fitted_to_nor_the_other_way_round(tmp_path: Path) -> None:
    trace = mixed_trace()
    split = split_requests(trace.requests, 0.5, 0)
    first = question(tmp_path / "a", trace)
    fit_changed = question(tmp_path / "b", with_rows(trace, split.fit_ids, 7))
    held_out_changed = question(tmp_path / "c", with_rows(trace, split.held_out_ids, 7))

    before, after = trial(first, "contiguous"), trial(fit_changed, "contiguous")
    assert before.times == after.times
    assert before.values["remote_bytes_per_token"] == after.values["remote_bytes_per_token"]
    assert before.values["objective_held_out"] == after.values["objective_held_out"]
    assert before.values["objective_fit"] != after.values["objective_fit"]

    before, after = trial(first, "modality_bins"), trial(held_out_changed, "modality_bins")
    assert before.values["objective_fit"] == after.values["objective_fit"]
    assert before.values["objective_held_out"] != after.values["objective_held_out"]


def test_policies_are_compared_split_by_split(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace(), homes="by_modality")
    chosen = choose(["modality_bins", "contiguous"], "contiguous", asked)
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1

    found = compare_policies(asked, chosen, Design(num_seeds=3), advance)
    assert steps == count_steps(asked, chosen, Design(num_seeds=3))
    bins, base = found["policies"]
    assert found["baseline"] == base["policy"] == "contiguous"
    own, reference = (policy["metrics"]["remote_bytes_per_token"] for policy in (bins, base))
    pairs = list(zip(own["values"], reference["values"], strict=True))
    assert own["difference"]["values"] == [a - b for a, b in pairs]
    assert own["change_percent"]["mean"] == pytest.approx(np.mean([100 * (a / b - 1) for a, b in pairs]))
    assert reference["difference"]["values"] == [0.0, 0.0, 0.0]
    assert reference["difference"]["contains_zero"]
    assert bins["metrics"]["remote_nodes_per_token"]["mean"] == bins["metrics"]["remote_devices_per_token"]["mean"]
    assert [batch["num_batches"] for batch in found["batches"]] == [5, 2]  # 5 of 10 requests are held out
    seconds = bins["metrics"]["time_to_place_s"]
    assert seconds["median"] == sorted(seconds["values"])[1]
    assert bins["metrics"]["replica_memory_bytes"]["max"] == 0.0
    total = sum(map(sum, bins["sent_bytes"]))
    split = split_requests(asked.trace.requests, 0.5, 0)
    assert total == pytest.approx(own["values"][0] * asked.trace.select(split.held_out_ids).num_tokens)


def test_the_scenario_may_ask_for_fewer_batches(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace(), ["workload.num_batches=2"])
    assert [asked.num_batches(size, 5) for size in (1, 2, 5)] == [2, 2, 1]


def test_all_takes_what_applies_and_says_why_others_do_not(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace())
    chosen = choose(["all", "random,seed=3"], None, asked)
    labels = [choice.label for choice in chosen.choices]
    assert {"contiguous", "random", "modality_bins", "random,seed=3"} <= set(labels)
    assert (chosen.baseline, chosen.optional) == ("contiguous", True)
    assert chosen.left_out["file"].startswith("placement.path: is missing")
    assert len(set(labels)) == len(labels)
    cut = dataclasses.replace(
        chosen, choices=tuple(c for c in chosen.choices if c.label in ("contiguous", "random,seed=3"))
    )
    three = dataclasses.replace(cut, choices=(*cut.choices, *choose(["modality_bins,num_bins=3"], None, asked).choices))
    found = compare_policies(asked, three, Design(num_seeds=1))
    assert [policy["policy"] for policy in found["policies"]] == ["contiguous", "random,seed=3"]
    assert "3 does not divide 8 experts" in found["left_out"][-1]["reason"]
    with pytest.raises(InputError, match="3 does not divide 8 experts"):
        compare_policies(asked, dataclasses.replace(three, optional=False), Design(num_seeds=1))


def test_only_a_baseline_that_nobody_named_gives_way(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace())
    chosen = choose(["all"], "exact", asked)
    assert (chosen.baseline, chosen.choices[0].label) == ("exact", "exact")
    assert "exact" not in chosen.left_out  # it is asked for by name
    bad = "modality_bins,num_bins=3"
    found = choose(["all"], bad, asked)
    few = dataclasses.replace(found, choices=found.choices[:2])
    with pytest.raises(InputError, match=f'--baseline "{bad}": .*3 does not divide 8 experts'):
        compare_policies(asked, few, Design(num_seeds=1))
    unnamed = compare_policies(asked, dataclasses.replace(few, baseline_named=False), Design(num_seeds=1))
    assert unnamed["baseline"] == "contiguous"
    assert unnamed["left_out"][-1]["policy"] == bad


def test_memory_of_replicas_by_hand() -> None:
    # 4 experts, 2 devices, 3 slots on each: device 0 holds 3 experts, device 1 holds 2 and an empty slot.
    # The even share is 2, so the fullest has one expert of 6 bytes more in each of 2 layers.
    slots = [[0, 1, 2, 2, 3, -1], [0, 1, 2, 2, 3, -1]]
    layout = Layout(description="", card=None, placement=make_placement(slots, [0, 1], 4), homes=balanced(2))  # type: ignore[arg-type]
    assert replica_bytes(layout, 6.0) == 12.0


def test_the_best_policy_by_metric() -> None:
    def policy(name: str, size: float, ttft: float, even: float, tpot: float | None = None) -> dict[str, object]:
        metrics = {"remote_bytes_per_token": {"mean": size}, "balancedness_ratio_of_sums": {"mean": even}}
        metrics["remote_devices_per_token"] = {"mean": size}
        large = {"ttft_s": {"mean": ttft}, "tpot_s": None if tpot is None else {"mean": tpot}}
        small = {"ttft_s": {"mean": -ttft}, "tpot_s": {"mean": -1.0}}
        return {"policy": name, "metrics": metrics, "batch_sizes": [small, large]}

    found = {"policies": [policy("a", 2.0, 1.0, 0.5, 3.0), policy("b", 1.0, 2.0, 0.9), policy("c", 1.0, 1.0, 0.6, 2.0)]}
    best = {metric: best_policy(found, metric) for metric in ("bytes", "devices", "ttft", "tpot", "balance")}
    assert best == {"bytes": "b", "devices": "b", "ttft": "a", "tpot": "c", "balance": "b"}
    with pytest.raises(InputError, match="--best tpot: no request has a second token; write one of bytes, devices"):
        best_policy({"policies": [policy("a", 2.0, 1.0, 0.5), policy("b", 1.0, 2.0, 0.9)]}, "tpot")


def test_costs_are_not_below_their_bounds(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace(), homes="by_modality")
    for policy in ("contiguous", "random", "modality_bins"):
        found = trial(asked, policy, with_bounds=True)
        for part in ("fit", "held_out"):
            cost, bound = found.values[f"objective_{part}"], found.bounds[f"objective_bound_{part}"]
            assert cost is not None
            assert bound is not None
            assert cost >= bound > 0
            assert found.bounds[f"objective_gap_{part}"] == pytest.approx(1 - bound / cost)
            assert (found.bounds[f"max_load_gap_{part}"] or 0.0) >= 0
