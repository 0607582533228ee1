"""Dense against MoE: the tables of the page are what its script computes, and what the page says of them holds."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from epsim.run import assemble

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "dense_vs_moe.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dense_vs_moe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


script = _load_script()
EXPERT = 3 * 2048 * 1024 * 2  # bytes of an expert of OLMoE: gate, up and down


def table_of_page(key: str) -> dict[str, list[str]]:
    """Return the cells of each row of a table, by the row's first cell."""
    text = script.PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- table: {key} -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row[0]: row[1:] for row in rows}


def quickly(machine: Any, *batches: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Return what every row of a machine gives in the closed form."""
    return {row.name: script.run(machine, row, batches, "simulation.fidelity=analytic") for row in machine.rows}


@pytest.fixture(scope="module")
def orin() -> dict[str, dict[int, dict[str, Any]]]:
    return quickly(script.ORIN, 1, 4, 32)


@pytest.fixture(scope="module")
def h100() -> dict[str, dict[int, dict[str, Any]]]:
    return quickly(script.H100, 32)


def test_doctests() -> None:
    assert doctest.testmod(script).failed == 0


@pytest.mark.parametrize(
    ("machine", "layouts"), [(script.ORIN, None), (script.H100, ("ep", "dp"))], ids=["orin", "h100"]
)
def test_the_page_shows_what_is_computed_at_batch_1(machine: Any, layouts: tuple[str, ...] | None) -> None:
    rates, times = (table_of_page(f"{machine.key}-{name}") for name in ("throughput", "times"))
    assert list(rates)[2:] == list(times)[2:] == [row.name for row in machine.rows]
    for row in machine.rows:
        if layouts is None or row.layout in layouts:
            size = script.run(machine, row, (1,))[1]
            assert rates[row.name][0] == script.rate(size["output_tokens_per_s"])
            shown = [script.duration(size[metric]["mean"]) for metric in ("ttft_s", "tpot_s")]
            assert [times[row.name][0], times[row.name][3]] == shown


@pytest.mark.parametrize("machine", [script.ORIN, script.H100], ids=["orin", "h100"])
def test_ratios_of_the_page_are_those_of_its_rates(machine: Any) -> None:
    rates = {
        name: [float(cell) for cell in cells]
        for name, cells in list(table_of_page(f"{machine.key}-throughput").items())[2:]
    }
    ratios = table_of_page(f"{machine.key}-ratios")
    moe = machine.rows[0].model

    def fastest(model: str) -> np.ndarray:
        return np.max([rates[row.name] for row in machine.rows if row.model == model], axis=0)

    for dense in machine.dense:
        own = {machine.rows[0].name: np.array(rates[machine.rows[0].name]), f"{moe}, fastest": fastest(moe)}
        for name, values in own.items():
            shown = [float(cell) for cell in ratios[f"{name} / {dense}, fastest"]]
            np.testing.assert_allclose(shown, values / fastest(dense), rtol=0.01, atol=0.005)


def test_weights_of_a_decode_step_by_hand() -> None:
    # OLMoE, 16 layers: attention 4 * 2048^2 * 2 = 33.55 MB, router 2048 * 64 * 2 = 0.262 MB; head 2048 * 50304 * 2 =
    # 206.0 MB. 541.1 + 206.0 = 747.1 MB. A token adds 16 * 8 experts of 12.58 MB: 2.358 GB. OLMo-1B has no router, and
    # an FFN as wide as 8 experts: 4.2 MB less.
    moe, dense = (script.card_of(script.ORIN, row) for row in (script.ORIN_ROWS[0], script.ORIN_ROWS[-1]))
    assert script.fixed_bytes(moe) == 16 * (4 * 2048**2 * 2 + 2048 * 64 * 2) + 2048 * 50304 * 2
    assert script.fixed_bytes(moe) + 16 * 8 * EXPERT - script.fixed_bytes(dense) == 16 * 2048 * 64 * 2
    cells = table_of_page("weights")
    assert cells["olmoe, baseline: read"][0] == "2.36 GB"
    assert cells["olmo-1b: read"] == ["2.35 GB"] * 6


def test_activated_experts_are_the_distinct_ones_of_a_step() -> None:
    spec = script.scenario(script.ORIN, script.ORIN_ROWS[2], script.BATCHES)
    assert script.activated_experts(spec, 1) == 8
    trace = assemble(spec).trace
    rows = trace.select(trace.requests.request_id_Q[:4])
    counts = [
        len(np.unique(rows.topk_expert_ids_TLK[rows.step_T == step, layer]))
        for step in range(1, 32)
        for layer in range(16)
    ]
    found = script.activated_experts(spec, 4)
    assert found == pytest.approx(np.mean(counts))
    assert table_of_page("weights")["olmoe, baseline: experts of 64"][2] == f"{found:.1f}"


def test_uniform_routing_activates_what_the_formula_of_the_page_says() -> None:
    # 64 * (1 - (7 / 8)^32) = 63.1; 31 steps * 16 layers are enough for a hundredth.
    row = script.ORIN_ROWS[2]
    spec = script.scenario(script.ORIN, row, (32,), "trace={kind: uniform, text_tokens: 1, vision_tokens: 0}")
    assert script.activated_experts(spec, 32) == pytest.approx(64 * (1 - (7 / 8) ** 32), rel=0.01)


def test_the_mixture_beats_equal_total_parameters_in_every_layout(orin: Any, h100: Any) -> None:
    for machine, by_row in ((script.ORIN, orin), (script.H100, h100)):
        names = [row.name for row in machine.rows if row.model == machine.rows[0].model]
        for size, dense in script.fastest(machine, by_row, machine.dense[0]).items():
            rates = [by_row[name][size]["output_tokens_per_s"] for name in names]
            assert min(rates) > dense
            assert max(rates) > 2.5 * dense


def test_the_mixture_starts_near_its_active_size_and_falls_back(orin: Any, h100: Any) -> None:
    def share(machine: Any, by_row: Any, size: int) -> float:
        own, dense = (
            script.fastest(machine, by_row, model)[size] for model in (machine.rows[0].model, machine.dense[1])
        )
        return float(own / dense)

    assert 0.9 < share(script.ORIN, orin, 1) < 1
    assert 0.4 < share(script.ORIN, orin, 32) < 0.6
    assert 0.4 < share(script.H100, h100, 32) < 0.6


@pytest.mark.parametrize("kind", ["tp", "dp"])
def test_decode_and_prefill_of_olmoe_beside_equal_active_parameters(orin: Any, kind: str) -> None:
    moe, dense = orin[f"olmoe, {kind}"], orin[f"olmo-1b, {kind}"]

    def ratio(metric: str, size: int) -> float:
        return float(moe[size][metric]["mean"] / dense[size][metric]["mean"])

    assert 1 < ratio("tpot_s", 1) < 1.003  # 2.358 against 2.354 GB of weights
    assert ratio("tpot_s", 32) > 2
    assert ratio("ttft_s", 1) > 1.1  # one prompt has all experts read
    assert ratio("ttft_s", 4) == pytest.approx(1, abs=0.01)


def test_decode_of_a_lone_request_follows_the_weights_that_it_reads(orin: Any) -> None:
    # Under dp a decode step is bound by memory, 204.8 GB/s * 0.8: weights of 2.358, 13.21 and 2.354 GB, and the KV
    # caches of 716 to 746 tokens of 131 and 524 kB.
    for model, weights_gb, kv_mb in (
        ("olmoe", 2.358, 0.131),
        ("llava-1.5-7b", 13.21, 0.524),
        ("olmo-1b", 2.354, 0.131),
    ):
        expected_s = (weights_gb + 731 * kv_mb / 1000) / (204.8 * 0.8)
        assert orin[f"{model}, dp"][1]["tpot_s"]["mean"] == pytest.approx(expected_s, rel=0.003)


def test_smoes_beats_its_baseline_but_not_tokens_at_home_on_both(orin: Any) -> None:
    smoes, baseline, both = (
        orin[f"olmoe, ep, {name}"] for name in ("SMoES", "baseline of SMoES", "tokens at home on both")
    )
    for size in (1, 4, 32):
        assert smoes[size]["output_tokens_per_s"] > 1.1 * baseline[size]["output_tokens_per_s"]
    assert smoes[1]["output_tokens_per_s"] > both[1]["output_tokens_per_s"]
    assert smoes[32]["output_tokens_per_s"] < both[32]["output_tokens_per_s"]


def test_expert_parallelism_is_not_the_fastest_layout_but_takes_less_memory_than_dp(orin: Any, h100: Any) -> None:
    for machine, by_row in ((script.ORIN, orin), (script.H100, h100)):
        model = machine.rows[0].model
        names = [row.name for row in machine.rows if row.model == model and row.layout.startswith("ep")]
        for size, rate in script.fastest(machine, by_row, model).items():
            assert max(by_row[name][size]["output_tokens_per_s"] for name in names) < rate
            memory = {
                name: sum(a["total"] for a in sizes[size]["memory_bytes"].values()) for name, sizes in by_row.items()
            }
            assert max(memory[name] for name in names) < memory[f"{model}, dp"]
