"""Dense against MoE: what the page says is what its script computes, as far as a quick test can tell.

The data-sheet Orins are run as the script runs them. Of the H100s dp is (there the closed form is exact), and ep at
batch 1; their other cells are held to each other alone. Not looked at: the tables of the fitted Orins and what is said
of them, the weights of Qwen3, and sentences that no test here quotes.
"""

import doctest
import importlib.util
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


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Return the cells of each row of a table, by the row's first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def table_of_page(key: str) -> dict[str, list[str]]:
    (block,) = script.place_of(key).findall(script.PAGE.read_text(encoding="utf-8"))
    return cells(block.splitlines())


@pytest.fixture(scope="module")
def orin() -> dict[str, dict[int, dict[str, Any]]]:
    return {row.name: script.run(script.ORIN, row, script.BATCHES) for row in script.ORIN.rows}


@pytest.fixture(scope="module")
def h100() -> dict[str, dict[int, dict[str, Any]]]:
    """In the closed form."""
    return {row.name: script.run(script.H100, row, (1, 32), "simulation.fidelity=analytic") for row in script.H100.rows}


def test_doctests() -> None:
    assert doctest.testmod(script).failed == 0


def test_the_page_shows_what_is_computed_for_the_orins(orin: Any) -> None:
    for key, lines in script.tables_of(script.ORIN, orin).items():
        assert table_of_page(key) == cells(lines)


def test_the_page_shows_what_is_computed_for_the_h100s(h100: Any) -> None:
    rates, times = (table_of_page(f"h100-{name}") for name in ("throughput", "times"))
    assert list(rates)[2:] == list(times)[2:] == [row.name for row in script.H100.rows]
    ep = script.H100_ROWS[0]
    sizes = {name: figures for name, figures in h100.items() if name.endswith("dp")}
    for name, figures in (*sizes.items(), (ep.name, script.run(script.H100, ep, (1,)))):
        for batch, size in figures.items():
            assert rates[name][script.BATCHES.index(batch)] == script.rate(size["output_tokens_per_s"])
            shown = [times[name][column + script.SHOWN.index(batch)] for column in (0, 3)]
            assert shown == [script.duration(size[metric]["mean"]) for metric in ("ttft_s", "tpot_s")]


