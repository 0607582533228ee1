"""Kinds of parallelism: bytes, memory and times of each by hand, what they share, and what SMoES says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from epsim import traces
from epsim.compare import compare
from epsim.console import print_in_full
from epsim.errors import CapacityError, PlacementError, ScenarioError
from epsim.report.tables import simulation_tables
from epsim.run import assemble, check_memory, simulate
from epsim.scenario import check_scenario, load_scenario
from epsim.trace import TraceSource
from epsim.traces import open_trace, write_trace

SCENARIOS = Path(__file__).parent.parent / "scenarios"
SYNTHETIC_LENGTHS = {"text_tokens": 6, "output_tokens": 3}
KINDS: dict[str, dict[str, Any]] = {
    "ep": {"kind": "ep"},
    "tp": {"kind": "tp", "size": 2},
    "dp": {"kind": "dp"},
    "afd": {"kind": "afd", "attention_devices": 2},
    "pd": {"kind": "pd", "prefill_devices": 2},
}

# Hidden 4 (8 bytes a vector). Bytes: attention 2*4*2*(2+1)*2 = 96, expert 3*4*2*2 = 48, shared expert 48, dense FFN
# 3*4*4*2 = 96, router 4*4*2 = 32, head and embedding 8*4*2 = 64 each; KV 2*1*2*2 = 8 per token and layer.
MODEL: dict[str, Any] = {
    "name": "tiny",
    "hidden_size": 4,
    "num_layers": 3,
    "vocab_size": 8,
    "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 2},
    "dense_ffn_size": 4,
    "moe": {"num_experts": 4, "topk": 2, "expert_ffn_size": 2, "num_dense_layers": 1, "num_shared_experts": 1},
}
DENSE = {**{name: value for name, value in MODEL.items() if name != "moe"}, "name": "dense"}


def cluster(num_devices: int, **changes: str | float) -> dict[str, Any]:
    """A link of 240 B/s between every two devices; 1000 FLOP/s, and memory too fast to count."""
    kind = {"memory": "1 GB", "memory_bandwidth": "1 TB/s", "flops": {"bf16": "1000 FLOP/s"}, **changes}
    pairs = [(a, b) for a in range(num_devices) for b in range(a + 1, num_devices)]
    return {
        "name": "mesh",
        "device_types": {"t": kind},
        "devices": [{"name": f"d{r}", "type": "t", "node": "n"} for r in range(num_devices)],
        "links": [{"from": f"d{a}", "to": f"d{b}", "bandwidth": "240 B/s"} for a, b in pairs],
    }


def raw(kind: dict[str, Any], num_devices: int = 4, **changes: Any) -> dict[str, Any]:
    """Four requests of six prompt tokens and two decode tokens each; sections given replace the default ones."""
    default = {
        "name": "small",
        "model": MODEL,
        "cluster": cluster(num_devices),
        "trace": {"kind": "uniform", "vision_tokens": 0, **SYNTHETIC_LENGTHS},
        "parallelism": kind,
        "workload": {"batch_sizes": [4]},
    }
    return {**default, **changes}


def size_of(*args: Any, **changes: Any) -> dict[str, Any]:
    """Return the figures of the only batch size."""
    (size,) = simulate(check_scenario(raw(*args, **changes))).results["batch_sizes"]
    return dict(size)


def sent(size: dict[str, Any]) -> list[float]:
    return [size[phase]["sent_bytes_per_step"] for phase in ("prefill", "decode")]


# Memory by hand: (experts, other weights, KV cache, buffers) of each device.

WHOLE = 3 * 96 + 96 + 2 * (32 + 48) + 2 * 64  # 672: all but the routed experts
# Half: attention 2*4*2*(1+1)*2 = 64 (the key-value head is copied), dense FFN 48, shared 24, head and embedding 32.
HALF = 3 * 64 + 48 + 2 * (32 + 24) + 2 * 32  # 416
TOKEN = 3 * 8  # KV bytes of a token: the same under tp, where the only key-value head is copied
MEMORY = {
    # One of four experts in two layers; a request of 6 + 2 tokens; 6 tokens to min(2, 3) devices, 18 come.
    "ep": [(96, WHOLE, 8 * TOKEN, (12 + 18) * 8)] * 4,
    # Half of each expert; a group's two requests; half of its 12 tokens sent and half received.
    "tp": [(4 * 2 * 24, HALF, 16 * TOKEN, 12 * 8)] * 4,
    "dp": [(4 * 2 * 48, WHOLE, 8 * TOKEN, 0)] * 4,
    # 12 tokens of two requests to min(2, 2) devices; all 24 tokens come to an expert device.
    "afd": [(0, WHOLE, 16 * TOKEN, 24 * 8)] * 2 + [(2 * 2 * 48, 0, 0, 24 * 8)] * 2,
    # Two requests' prompts until they move; 12 tokens to the other prefill device, and its 12 come.
    "pd": [(2 * 2 * 48, WHOLE, 12 * TOKEN, 24 * 8)] * 2 + [(2 * 2 * 48, WHOLE, 16 * TOKEN, 0)] * 2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_by_hand(kind: str) -> None:
    accounts = size_of(KINDS[kind])["memory_bytes"]
    items = ("experts", "other_weights", "kv_cache", "buffers")
    assert [tuple(accounts[f"d{r}"][item] for item in items) for r in range(4)] == MEMORY[kind]


def test_pools_of_different_sizes_hold_different_numbers_of_experts() -> None:
    # One prefill device has all four experts, each of two decode devices two of them: 4 and 2 slots in 2 layers.
    accounts = size_of({"kind": "pd", "prefill_devices": 1}, 3)["memory_bytes"]
    assert [accounts[f"d{r}"]["experts"] for r in range(3)] == [8 * 48, 4 * 48, 4 * 48]


def test_a_prompt_without_a_decode_step_stays_where_it_was_prefilled() -> None:
    # Two prompts of 6 tokens on each prefill device, and nothing moves; one more output token and they do (see above).
    sizes = [size_of(KINDS["pd"], workload={"batch_sizes": [4], "max_output_tokens": n}) for n in (1, 2)]
    caches = [[size["memory_bytes"][f"d{r}"]["kv_cache"] for r in range(4)] for size in sizes]
    assert caches[0] == [12 * TOKEN, 12 * TOKEN, 0, 0]
    assert caches[1] == [12 * TOKEN, 12 * TOKEN, 14 * TOKEN, 14 * TOKEN]


def test_memory_that_does_not_suffice_is_refused() -> None:
    # dp needs 384 + 672 + 192 = 1248 bytes, tp 192 + 416 + 384 + 96 = 1088.
    changes = {"cluster": cluster(4, memory="1.2 kB")}
    assert size_of(KINDS["tp"], **changes)["memory_bytes"]["d3"]["total"] == 1088
    spec = check_scenario(raw(KINDS["dp"], **changes))
    with pytest.raises(CapacityError, match=r"batch 4 does not fit on d0: .* = 1\.248 kB of 1\.2 kB usable"):
        check_memory(assemble(spec), spec, 4)


# Bytes by hand, for (prefill, decode step).


def test_bytes_of_tensor_parallelism_by_hand() -> None:
    # Two all-reduces in each of 3 layers, each a reduce-scatter and an all-gather: 12 exchanges. In each, a device
    # sends the other one half of its group's tokens: 12 / 2 * 8 = 48 bytes in the prefill, 2 / 2 * 8 in a decode step.
    # 4 devices * 12 * 48 = 2304 and 4 * 12 * 8 = 384; as a ring all-reduce, 2 (N - 1) / N of 96 bytes.
    size = size_of(KINDS["tp"])
    assert sent(size) == [2304, 384]
    assert size["prefill"]["links"]["d0->d1"]["bytes_per_step"] == 12 * 48
    assert size["prefill"]["links"]["d1->d2"]["bytes_per_step"] == 0  # another group
    # All four as one group (4 query heads): each sends 24 / 4 * 8 = 48 bytes to 3 others, 12 times.
    heads = {**MODEL, "attention": {"kind": "mha", "num_heads": 4, "head_dim": 2}}
    heads["moe"] = {**heads["moe"], "expert_ffn_size": 4}
    assert sent(size_of({"kind": "tp"}, model=heads)) == [4 * 3 * 12 * 48, 4 * 3 * 12 * 8]


def test_data_parallelism_sends_nothing() -> None:
    size = size_of(KINDS["dp"])
    assert sent(size) == [0, 0]
    assert size["sent_bytes_per_output_token"] == 0


def test_attention_apart_from_experts_moves_every_token() -> None:
    # Without dedup every token of 24 (4) sends 2 vectors of 8 bytes with an id and a weight (8 bytes) in each of 2 MoE
    # layers, and 2 vectors come back: 24 * 2 * 2 * (16 + 8).
    transmission = {"dedup": "none"}
    size = size_of(KINDS["afd"], transmission=transmission)
    assert sent(size) == [2304, 384]
    ratios = size["transfer_ratio"]["with_dedup"]
    assert (ratios["prefill_text"], ratios["decode_text"]) == (1.0, 1.0)
    # Nothing between the attention devices, nor between the expert devices.
    links = size["prefill"]["links"]
    assert links["d0->d1"]["bytes_per_step"] == links["d2->d3"]["bytes_per_step"] == 0
    # Expert parallelism sends what is not at home.
    spread = size_of(KINDS["ep"], transmission=transmission)
    remote = spread["transfer_ratio"]["without_dedup"]["prefill_text"]
    assert sent(spread)[0] == pytest.approx(2304 * remote)


def test_prefill_apart_from_decode_moves_kv_caches_and_stays_in_its_pools() -> None:
    # 24 prompt tokens in 3 layers; request 0 from d0 to d2, 1 from d1 to d3, and so on.
    size, still = (size_of(KINDS["pd"], workload={"batch_sizes": [4], "max_output_tokens": n}) for n in (None, 1))
    assert sent(size)[0] - still["prefill"]["sent_bytes_per_step"] == 24 * TOKEN
    prefill, decode = size["prefill"]["links"], size["decode"]["links"]
    assert prefill["d0->d2"]["bytes_per_step"] == prefill["d1->d3"]["bytes_per_step"] == 12 * TOKEN
    assert [name for name in prefill if prefill[name]["bytes_per_step"]] == ["d0->d1", "d1->d0", "d0->d2", "d1->d3"]
    assert {name for name in decode if decode[name]["bytes_per_step"]} <= {"d2->d3", "d3->d2"}
    # A prefill device has half of the experts: its pool of two is the whole of expert parallelism on two devices.
    pair = size_of(KINDS["ep"], 2, workload={"batch_sizes": [4], "max_output_tokens": 1})
    assert pair["prefill"]["sent_bytes_per_step"] == still["prefill"]["sent_bytes_per_step"]
    assert pair["ttft_s"] == still["ttft_s"]


# Times.


def test_tensor_parallel_prefill_by_hand() -> None:
    # Dense, one request, two devices of 1000 FLOP/s. Half of a layer: attention 32 parameters, 64 FLOPs on 6 tokens,
    # and 21 pairs of 2 * 1 * 2 * 2 = 8: 552; FFN 24 parameters: 6 * 48 = 288. Head 4 * 4 * 2 = 32. In all 3 * 840 + 32.
    # Each of 12 exchanges: 3 tokens of 8 bytes at 240 B/s, 0.1 s.
    size = size_of({"kind": "tp"}, 2, model=DENSE, workload={"batch_sizes": [1]})
    assert size["ttft_s"]["mean"] == pytest.approx(2.552 + 1.2)
    parts = {name: s for name, s in size["prefill"]["parts_s"].items() if s > 0}
    expected = {"attention": 3 * 0.552, "dense_ffn": 3 * 0.288, "head": 0.032, "dispatch": 0.6, "combine": 0.6}
    assert parts == {name: pytest.approx(s) for name, s in expected.items()}


def test_host_and_barriers_of_tensor_parallelism_by_hand() -> None:
    # As above. A barrier slowdown of 0.5 stretches what is computed by half. A host that needs 10 s for a layer, 5 s
    # for its attention and 5 s for its FFN, hides all but the head.
    def ttft_s(**changes: Any) -> float:
        machine = cluster(2, **changes)
        size = size_of({"kind": "tp"}, 2, model=DENSE, cluster=machine, workload={"batch_sizes": [1]})
        return float(size["ttft_s"]["mean"])

    assert ttft_s(barrier_slowdown=0.5) == pytest.approx(1.5 * 2.552 + 1.2)
    assert ttft_s(layer_overhead="10 s") == pytest.approx(3 * 10 + 0.032)


def test_experts_of_a_replica_are_computed_at_home() -> None:
    # One token's decode step on one device: 2 routed experts of 48 FLOPs, a shared one of 48, in 2 layers.
    size = size_of({"kind": "dp"}, 1, workload={"batch_sizes": [1]})
    assert size["decode"]["parts_s"]["experts"] == pytest.approx(2 * (2 * 48 + 48) / 1000)
    # Half of it for each of two, and both serve both pairs: even.
    halves = size_of({"kind": "tp"}, 2, workload={"batch_sizes": [1]})
    assert halves["decode"]["parts_s"]["experts"] == pytest.approx((2 * 48 + 48) / 1000)
    assert halves["decode"]["balancedness"] == {"ratio_of_sums": 1.0, "mean_of_ratios": 1.0}


@pytest.mark.parametrize(("kind", "model"), [*((kind, "tiny") for kind in KINDS), ("tp", "dense"), ("dp", "dense")])
def test_engines_agree_where_nothing_waits(kind: str, model: str) -> None:
    sizes = {
        fidelity: size_of(KINDS[kind], model={"tiny": MODEL, "dense": DENSE}[model], simulation={"fidelity": fidelity})
        for fidelity in ("event", "simpy", "analytic")
    }
    exact = sizes["event"]
    assert exact["prefill"]["contended_steps_frac"] == 0
    for other in (sizes["simpy"], sizes["analytic"]):
        for metric in ("ttft_s", "tpot_s", "e2e_s"):
            assert other[metric]["mean"] == pytest.approx(exact[metric]["mean"], rel=1e-9)
        for phase in ("prefill", "decode"):
            assert other[phase]["sent_bytes_per_step"] == pytest.approx(exact[phase]["sent_bytes_per_step"], rel=1e-9)
            assert other[phase]["parts_s"] == pytest.approx(exact[phase]["parts_s"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mode", ["sync", "async", "two_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_on_the_links_are_the_bytes_sent(kind: str, mode: str) -> None:
    transmission = {"mode": mode} if kind not in ("tp", "dp") else {}
    outcome = simulate(check_scenario(raw(KINDS[kind], transmission=transmission)))
    for step in outcome.steps[4]:
        assert step.link_bytes_X.sum() == pytest.approx(step.sent_bytes)  # every pair has a link of its own
        parts_s_PR = np.stack(list(step.parts_s.values()))
        assert_allclose(parts_s_PR.sum(axis=0), step.duration_s, rtol=1e-12)


EVEN = 1.0
BALANCEDNESS = {
    # Every token chooses all four experts: each device that can serve the request serves as many pairs as any other.
    "ep": (EVEN, EVEN),
    "tp": (EVEN, 0.5),  # one request in decode: its group of two is busy, the other is not
    "dp": (EVEN, 0.25),
    "afd": (EVEN, EVEN),
    "pd": (EVEN, EVEN),
}


@pytest.mark.parametrize("kind", KINDS)
def test_balancedness_is_over_the_devices_that_can_serve(kind: str) -> None:
    model = {**MODEL, "moe": {**MODEL["moe"], "topk": 4}}
    found = []
    for batch, phase in ((4, "prefill"), (1, "decode")):
        ratios = size_of(KINDS[kind], model=model, workload={"batch_sizes": [batch]})[phase]["balancedness"]
        assert ratios["ratio_of_sums"] == ratios["mean_of_ratios"]
        found.append(ratios["ratio_of_sums"])
    assert tuple(found) == BALANCEDNESS[kind]


def test_devices_without_experts_do_not_count_where_loads_differ() -> None:
    # Experts 0, 1 on d2 and 2, 3 on d3. One token a step chooses one expert: all of a layer is on one of the two.
    model = {**MODEL, "moe": {**MODEL["moe"], "topk": 1}}
    size = size_of(KINDS["afd"], model=model, workload={"batch_sizes": [1]})
    assert size["decode"]["balancedness"] == {"ratio_of_sums": 0.5, "mean_of_ratios": 0.5}


def test_replicas_of_equal_requests_take_the_time_of_one() -> None:
    # Every token chooses all four experts, so that requests differ in nothing.
    model = {**MODEL, "moe": {**MODEL["moe"], "topk": 4}}
    together, alone = size_of(KINDS["dp"], model=model), size_of(
        KINDS["dp"], 1, model=model, workload={"batch_sizes": [1]}
    )  # fmt: skip
    for metric in ("ttft_s", "tpot_s", "e2e_s"):
        assert together[metric] == alone[metric]
    assert together["output_tokens_per_s"] == pytest.approx(4 * alone["output_tokens_per_s"])
    # One device is one device: expert parallelism has nobody to send to.
    slow = {"layer_overhead": "1.1 s", "request_overhead": "50 ms", "launch_overhead": "20 ms"}
    for changes in ({}, slow):
        one = {"model": model, "cluster": cluster(1, **changes), "workload": {"batch_sizes": [1]}}
        ep, dp = (size_of(KINDS[kind], 1, **one) for kind in ("ep", "dp"))
        for metric in ("ttft_s", "tpot_s", "e2e_s"):
            assert ep[metric] == pytest.approx(dp[metric])


def test_groups_of_one_are_data_parallel() -> None:
    assert size_of({"kind": "tp", "size": 1}) == size_of({"kind": "dp"})


def test_a_group_does_not_depend_on_the_number_of_groups() -> None:
    # Requests 0 and 2 in the first group, 1 and 3 in the second, or one group alone with a batch of two: with all
    # experts chosen the groups are alike, and the barriers that they share cost nothing.
    model = {**MODEL, "moe": {**MODEL["moe"], "topk": 4}}
    both = size_of(KINDS["tp"], model=model)
    alone = size_of({"kind": "tp"}, 2, model=model, workload={"batch_sizes": [2]})
    assert both["e2e_s"]["mean"] == pytest.approx(alone["e2e_s"]["mean"])


# Dense models.


def test_a_dense_model_takes_the_lengths_of_any_trace(tmp_path: Path) -> None:
    drawn = size_of(KINDS["tp"], model=DENSE)
    moe = check_scenario(raw(KINDS["ep"]))
    write_trace(moe, tmp_path / "moe.trace", compress=False)
    assert size_of(KINDS["tp"], model=DENSE, trace=str(tmp_path / "moe.trace"))["e2e_s"] == drawn["e2e_s"]
    write_trace(check_scenario(raw(KINDS["tp"], model=DENSE)), tmp_path / "dense.trace", compress=False)
    assert size_of(KINDS["tp"], model=DENSE, trace=str(tmp_path / "dense.trace"))["e2e_s"] == drawn["e2e_s"]


def test_a_dense_model_has_no_experts_in_memory_or_time() -> None:
    size = size_of(KINDS["dp"], model=DENSE)
    # Attention and FFN in three layers, head and embedding.
    items = ("experts", "other_weights", "kv_cache", "buffers")
    assert [size["memory_bytes"]["d0"][item] for item in items] == [0, 3 * (96 + 96) + 128, 8 * TOKEN, 0]
    assert size["prefill"]["parts_s"]["experts"] == size["prefill"]["parts_s"]["router"] == 0


@pytest.mark.parametrize("kind", ["tp", "dp"])
def test_a_dense_model_routes_nothing(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = simulate(check_scenario(raw(KINDS[kind], model=DENSE)))
    (size,) = outcome.results["batch_sizes"]
    assert {share for shares in size["transfer_ratio"].values() for share in shares.values()} == {None}
    assert size["prefill"]["balancedness"] is size["decode"]["balancedness"] is None
    assert not any(step.pairs_LR.any() for step in outcome.steps[4])
    print_in_full(simulation_tables(outcome.results))
    latency, ratios = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" 4 ")][:2]
    assert latency[-2:] == ["-", "-"]
    assert ratios == ["4", *"--------"]


@pytest.mark.parametrize("kind", ["ep", "afd", "pd"])
def test_a_dense_model_has_no_experts_to_spread(kind: str) -> None:
    message = (
        r"model: dense has no MoE layers; write a model with experts, e\.g\. olmoe, or parallelism\.kind: tp or dp"
    )
    with pytest.raises(ScenarioError, match=message):
        size_of(KINDS[kind], model=DENSE)


# Sizes of tensor parallelism.


@pytest.mark.parametrize(
    ("size", "num_devices", "message"),
    [
        # 2 heads, 1 key-value head, experts of 2: the model splits by 1 and 2, six devices by 1, 2, 3 and 6.
        (3, 6, "3 does not split attention.num_heads 2 of tiny; write one of 1, 2"),
        (None, 6, "6 does not split attention.num_heads 2 of tiny; write one of 1, 2"),
        (4, 6, "4 does not divide 6 devices; write one of 1, 2"),
        (2, 3, "2 does not divide 3 devices; write 1"),
    ],
)
def test_sizes_to_write_divide_devices_and_model(size: int | None, num_devices: int, message: str) -> None:
    model = {**MODEL, "vocab_size": 12, "dense_ffn_size": 12}
    with pytest.raises(ScenarioError) as error:
        size_of({"kind": "tp", "size": size}, num_devices, model=model)
    assert str(error.value) == f"parallelism.size: {message}"
    for fit in message.rpartition("of " if "one of" in message else "write ")[2].split(", "):
        assert size_of({"kind": "tp", "size": int(fit)}, num_devices, model=model)


# Scenarios, comparisons and tables.


def parallelism_after(*overrides: str) -> dict[str, Any]:
    spec = load_scenario(SCENARIOS / "orin-2x-olmoe.yaml", overrides)
    return spec.parallelism.model_dump()


def test_another_kind_starts_afresh() -> None:
    assert parallelism_after() == {"kind": "ep"}
    assert parallelism_after("parallelism.kind=tp", "parallelism.size=2") == {"kind": "tp", "size": 2}
    assert parallelism_after("parallelism={kind: tp, size: 2}", "parallelism.kind=dp") == {"kind": "dp"}


@pytest.mark.parametrize(
    ("kind", "text", "prefill", "decode"),
    [
        ({"kind": "tp", "size": 2}, "tp, 2 groups of 2", "0123", "0123"),
        ({"kind": "dp"}, "dp, 4 replicas", "0123", "0123"),
        ({"kind": "afd"}, "afd, attention on 2, experts on 2", "01", "01"),  # half of the devices
        ({"kind": "pd"}, "pd, prefill on 2, decode on 2", "01", "23"),
        ({"kind": "pd", "prefill_devices": 3}, "pd, prefill on 3, decode on 1", "012", "3"),
    ],
)
def test_results_say_who_does_what(kind: dict[str, Any], text: str, prefill: str, decode: str) -> None:
    model = {**MODEL, "moe": {**MODEL["moe"], "num_experts": 6}}
    results = simulate(check_scenario(raw(kind, model=model))).results
    assert results["parallelism"] == text
    assert results["homes"] == {"prefill": [f"d{r}" for r in prefill], "decode": [f"d{r}" for r in decode]}


def test_a_comparison_has_bytes_and_memory() -> None:
    rows = compare(raw({"kind": "ep"}), {"parallelism": [KINDS["tp"], KINDS["dp"]]}, {"parallelism": KINDS["tp"]})
    tp, dp = sorted(rows, key=lambda row: str(row["parallelism"]), reverse=True)
    # 2304 bytes in the prefill and 384 in each of 2 decode steps, for 4 requests of 3 tokens; memory as above.
    assert [tp[f"{phase}_sent_bytes_per_step"] for phase in ("prefill", "decode")] == [2304, 384]
    assert tp["sent_bytes_per_output_token"] == (2304 + 2 * 384) / 12
    assert (tp["fullest_device_memory_bytes"], tp["all_devices_memory_bytes"]) == (1088, 4 * 1088)
    assert (dp["fullest_device_memory_bytes"], dp["all_devices_memory_bytes"]) == (1248, 4 * 1248)


@pytest.mark.parametrize(
    ("kinds", "changes", "error", "message"),
    [
        (
            "ep tp",
            {"transmission": {"dedup": "none"}},
            ScenarioError,
            r'transmission\.dedup: "none" has no meaning under',
        ),
        # At 8 requests twice the KV caches and buffers of above: 1440 bytes under dp, 1568 under tp.
        (
            "dp tp",
            {"cluster": cluster(4, memory="1.5 kB")},
            CapacityError,
            r"batch 8 does not fit on d0: .* = 1\.568 kB",
        ),
        # Four experts on four devices, then on the three that afd leaves by attention_devices: 1.
        ("ep afd", {}, PlacementError, "4 experts do not divide over 3 devices"),
    ],
)
def test_a_comparison_looks_at_all_kinds_before_it_simulates_one(
    kinds: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    steps: list[int] = []
    values = [{"kind": "afd", "attention_devices": 1} if kind == "afd" else KINDS[kind] for kind in kinds.split()]
    given = raw(values[0], workload={"batch_sizes": [4, 8]}, **changes)
    with pytest.raises(error, match=message):
        compare(given, {"parallelism": values}, {"parallelism": values[0]}, lambda: steps.append(1))
    assert steps == []
    compare(given, {"parallelism": values[:1]}, {"parallelism": values[0]}, lambda: steps.append(1))
    assert (
        len(steps) == 2 * 3
    )  # the first kind alone is not refused: a prefill and two decode steps for each batch size


def test_traces_of_a_comparison_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(*args: Any) -> TraceSource:
        drawn.append(1)
        return open_trace(*args)

    monkeypatch.setattr(traces, "open_trace", counted)
    monkeypatch.setattr(traces, "_kept", {})
    axes: dict[str, list[Any]] = {"trace.seed": [1, 2, 3], "transmission.dedup": ["none", "device"]}
    compare(raw({"kind": "ep"}), axes, {"trace.seed": 1, "transmission.dedup": "none"})
    assert len(drawn) == 3
    # With two in memory at most, the first is gone when it is simulated, and so on: each is drawn again.
    drawn.clear()
    monkeypatch.setattr(traces, "MAX_IDS_KEPT", 0)
    monkeypatch.setattr(traces, "_kept", {})
    compare(raw({"kind": "ep"}), axes, {"trace.seed": 1, "transmission.dedup": "none"})
    assert len(drawn) == 6


@pytest.mark.parametrize("kind", ["afd", "pd"])
def test_one_device_cannot_be_split(kind: str) -> None:
    with pytest.raises(ScenarioError, match=rf'"{kind}" needs 2 devices, the cluster has 1; write ep, tp or dp'):
        size_of({"kind": kind}, 1)


# What SMoES says of expert parallelism (supplement 2.4), on its cluster and model.

GB = 1e9


def two_orins(*overrides: str) -> dict[str, Any]:
    path = SCENARIOS / "orin-2x-parallelism.yaml"
    settings = ("workload.batch_sizes=[32]", "simulation.fidelity=analytic", *overrides)
    (size,) = simulate(load_scenario(path, settings)).results["batch_sizes"]
    return dict(size)


def total(size: dict[str, Any], item: str) -> float:
    """Bytes of one item on all devices together."""
    return float(sum(account[item] for account in size["memory_bytes"].values()))


def test_which_kind_holds_what_more_than_once() -> None:
    # OLMoE: 64 experts x 16 layers x 3 x 2048 x 1024 x 2 bytes = 12.885 GB; attention 16 x 4 x 2048^2 x 2 = 537 MB,
    # head and embedding 2 x 50304 x 2048 x 2 = 412 MB, routers 4 MB, vision encoder and projector the rest of 1.572 GB.
    sizes = {kind: two_orins(f"parallelism.kind={kind}") for kind in KINDS}
    experts, rest = 64 * 16 * 3 * 2048 * 1024 * 2, 1.572 * GB
    copies = {"ep": 1, "tp": 1, "dp": 2, "afd": 1, "pd": 2}
    assert {kind: total(size, "experts") for kind, size in sizes.items()} == {k: n * experts for k, n in copies.items()}
    # "No redundancy in weights" holds of the experts alone: every home has the rest. TP halves it, but for the routers
    # and the vision encoder (0.623 GB in all); only AFD on one attention device has it once.
    copied = rest - (16 * 4 * 2048**2 * 2 + 2 * 50304 * 2048 * 2)
    others = {"ep": 2 * rest, "tp": rest + copied, "dp": 2 * rest, "afd": rest, "pd": 2 * rest}
    assert {k: total(size, "other_weights") for k, size in sizes.items()} == pytest.approx(others, rel=1e-3)
    # KV: 32 requests of 715 prompt and 15 decode tokens, 16 layers x 8192 bytes; nowhere twice but in PD, where prompts
    # are on both sides while they move.
    once = 32 * (715 + 15) * 16 * 8192
    caches = {"ep": once, "tp": once, "dp": once, "afd": once, "pd": once + 32 * 715 * 16 * 8192}
    assert {kind: total(size, "kv_cache") for kind, size in sizes.items()} == caches


def test_expert_parallelism_sends_fewer_tokens_than_attention_apart() -> None:
    def prefill_bytes(*overrides: str) -> float:
        return float(two_orins(*overrides)["prefill"]["sent_bytes_per_step"])

    baseline = [prefill_bytes(f"parallelism.kind={kind}") for kind in ("ep", "afd")]
    # Routing without specialisation: 8 of 64 experts over two devices leave 98 % of the tokens with a remote expert.
    assert 0.95 < baseline[0] / baseline[1] < 1
    specialised = ["trace.method=gaussian-soft", "placement.policy=modality_bins"]
    assert prefill_bytes(*specialised, "parallelism.kind=afd") == pytest.approx(baseline[1])
    balanced = prefill_bytes(*specialised)
    assert balanced < 0.65 * baseline[1]
    # With homes by modality fewer tokens still, but KV caches move, and these are more bytes than the tokens saved.
    by_modality = prefill_bytes(*specialised, "homes.policy=by_modality")
    tokens_alone = prefill_bytes(*specialised, "homes.policy=by_modality", "workload.max_output_tokens=1")
    assert tokens_alone < 0.35 * baseline[1]
    assert by_modality > baseline[1]


def test_expert_parallelism_fills_both_devices_alike() -> None:
    totals = {
        kind: [account["total"] for account in two_orins(f"parallelism.kind={kind}")["memory_bytes"].values()]
        for kind in ("ep", "afd")
    }
    assert totals["ep"][0] == pytest.approx(totals["ep"][1], rel=1e-3)
    assert totals["afd"][1] > 2.5 * totals["afd"][0]
