"""Whole scenarios: table S10, conservation, memory, determinism, and what the pieces say together."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsim.batch import step_inputs
from epsim.errors import CapacityError, ScenarioError, TraceError
from epsim.report.files import to_json
from epsim.run import assemble, count_steps, simulate
from epsim.scenario import ScenarioSpec, check_scenario, load_scenario
from epsim.trace import concatenate

SCENARIOS = Path(__file__).parent.parent / "scenarios"

# SMoES (Bo et al., CVPR 2026), supplement, table S10: percent of pairs that are remote ("w/o DeDup") and of tokens with
# a remote expert ("w/ DeDup"), each for prefill vision, prefill text, prefill both, decode text.
TABLE_S10 = {
    ("mmmu", "baseline"): [42.7, 70.4, 48.0, 37.4, 97.7, 99.5, 98.0, 86.5],
    ("mmmu", "attention-soft"): [8.8, 71.7, 20.7, 34.3, 33.6, 98.9, 46.1, 88.9],
    ("mmmu", "gaussian-soft"): [3.3, 76.7, 17.3, 16.0, 15.0, 99.3, 31.1, 43.3],
    ("sqa-img", "baseline"): [42.5, 74.1, 52.6, 49.0, 97.5, 99.7, 98.2, 94.9],
    ("sqa-img", "attention-soft"): [8.4, 76.3, 30.1, 41.7, 33.2, 99.3, 54.3, 90.0],
    ("sqa-img", "gaussian-soft"): [2.7, 80.3, 27.5, 17.7, 13.0, 99.2, 40.6, 49.9],
    ("pope", "baseline"): [42.9, 85.7, 47.8, 37.7, 97.8, 100.0, 98.1, 87.8],
    ("pope", "attention-soft"): [8.0, 88.2, 17.1, 31.4, 33.4, 99.9, 41.0, 84.4],
    ("pope", "gaussian-soft"): [1.8, 91.5, 12.0, 14.5, 9.0, 99.8, 19.4, 40.8],
    ("gqa", "baseline"): [43.0, 85.5, 47.9, 38.3, 97.9, 100.0, 98.1, 89.2],
    ("gqa", "attention-soft"): [8.2, 87.7, 17.4, 32.1, 34.0, 99.9, 41.7, 84.8],
    ("gqa", "gaussian-soft"): [1.9, 90.9, 12.2, 16.2, 9.3, 99.8, 19.8, 42.4],
    ("textvqa", "baseline"): [43.6, 72.5, 48.6, 43.1, 97.9, 99.1, 98.1, 90.7],
    ("textvqa", "attention-soft"): [8.9, 72.0, 19.9, 34.5, 35.8, 97.1, 46.5, 82.6],
    ("textvqa", "gaussian-soft"): [2.6, 77.2, 15.6, 21.0, 12.6, 97.5, 27.4, 47.1],
}


def scenario(**changes: Any) -> ScenarioSpec:
    """A small scenario; sections given replace the default ones."""
    raw: dict[str, Any] = {
        "name": "small",
        "model": "olmoe",
        "cluster": "orin-2x-10gbe",
        "trace": {"kind": "uniform", "vision_tokens": 20, "text_tokens": 7, "output_tokens": 4},
        "workload": {"batch_sizes": [1, 3]},
    }
    return check_scenario({**raw, **changes})


def first(spec: ScenarioSpec) -> dict[str, Any]:
    return dict(simulate(spec).results["batch_sizes"][0])


@pytest.mark.parametrize(("benchmark", "method"), TABLE_S10)
def test_every_cell_of_table_s10_within_one_point(benchmark: str, method: str) -> None:
    overrides = ["simulation.fidelity=analytic", "workload.batch_sizes=[32]"]
    spec = load_scenario(SCENARIOS / "s10" / f"{benchmark}-{method}.yaml", overrides)
    ratios = first(spec)["transfer_ratio"]
    found = [100 * share for way in ("without_dedup", "with_dedup") for share in ratios[way].values()]
    assert np.abs(np.array(found) - TABLE_S10[benchmark, method]).max() < 1


def test_the_paper_s_reading_of_homes() -> None:
    # Prefill lives with the vision experts, decode with the text experts, which modality bins put on the second device.
    results = simulate(
        load_scenario(SCENARIOS / "s10" / "mmmu-gaussian-soft.yaml", ["workload.batch_sizes=[2]"])
    ).results
    assert results["homes"] == {"prefill": ["orin0"], "decode": ["orin1"]}


def test_contiguous_does_not_see_a_scattered_specialisation() -> None:
    # The halves of a SMoES trace are random in each layer, so half of any token's experts are remote: 50 % of pairs.
    path = SCENARIOS / "s10" / "mmmu-gaussian-soft.yaml"
    found = first(load_scenario(path, ["placement.policy=contiguous", "workload.batch_sizes=[8]"]))["transfer_ratio"]
    assert found["without_dedup"]["prefill_all"] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fidelity", ["event", "simpy", "analytic"])
def test_times_add_up(mode: str, fidelity: str) -> None:
    outcome = simulate(scenario(transmission={"mode": mode, "num_chunks": 2}, simulation={"fidelity": fidelity}))
    for size in outcome.results["batch_sizes"]:
        steps = outcome.steps[size["batch_size"]]
        assert [step.step for step in steps] == [0, 1, 2, 3]
        total_s = sum(step.duration_s + step.kv_exposed_s for step in steps)
        assert size["e2e_s"]["mean"] == pytest.approx(total_s, rel=1e-12)
        assert size["ttft_s"]["mean"] == pytest.approx(steps[0].duration_s, rel=1e-12)
        assert size["tpot_s"]["mean"] == pytest.approx((total_s - steps[0].duration_s) / 3, rel=1e-12)
        assert size["output_tokens_per_s"] == pytest.approx(4 * size["batch_size"] / total_s, rel=1e-12)
        for step in steps:
            parts_s_PR = np.stack(list(step.parts_s.values()))
            assert parts_s_PR.sum(axis=0) == pytest.approx(step.duration_s, rel=1e-12)
            assert (parts_s_PR > -1e-15).all()


def test_fidelities_agree_where_nothing_is_contended() -> None:
    outcomes = {}
    for fidelity in ("event", "simpy", "analytic"):
        outcomes[fidelity] = simulate(scenario(simulation={"fidelity": fidelity})).results["batch_sizes"]
    assert [size["prefill"]["contended_steps_frac"] for size in outcomes["event"]] == [0.0, 0.0]
    for fidelity in ("simpy", "analytic"):
        for size, exact in zip(outcomes[fidelity], outcomes["event"], strict=True):
            for metric in ("ttft_s", "tpot_s", "e2e_s"):
                assert size[metric] == pytest.approx(exact[metric], rel=1e-9)


def test_traffic_of_a_scenario_by_hand() -> None:
    # Balanced homes, batch 1: the request lives on device 0. Dispatch bytes per step are tokens with a remote expert x
    # 2048 x 2 bytes + remote pairs x 8 bytes, combine bytes the same tokens x 4096, over 16 layers.
    spec = scenario(workload={"batch_sizes": [1]})
    size = first(spec)
    shares = size["transfer_ratio"]
    visits, pairs = 27 * 16, 27 * 16 * 8
    remote_visits = round(shares["with_dedup"]["prefill_all"] * visits)
    remote_pairs = round(shares["without_dedup"]["prefill_all"] * pairs)
    links = size["prefill"]["links"]
    assert links["ethernet orin0->orin1"]["bytes_per_step"] == remote_visits * 4096 + remote_pairs * 8
    assert links["ethernet orin1->orin0"]["bytes_per_step"] == remote_visits * 4096


def test_fp8_halves_the_vectors_and_adds_scales() -> None:
    # 2048 values: 2048 bytes + 16 scales x 4 bytes = 2112 instead of 4096 bytes; results still bf16.
    plain = first(scenario(workload={"batch_sizes": [1]}))
    quantised = first(scenario(workload={"batch_sizes": [1]}, transmission={"dispatch_dtype": "fp8"}))
    remote_visits = round(plain["transfer_ratio"]["with_dedup"]["prefill_all"] * 27 * 16)
    saved = [
        plain["prefill"]["links"][name]["bytes_per_step"] - quantised["prefill"]["links"][name]["bytes_per_step"]
        for name in ("ethernet orin0->orin1", "ethernet orin1->orin0")
    ]
    assert saved == [remote_visits * (4096 - 2112), 0]


def test_kv_cache_moves_once_and_can_be_exposed() -> None:
    # OLMoE: 16 layers x 2 x 16 heads x 128 x 2 bytes = 131072 bytes per token; prompts of 27 tokens.
    homes = {"policy": "by_modality"}
    size = first(scenario(homes=homes, workload={"batch_sizes": [3]}))
    still = first(scenario(homes=homes, workload={"batch_sizes": [3], "max_output_tokens": 1}))
    sent = [sum(link["bytes_per_step"] for link in s["prefill"]["links"].values()) for s in (size, still)]
    assert sent[0] - sent[1] == 3 * 27 * 131072
    exposed = first(scenario(homes={**homes, "kv_transfer": "exposed"}, workload={"batch_sizes": [3]}))
    # 9.41 Gbit/s; 50 us of latency after the last segment.
    assert exposed["kv_exposed_s"] == pytest.approx(3 * 27 * 131072 / (9.41e9 / 8) + 50e-6, rel=1e-9)
    assert size["kv_exposed_s"] < exposed["kv_exposed_s"]


def test_faster_links_are_never_slower_in_sync() -> None:
    spec = scenario().model_dump(by_alias=True, mode="json")
    times = []
    for bandwidth in ("1 Gbit/s", "10 Gbit/s", "100 Gbit/s"):
        spec["cluster"]["links"][0]["bandwidth"] = bandwidth
        times.append(first(check_scenario(spec))["e2e_s"]["mean"])
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3


def test_async_loses_in_decode_where_experts_read_their_weights_twice() -> None:
    # Uniform routing, 8 tokens at home on each device: a kernel for 8 tokens reads 1 - (7/8)^8 = 65.6 % of a device's
    # experts, one for all 16 reads 1 - (7/8)^16 = 88.2 %. Two of the former take 2 x 0.656 / 0.882 = 1.49 times as
    # long.
    times = {}
    for mode in ("sync", "async"):
        size = simulate(scenario(transmission={"mode": mode}, workload={"batch_sizes": [16]})).results["batch_sizes"][0]
        times[mode] = size["tpot_s"]["mean"], size["decode"]["parts_s"]["experts"]
    assert times["async"][1] / times["sync"][1] == pytest.approx(1.49, rel=0.03)
    assert times["async"][0] > times["sync"][0]


def test_same_seed_same_bytes_and_other_seed_other_routing() -> None:
    trace = {"kind": "zipf", "vision_tokens": 20, "text_tokens": 7, "output_tokens": 4, "seed": 5}
    one, again = (to_json(simulate(scenario(trace=trace)).results) for _ in range(2))
    assert one == again
    assert to_json(simulate(scenario(trace={**trace, "seed": 6})).results) != one


def test_batches_take_consecutive_requests() -> None:
    outcome = simulate(scenario(workload={"batch_sizes": [2], "num_batches": 3}))
    (size,) = outcome.results["batch_sizes"]
    assert outcome.results["trace"]["num_requests"] == 6
    assert size["num_batches"] == 3
    assert [step.batch for step in outcome.steps[2]] == [0] * 4 + [1] * 4 + [2] * 4
    assert count_steps(scenario(workload={"batch_sizes": [2], "num_batches": 3})) == 12


def test_max_output_tokens_cuts_the_decode() -> None:
    spec = scenario(workload={"batch_sizes": [2], "max_output_tokens": 2})
    assert [step.phase for step in simulate(spec).steps[2]] == ["prefill", "decode"]
    assert count_steps(spec) == 2


def test_one_output_token_has_no_decode() -> None:
    size = first(scenario(workload={"batch_sizes": [2], "max_output_tokens": 1}))
    assert size["tpot_s"] is None
    assert size["itl_s"] is None
    assert size["decode"] is None


def test_too_little_memory_is_said_before_anything_is_simulated() -> None:
    raw = scenario().model_dump(by_alias=True, mode="json")
    raw["cluster"]["device_types"]["orin"]["memory"] = "9 GB"
    steps = []
    with pytest.raises(CapacityError, match=r"batch 1 does not fit on orin0: experts 6\.442 GB .* of 7\.2 GB usable"):
        simulate(check_scenario(raw), lambda: steps.append(1))
    assert steps == []


def test_too_few_requests() -> None:
    trace = {"kind": "uniform", "vision_tokens": 2, "text_tokens": 2, "output_tokens": 2, "requests": 2}
    with pytest.raises(TraceError, match="needs 3 requests"):
        simulate(scenario(trace=trace))


def test_micro_batches_share_the_work() -> None:
    # Device 0 has requests 0 and 2, device 1 request 1, of 5 vision and 2 text tokens. Cut in half, 7 + 7 and 3 + 4
    # tokens: request 0 | request 2, and request 1 cut after its third token. (Query, key) pairs: 28 | 28, and
    # 1 + 2 + 3 = 6 | 4 + 5 + 6 + 7 = 22, for which all 7 cached tokens are read. In decode 1 + 1 and 0 + 1 tokens.
    fields = {
        "trace": {"kind": "uniform", "vision_tokens": 5, "text_tokens": 2, "output_tokens": 2},
        "homes": {"policy": "balanced"}, "placement": {"policy": "contiguous"}, "workload": {"batch_sizes": [3]},
    }  # fmt: skip
    whole, halves = (
        list(step_inputs(assemble(scenario(transmission={"mode": mode}, **fields)), np.arange(3), None))
        for mode in ("sync", "two_batch")
    )
    first, second = halves[0].works
    assert (first.tokens_R.tolist(), second.tokens_R.tolist()) == ([7, 3], [7, 4])
    assert (first.requests_R.tolist(), second.requests_R.tolist()) == ([1, 1], [1, 1])
    assert (first.attention_pairs_R.tolist(), second.attention_pairs_R.tolist()) == ([28, 6], [28, 22])
    assert (first.kv_tokens_R.tolist(), second.kv_tokens_R.tolist()) == ([7, 3], [7, 7])
    assert (first.images_R.tolist(), second.images_R.tolist()) == ([2, 1], [0, 0])
    assert (first.outputs_R.tolist(), second.outputs_R.tolist()) == ([2, 1], [0, 0])
    assert [work.tokens_R.tolist() for work in halves[1].works] == [[1, 0], [1, 1]]
    for one, two in zip(whole, halves, strict=True):
        for name in ("tokens_R", "attention_pairs_R", "images_R", "outputs_R"):
            summed = sum(getattr(work, name) for work in two.works)
            assert summed.tolist() == getattr(one.works[0], name).tolist(), name


def test_every_token_of_a_batch_is_simulated() -> None:
    outcome = simulate(scenario(workload={"batch_sizes": [3]}))
    assert [step.num_tokens for step in outcome.steps[3]] == [81, 3, 3, 3]
    assert all(step.pairs_LR.sum() == step.num_tokens * 16 * 8 for step in outcome.steps[3])
    assert math.isfinite(outcome.results["batch_sizes"][0]["e2e_s"]["mean"])


def test_a_file_that_breaks_an_invariant_is_refused(tmp_path: Path) -> None:
    # The arrays are of the right shape and type, but token 3 of request 0 names an expert twice in layer 0.
    from epsim.trace import synthetic
    from epsim.trace.file import TraceWriter

    workload = synthetic.SyntheticWorkload(num_requests=1, num_vision_tokens=2, num_text_tokens=2, num_decode_tokens=1)
    (trace,) = synthetic.uniform(synthetic.OLMOE_SHAPE, workload, seed=0)
    trace.topk_expert_ids_TLK.setflags(write=True)
    trace.topk_expert_ids_TLK[3, 0, 1] = trace.topk_expert_ids_TLK[3, 0, 0]
    with TraceWriter(tmp_path / "bad.arrow", trace.meta) as writer:
        writer.write(trace)
    spec = scenario(trace=str(tmp_path / "bad.arrow"), workload={"batch_sizes": [1]})
    with pytest.raises(TraceError, match=r"bad\.arrow: .* must be 8 different ones"):
        simulate(spec)


def test_requests_of_different_lengths(tmp_path: Path) -> None:
    # Prompts of 5, 6, 7 tokens and 1, 4, 0 decode tokens, balanced on two devices: requests 0 and 2 live on device 0,
    # request 1 on device 1. Rows are shuffled and ids are not consecutive, as a capture may leave them.
    from epsim.trace import TraceMeta, synthetic
    from epsim.trace.file import TraceWriter

    shape = synthetic.OLMOE_SHAPE
    parts = []
    for i, (prompt, decode) in enumerate([(5, 1), (6, 4), (7, 0)]):
        workload = synthetic.SyntheticWorkload(
            num_requests=1, num_vision_tokens=0, num_text_tokens=prompt, num_decode_tokens=decode
        )
        (part,) = synthetic.uniform(shape, workload, seed=i)
        part.request_id_T.setflags(write=True)
        part.request_id_T[:] = 10 * i + 3
        parts.append(part)
    meta: TraceMeta = parts[0].meta
    trace = concatenate([dataclasses.replace(part, meta=meta) for part in parts])
    shuffled = trace.take(np.random.default_rng(0).permutation(trace.num_tokens))
    with TraceWriter(tmp_path / "mixed.arrow", meta) as writer:
        writer.write(shuffled)
    spec = scenario(trace=str(tmp_path / "mixed.arrow"), workload={"batch_sizes": [3]})

    prefill, *decode = (given.works[0] for given in step_inputs(assemble(spec), np.array([3, 13, 23]), None))
    assert prefill.tokens_R.tolist() == [12, 6]
    assert prefill.attention_pairs_R.tolist() == [15 + 28, 21]  # n (n + 1) / 2
    assert prefill.outputs_R.tolist() == [2, 1]
    # Step s attends to its prompt and s output tokens: request 0 to 6 at step 1 only, request 1 to 7, 8, 9, 10.
    assert [work.kv_tokens_R.tolist() for work in decode] == [[6, 7], [0, 8], [0, 9], [0, 10]]

    outcome = simulate(spec)
    steps = outcome.steps[3]
    assert [step.num_tokens for step in steps] == [18, 2, 1, 1, 1]
    ends_s = [step.start_s + step.duration_s for step in steps]
    (size,) = outcome.results["batch_sizes"]
    assert size["output_tokens_per_s"] == pytest.approx((2 + 5 + 1) / ends_s[4])
    # Two requests have a TPOT: one gap of the first, four of the second.
    tpots_s = [ends_s[1] - ends_s[0], (ends_s[4] - ends_s[0]) / 4]
    assert size["tpot_s"]["mean"] == pytest.approx(sum(tpots_s) / 2)
    assert size["e2e_s"]["mean"] == pytest.approx((ends_s[1] + ends_s[4] + ends_s[0]) / 3)


def test_vision_tokens_need_an_encoder() -> None:
    raw = scenario().model_dump(by_alias=True, mode="json")
    raw["model"]["vision"] = None
    with pytest.raises(TraceError, match="has vision tokens, model OLMoE-1B-7B-0125 no vision encoder"):
        simulate(check_scenario(raw))


def test_a_trace_file_that_changes_is_read_again(tmp_path: Path) -> None:
    from epsim.traces import write_trace

    path = tmp_path / "t.arrow"
    spec = scenario(trace=str(path), workload={"batch_sizes": [1]})
    ratios = []
    for exponent in (0.0, 3.0):
        trace = {"kind": "zipf", "exponent": exponent, "vision_tokens": 9, "text_tokens": 1, "output_tokens": 2}
        write_trace(scenario(trace=trace), path, compress=False)
        ratios.append(first(spec)["prefill"]["balancedness"]["ratio_of_sums"])
    assert ratios[0] != ratios[1]


def test_compute_dtype_chooses_the_rate() -> None:
    raw = scenario(cluster="h200-1x8", workload={"batch_sizes": [8]}).model_dump(by_alias=True, mode="json")
    plain = first(check_scenario(raw))["prefill"]["parts_s"]["vision"]
    raw["model"]["compute_dtype"] = "fp8"
    # H200: 1979 TFLOP/s in FP8, twice the BF16 rate, and the encoder is compute-bound.
    assert plain / first(check_scenario(raw))["prefill"]["parts_s"]["vision"] == pytest.approx(2, rel=1e-3)
    raw["model"]["compute_dtype"] = "int3"
    with pytest.raises(ScenarioError, match=r'model\.compute_dtype: "int3" has no rate on'):
        simulate(check_scenario(raw))