@pytest.mark.parametrize("machine", [script.ORIN, script.H100], ids=["orin", "h100"])
def test_ratios_of_the_page_are_those_of_its_rates(machine: Any) -> None:
    rates = {
        name: [float(cell) for cell in row]
        for name, row in list(table_of_page(f"{machine.key}-throughput").items())[2:]
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
    page = table_of_page("weights")
    assert page["olmoe, baseline: read"][0] == "2.36 GB"
    assert page["olmo-1b: read"] == ["2.35 GB"] * 6


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


def ratios_at(machine: Any, column: int) -> list[str]:
    """Return the ratios of a column as the page quotes them: ep and fastest to equal total, then to equal active."""
    return [row[column] for row in list(table_of_page(f"{machine.key}-ratios").values())[2:]]


def one_digit(*ratios: str) -> list[str]:
    return [f"{float(ratio):.1f}" for ratio in ratios]


def quotes_of_both() -> list[str]:
    """Return what the page says of both machines, from its own tables."""
    (orin_1, orin_32), (h100_1, h100_32) = (
        [ratios_at(machine, column) for column in (0, -1)] for machine in (script.ORIN, script.H100)
    )
    ep_total, _, ep_active, _ = list(table_of_page("h100-ratios").values())[2:]
    total = [one_digit(row[1])[0] for row in (orin_1, h100_1, orin_32, h100_32)]
    rates = table_of_page("h100-throughput")
    share = float(rates["qwen3-moe, ep"][-1]) / float(rates["qwen3-moe, tp"][-1])
    return [
        "| {} times (two Orins), {} times (16 H100) | {} times, {} times |".format(*total),
        f"| {orin_1[3]} times, {h100_1[3]} times | {orin_32[3]} times, {h100_32[3]} times |",
        "{} and {} times those of the dense model of its total size".format(*one_digit(orin_1[0], orin_32[0])),
        f"{orin_1[2]} and {orin_32[2]} times those of its active size",
        f"{total[1]} times at batch 1 and {total[3]} times at batch 32; under expert parallelism",
        "parallelism {} to {} times. Unlike".format(*one_digit(min(ep_total), max(ep_total))),
        f"{h100_1[3]} times at batch 1, {h100_32[3]} times at batch 32; under expert parallelism",
        f"parallelism {min(ep_active)} to {max(ep_active)} times. In decode",
        f"reaches {share:.0%} of tp".replace("%", " %"),
        f"({float(table_of_page('weights')['qwen3-moe: experts of 128'][-1]):.0f} of 128 experts)",
    ]


def quotes_of_times() -> list[str]:
    """Return what the page says of TTFT and TPOT, from its own tables; columns as in `script.times_table`."""
    orin, h100 = (table_of_page(f"{key}-times") for key in ("orin", "h100"))

    def against(times: dict[str, list[str]], first: str, second: str, column: int) -> str:
        return f"{times[first][column].split()[0]} against {times[second][column]}"

    return [
        against(orin, "olmoe, dp", "llava-1.5-7b, dp", 3) + " under dp",
        "it is " + against(orin, "olmoe, dp", "llava-1.5-7b, dp", 5),
        f"({against(orin, 'olmoe, dp', 'llava-1.5-7b, dp', 2)})",
        f"({against(orin, 'olmoe, dp', 'olmo-1b, dp', 0).replace('93.4', '93')} under dp)",
        f"decides: {against(orin, 'olmoe, dp', 'olmo-1b, dp', 5)} at batch 32",
        f"slowest of the EP rows ({orin['olmoe, ep, SMoES'][5]})",
        against(h100, "qwen3-moe, dp", "llama-3.2-3b, dp", 3) + ", since",
        f"({against(h100, 'qwen3-moe, dp', 'llama-3.2-3b, dp', 0)})",
        f"(a TTFT of {against(h100, 'qwen3-moe, ep', 'qwen3-moe, tp', 0)})",
    ]


@pytest.mark.parametrize("quotes", [quotes_of_both, quotes_of_times], ids=["both", "times"])
def test_the_page_quotes_its_tables(quotes: Any) -> None:
    text = " ".join(script.PAGE.read_text(encoding="utf-8").split())
    assert [quote for quote in quotes() if quote not in text] == []


def test_what_the_page_says_of_smoes_and_memory(orin: Any) -> None:
    smoes, baseline = orin["olmoe, ep, SMoES"], orin["olmoe, ep, baseline of SMoES"]
    # "18 % more tokens/s than its own baseline at batch 1 and 38 % more at batch 32".
    gains = [smoes[size]["output_tokens_per_s"] / baseline[size]["output_tokens_per_s"] for size in (1, 32)]
    assert gains == pytest.approx([1.18, 1.38], abs=0.005)
    # "12.6 of the 78.0 ms; without it, SMoES would be 2 ms faster": the wait, over 31 decode steps.
    tpot_s, wait_s = smoes[32]["tpot_s"]["mean"], smoes[32]["kv_exposed_s"] / 31
    assert wait_s == pytest.approx(12.6e-3, abs=5e-5)
    assert baseline[32]["tpot_s"]["mean"] - (tpot_s - wait_s) == pytest.approx(2e-3, abs=5e-4)
    assert max(orin[row.name][32]["tpot_s"]["mean"] for row in script.ORIN_ROWS[:3]) == tpot_s

    def memory_gb(name: str, item: str) -> float:
        return float(sum(account[item] for account in orin[name][32]["memory_bytes"].values()) / 1e9)

    # "OLMoE needs 18 to 32 GB, `olmo-1b` 7 to 9, `llava-1.5-7b` 28 to 41, of which 12.5 are KV caches".
    for model, bounds in (("olmoe", (18, 32)), ("olmo-1b", (7, 9)), ("llava-1.5-7b", (28, 41))):
        totals = [memory_gb(row.name, "total") for row in script.ORIN_ROWS if row.model == model]
        assert (round(min(totals)), round(max(totals))) == bounds
    assert memory_gb("llava-1.5-7b, dp", "kv_cache") == pytest.approx(12.5, abs=0.05)


def test_weights_that_work_on_each_token_of_a_prefill() -> None:
    # OLMoE: 16 layers of attention 4 * 2048^2, router 2048 * 64 and 8 experts of 3 * 2048 * 1024; LLaVA-1.5-7B: 32 of
    # 4 * 4096^2 and 3 * 4096 * 11008. 1.08 and 6.48e9; the head works on one token of a request.
    by_hand = 16 * (4 * 2048**2 + 2048 * 64 + 8 * 3 * 2048 * 1024), 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    cards = [script.card_of(script.ORIN, row) for row in (script.ORIN_ROWS[0], script.ORIN_ROWS[5])]
    assert tuple(card.num_active_params - 2 * card.vocab_size * card.hidden_size for card in cards) == by_hand
    quote = " against ".join(f"{number / 1e9:.2f}" for number in by_hand)
    assert f"{quote} · 10⁹ weights work on each token" in " ".join(script.PAGE.read_text(encoding="utf-8").split())


def test_a_page_without_a_place_for_a_table_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8").replace("<!-- table: h100-times -->", ""))
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "weights_table", None)
    monkeypatch.setattr(sys, "argv", ["dense_vs_moe.py", "--docs"])
    with pytest.raises(SystemExit, match='0 tables "h100-times"; write <!-- table: h100-times -->'):
        script.main()


def test_tables_are_put_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table: weights -->\n<!-- end -->\nb\n<!-- table: x -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(script, "PAGE", page)
    for _ in range(2):  # the second time they are replaced by themselves
        script.write_page({"weights": ["|1|", "|2|"], "x": ["|3|"]})
        text = "a\n<!-- table: weights -->\n|1|\n|2|\n<!-- end -->\nb\n<!-- table: x -->\n|3|\n<!-- end -->\n"
        assert page.read_text() == text
