"""Placements refitted in time: weights moved by hand, drift that online follows, every step once, and the command."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.lab import mixed_trace, write_question
from reference.tiny import device_type, link, make_cluster, make_placement, star

from epsim import cli
from epsim.cluster import Cluster
from epsim.errors import TraceError
from epsim.lab.moves import moved_experts_RR, settle
from epsim.lab.question import Question, ask, choose
from epsim.lab.replay import Parts, ReplayDesign, count_replay_steps, replay_policies
from epsim.lab.sequence import followed_by, in_sequence
from epsim.lab.serving import Schedule
from epsim.placement import POLICIES, Placement
from epsim.run import deploy, replay
from epsim.sim import Fidelity, simulate_step
from epsim.sim.bulk import bulk_plan
from epsim.trace import RoutingTrace

EXPERT_BYTES = 3 * 2048 * 1024 * 2  # of OLMoE, in bf16
Values = dict[str, Any]


def two_nodes() -> Cluster:
    """Return d0 and d1 on one switch, d2 and d3 on another, and a narrow link between the two."""
    links = [link(f"d{r}", f"s{r // 2}", 10.0) for r in range(4)] + [link("s0", "s1", 5.0)]
    return make_cluster([device_type()] * 4, links, nodes=[0, 0, 1, 1], switches=("s0", "s1"))


def placement(slots_P: list[int], num_devices: int = 2, num_experts: int = 4) -> Placement:
    return make_placement([slots_P], [0] * num_devices, num_experts)


def slots(found: Placement) -> list[int]:
    return list(found.physical_to_logical_LP[0])


@pytest.mark.parametrize("fidelity", ["event", "simpy", "analytic"])
def test_the_time_of_a_move_by_hand(fidelity: Fidelity) -> None:
    # Links of 10 B/s, segments of 10 B. 20 B each way between 0 and 1: two segments over two links, 3 s. Of 20 B from
    # 0 and from 1 to 2, the first segment is at the switch after 1 s, and the link to 2 then carries 40 B: 5 s.
    cluster = star(3, 10.0)
    for sent, seconds in (({(0, 1): 20.0, (1, 0): 20.0}, 3.0), ({(0, 2): 20.0, (1, 2): 20.0}, 5.0), ({}, 0.0)):
        bytes_RR = np.zeros((3, 3))
        for pair, size in sent.items():
            bytes_RR[pair] = size
        result, _ = simulate_step(bulk_plan(bytes_RR, cluster), cluster, fidelity)
        # The closed form shares the last link out between the flows: about right for their end.
        assert result.kv_end_s == pytest.approx(seconds, rel=0.1 if fidelity == "analytic" else 1e-12)
        assert result.end_s == 0.0
        assert result.delivered_bytes_RR.sum() == bytes_RR.sum()


def test_a_move_with_bytes_to_oneself_is_refused() -> None:
    with pytest.raises(ValueError, match="zeros on its diagonal"):
        bulk_plan(np.ones((3, 3)), star(3, 10.0))


def test_experts_that_stay_keep_their_slots_and_devices_alike_trade() -> None:
    one_node = make_cluster(
        [device_type()] * 2, [link(f"d{r}", "s", 10.0) for r in range(2)], nodes=[0, 0], switches=("s",)
    )
    old = placement([0, 1, 2, 3])
    # Only slots and devices differ: nothing is left to move. Without trading, all four move.
    assert slots(settle(old, placement([3, 2, 1, 0]), one_node, match_devices=True)) == [0, 1, 2, 3]
    apart = settle(old, placement([3, 2, 1, 0]), one_node, match_devices=False)
    assert moved_experts_RR(old, apart, one_node).tolist() == [[0, 2], [2, 0]]
    # 2 and 1 change places, 0 and 3 stay where they were.
    assert slots(settle(old, placement([2, 0, 3, 1]), one_node, match_devices=True)) == [0, 2, 1, 3]
    # On two nodes devices do not trade.
    assert slots(settle(old, placement([2, 3, 0, 1]), star(2, 10.0), match_devices=True)) == [2, 3, 0, 1]


def test_empty_slots_and_other_numbers_of_slots_are_settled() -> None:
    old, new = placement([0, 1, -1, 2, 3, -1]), placement([1, 3, 0, 2, 3, -1])
    settled = settle(old, new, star(2, 10.0), match_devices=True)
    assert slots(settled) == [0, 1, 3, 2, 3, -1]
    assert moved_experts_RR(old, settled, star(2, 10.0)).tolist() == [[0, 0], [1, 0]]
    wider = settle(placement([0, 1, 2, 3]), new, star(2, 10.0), match_devices=True)
    assert slots(wider) == [1, 3, 0, 2, 3, -1]


def test_weights_come_from_the_nearest_holder_and_from_the_device_itself_for_nothing() -> None:
    # Expert 0 is on 0 and 2, expert 1 on 1 and 2. Device 3 takes both from 2 (10 B/s, not 5); device 1 takes 0 from 0;
    # device 0 fills a second slot with its own expert 0.
    old = make_placement([[0, -1, 1, -1, 0, 1, 2, 3]], [0, 0, 1, 1], 4)
    new = make_placement([[0, 0, 0, 1, 2, 3, 0, 1]], [0, 0, 1, 1], 4)
    # 2 takes 2 and 3 from the only one that has them, which overwrites them.
    assert moved_experts_RR(old, new, two_nodes()).tolist() == [
        [0, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 2],
        [0, 0, 2, 0],
    ]
    # 2 has both from 0 (one link of 2 B/s) and from 1 (two links of 10 B/s): the widest route counts first.
    links = [link("d0", "d2", 2.0), link("d0", "s", 10.0), link("d1", "s", 10.0), link("d2", "s", 10.0)]
    narrow = make_cluster([device_type()] * 3, links, nodes=[0, 0, 0], switches=("s",))
    old, new = (make_placement([slots_P], [0] * 3, 2) for slots_P in ([0, 0, 1], [0, 0, 0, 1, 1, 0]))
    assert moved_experts_RR(old, new, narrow)[:, 2].tolist() == [0, 1, 0]
    # Of holders that are equally near, the one that sends least: expert 0 on 0 and 1, wanted by 2 and 3.
    old = make_placement([[0, 1, 0, 2, 3, -1, 3, -1]], [0] * 4, 4)
    new = make_placement([[0, 1, 0, 2, 3, 0, 3, 0]], [0] * 4, 4)
    assert moved_experts_RR(old, new, star(4, 10.0))[:2].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def drifting() -> RoutingTrace:
    """Return 16 requests of 3 prompt tokens and 1 decode step: 8 that choose experts 0 and 1, then 8 that choose 2, 3.

    Expert 0 to 7; both layers alike.
    """
    trace = mixed_trace(0, 16)
    later_T = trace.request_id_T >= 18
    ids_TLK = np.where(later_T[:, None, None], [2, 3], [0, 1]).astype(np.uint8)
    return dataclasses.replace(trace, topk_expert_ids_TLK=np.repeat(ids_TLK, 2, axis=1))


def question(folder: Path, trace: RoutingTrace, *overrides: str) -> Question:
    path, scenario = write_question(folder, trace)
    return ask(path, scenario=scenario, overrides=overrides)


def rows(asked: Question, every: int, window: int, policy: str = "eplb_global", **changes: Any) -> dict[str, Values]:
    """Return the rows of a replay of three quarters of the requests in batches of 2, by placement."""
    design = ReplayDesign(schedule=Schedule(every=every, window=window), fit_share=0.25, batch_size=2, **changes)
    parts, chosen = Parts.of(asked, design), choose([policy], "contiguous", asked)
    advanced: list[None] = []
    found = replay_policies(parts, chosen, design, lambda: advanced.append(None))
    assert len(advanced) == count_replay_steps(parts, chosen)
    return {row["placement"]: row for row in found["rows"]}


def without_times(row: Values) -> Values:
    return {name: value for name, value in row.items() if name not in ("placement", "time_to_place_s")}


def test_online_follows_a_drift_that_fixed_does_not(tmp_path: Path) -> None:
    # Fitted to 0 and 1, the balancer has {0, 2, 3, 4} and {1, 5, 6, 7}: 2 and 3 together. 12 requests make 6 batches of
    # 2 steps; from step 4 on tokens choose 2 and 3. Before step 4 all was 0 and 1: nothing moves. Before step 8 the
    # last 4 steps were 2 and 3: {0, 1, 2, 4} and {3, 5, 6, 7}, so 1 and 3 change places in both layers.
    found = rows(question(tmp_path, drifting()), every=4, window=4)
    fixed, online = found["fixed"], found["online"]
    form = "balancedness_ratio_of_sums"
    assert fixed["steps"][form] == [1.0] * 4 + [0.5] * 8
    assert online["steps"][form] == [1.0] * 4 + [0.5] * 4 + [1.0] * 4
    assert online[form] > fixed[form]
    assert [move["moved_experts"] for move in online["rebalances"]] == [0, 4]
    assert online["moved_bytes"] == 4 * EXPERT_BYTES
    waits = online["steps"]["moving_s"]
    assert [step for step, seconds in enumerate(waits) if seconds] == [8]
    # Two experts each way over a link of 10 Gbit/s take at least their bytes over its bandwidth.
    assert waits[8] > 2 * EXPERT_BYTES / 1.25e9
    assert online["moving_s"] == waits[8]
    # Step 8 is the prefill of the fifth of six batches: its two requests wait, no decode step does.
    assert online["ttft_s"] - online["ttft_s_without_moves"] == pytest.approx(waits[8] / 6)
    assert online["tpot_s"] == pytest.approx(online["tpot_s_without_moves"])
    saved = np.subtract(fixed["steps"]["step_s"], online["steps"]["step_s"])
    assert (saved[:8] == 0).all()
    assert online["saved_s_per_step"] == pytest.approx(saved[4:].mean())  # since the first rebalance
    assert online["break_even_steps"] == pytest.approx(waits[8] / 2 / saved[4:].mean())


def test_a_move_before_a_decode_step_lengthens_tpot(tmp_path: Path) -> None:
    # Refitted before steps 7 (decode of the fourth batch): 1 and 3 move, as above.
    found = rows(question(tmp_path, drifting()), every=7, window=2)["online"]
    waits = found["steps"]["moving_s"]
    assert [step for step, seconds in enumerate(waits) if seconds] == [7]
    assert found["tpot_s"] - found["tpot_s_without_moves"] == pytest.approx(waits[7] / 6)
    assert found["ttft_s"] == pytest.approx(found["ttft_s_without_moves"])


def test_the_window_is_the_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Refitted before steps 4 and 8 to steps 1 to 3 and 5 to 7: a decode, a prefill and a decode step of two requests,
    # 2 + 6 + 2 tokens. A window longer than what was served has it all: 16 tokens before step 4, and then 32.
    from epsim.lab import serving

    seen: list[tuple[int, int]] = []

    def spied(trace: RoutingTrace, load: Callable[..., Any] = serving.expert_load) -> Any:
        seen.append((trace.num_tokens, int(trace.step_T.sum())))
        return load(trace)

    monkeypatch.setattr(serving, "expert_load", spied)
    asked = question(tmp_path, drifting())
    rows(asked, every=4, window=3)
    rows(asked, every=4, window=100)
    assert seen == [(10, 4), (10, 4), (16, 4), (32, 8)]


def test_fixed_is_what_the_simulator_gives_and_every_step_counts_once(tmp_path: Path) -> None:
    asked = question(tmp_path, mixed_trace(), "transmission.dedup=node")
    design = ReplayDesign(schedule=Schedule(every=3, window=3), fit_share=0.25, batch_size=2)
    parts, (choice, *_) = Parts.of(asked, design), choose(["random,seed=1"], None, asked).choices
    found = rows(asked, every=3, window=3, policy="random,seed=1")
    workload = choice.spec.workload.model_copy(update={"batch_sizes": [2], "num_batches": parts.num_batches})
    spec = choice.spec.model_copy(update={"workload": workload})
    layout = parts.lay_out(choice)
    outcome = replay(deploy(spec, asked.model, asked.cluster, parts.replayed, layout), spec)
    values = outcome.results["batch_sizes"][0]
    for row in (found["fixed"], found["online"]):  # the same seed: the same placement again
        assert row["ttft_s"] == values["ttft_s"]["mean"]
        assert row["tpot_s"] == pytest.approx(values["tpot_s"]["mean"])
        assert row["steps"]["step_s"] == [step.duration_s for step in outcome.steps[2]]
        assert row["moved_bytes"] == 0
        # 10 requests, 3 (2.5 and a half) are fitted to; the next 6 of 7 are 3 batches: 3 with image (8 tokens), 3 of 4.
        assert sum(row["steps"]["num_tokens"]) == 3 * 8 + 3 * 4
        assert len(row["steps"]["phase"]) == parts.num_steps == len(outcome.steps[2])
    assert found["online"]["num_rebalances"] == (parts.num_steps - 1) // 3


def test_refitting_later_than_the_end_is_fixed(tmp_path: Path) -> None:
    asked = question(tmp_path, drifting())
    for every in (12, 1000):  # there are 12 steps
        found = rows(asked, every=every, window=4)
        online = without_times(found["online"])
        assert online.pop("saved_s_per_step") is None
        assert online.pop("break_even_steps") is None
        assert online == without_times(found["fixed"])


def test_all_leaves_out_what_cannot_be_refitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {kind: POLICIES[kind] for kind in ("contiguous", "modality_bins", "predicted_time", "file")}
    monkeypatch.setattr("epsim.lab.question.POLICIES", some)
    asked = question(tmp_path, mixed_trace())
    design = ReplayDesign(schedule=Schedule(every=3, window=2), batch_size=1)
    parts, chosen = Parts.of(asked, design), choose(["all"], None, asked)
    found = replay_policies(parts, chosen, design)
    assert [(row["policy"], row["placement"]) for row in found["rows"]] == [
        ("contiguous", "baseline"),
        ("modality_bins", "fixed"),
        ("modality_bins", "online"),
    ]
    assert {one["policy"] for one in found["left_out"]} == {"predicted_time", "file"}


def test_the_longest_output_is_cut_and_batches_are_limited(tmp_path: Path) -> None:
    asked = question(tmp_path, drifting(), "workload.max_output_tokens=1", "workload.num_batches=4")
    assert rows(asked, every=2, window=2)["online"]["steps"]["phase"] == ["prefill"] * 4


def test_traces_one_after_the_other() -> None:
    first, second = mixed_trace(1, 1), mixed_trace(0, 2, seed=1)
    whole = in_sequence([first, second])
    assert whole.requests.request_id_Q.tolist() == [0, 1, 2, 3]
    ids_TLK = np.concatenate((first.topk_expert_ids_TLK, second.topk_expert_ids_TLK))
    assert (whole.topk_expert_ids_TLK == ids_TLK).all()
    assert (whole.name, whole.select([2]).name) == ("trace, then trace", "trace, then trace")
    meta = dataclasses.replace(second.meta, mock=True, origin="synthetic")
    assert in_sequence([first, dataclasses.replace(second, meta=meta)]).meta.kind == "synthetic, MOCK"
    meta = dataclasses.replace(second.meta, num_experts=16)
    with pytest.raises(TraceError, match="--then: trace has other layers or experts"):
        in_sequence([first, dataclasses.replace(second, meta=meta)])


def test_a_question_goes_on_with_another_trace(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    later, _ = write_question(tmp_path / "b", mixed_trace(0, 4, seed=3))
    asked = question(tmp_path, mixed_trace())
    longer = followed_by(asked, [later, later])
    assert len(longer.trace.requests) == 10 + 2 * 4
    assert longer.load_MLE.sum() == longer.trace.num_tokens * 2 * 2  # layers, top-k
    assert followed_by(asked, []) is asked


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `epsim place` on the drifting trace: exit code, what it prints, what it says."""
    monkeypatch.chdir(tmp_path)
    write_question(tmp_path, drifting())

    def run(*arguments: str) -> tuple[int, str, str]:
        words = ["trace.arrow", "--scenario", "small.yaml", "--policy", "eplb_global", *arguments]
        monkeypatch.setattr(sys, "argv", ["epsim", "place", *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        return int(exit_info.value.code or 0), printed.out, printed.err

    return run


def test_the_command(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    few = ("--replay", "--every", "4", "--fit-share", "0.25", "--batch-size", "2")
    code, printed, said = run(*few, "--plot", "out")
    assert (code, said) == (0, "wrote out/replay.png\n")
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert "fitted to the first 4 requests of trace.arrow; the next 12 replayed in 6 batches of 2, 12 steps" in printed
    assert "online: from there refitted every 4 steps to the last 4" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for name in ("contiguous, baseline", "eplb_global, fixed", "eplb_global, online"):
        assert any(line.startswith(name) for line in lines)
    assert any(line.startswith("eplb_global 2 4 50.33 MB") for line in lines)  # 4 x 12.58 MB
    found = json.loads(run(*few, "--json", "--then", "trace.arrow", "--no-match-devices")[1])
    assert found["design"]["num_replayed"] == 24
    assert found["trace"]["name"] == "trace.arrow, then trace.arrow"
    assert not found["design"]["match_devices"]
    assert all(len(row["steps"]["step_s"]) == 24 for row in found["rows"])


REPLAY = ("--replay", "--every", "4")
MISTAKES = {
    "no interval": (("--replay",), "--every: is missing; write after how many steps"),
    "interval": (("--replay", "--every", "0"), "--every: 0 is below 1"),
    "window": ((*REPLAY, "--window", "0"), "--window: 0 is below 1"),
    "batch": ((*REPLAY, "--batch-size", "0"), "--batch-size: 0 is below 1"),
    "large batch": ((*REPLAY, "--batch-size", "9"), "--batch-size: 9 needs as many requests to replay, 8 of 16"),
    "share": ((*REPLAY, "--fit-share", "1"), "--fit-share: 1.0 is not between 0 and 1"),
    "no share": ((*REPLAY, "--fit-share", "0.01"), "--fit-share: 0.01 of 16 requests is none"),
    "homes": ((*REPLAY, "--set", "homes.policy=by_modality"), 'homes.policy: "by_modality" follows the placement'),
    "baseline alone": ((*REPLAY, "--baseline", "eplb_global"), "--policy: eplb_global is the baseline"),
    "clock": ((*REPLAY, "--policy", "predicted_time"), '--policy "predicted_time": predicted_time predicts batches'),
    "no such trace": ((*REPLAY, "--then", "no.arrow"), "no.arrow"),
    "seeds": ((*REPLAY, "--seeds", "3"), "--seeds: has no meaning with --replay"),
    "out": ((*REPLAY, "--out", "p.json"), "--out: has no meaning with --replay"),
    "best": ((*REPLAY, "--best", "tpot"), "--best: has no meaning with --replay"),
    "pairs": ((*REPLAY, "--pairs"), "--pairs: has no meaning with --replay"),
    "heat map": ((*REPLAY, "--heat-map", "out"), "--heat-map: has no meaning with --replay"),
    "every alone": (("--every", "4"), "--every: has no meaning without --replay"),
    "then alone": (("--then", "trace.arrow"), "--then: has no meaning without --replay"),
    "match alone": (("--no-match-devices",), "--match-devices: has no meaning without --replay"),
    "plot alone": (("--plot", "out"), "--plot: has no meaning without --replay"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    arguments, words = MISTAKES[name]
    before = sorted(tmp_path.rglob("*"))
    code, printed, said = run(*arguments)
    assert (code, printed) == (2, "")
    assert len(said.splitlines()) == 1
    assert said.startswith("epsim: ")
    assert words in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_later_trace_must_fit_the_model(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "b").mkdir()
    meta = dataclasses.replace(mixed_trace().meta, num_experts=16)
    write_question(tmp_path / "b", mixed_trace(meta=meta))
    code, _, said = run(*REPLAY, "--then", "b/trace.arrow")
    assert code == 2
    assert "trace: b/trace.arrow has experts 16, model" in said
