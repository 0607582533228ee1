"""`epsim trace stats`: specialisation, evenness and transfer ratios of a trace, by hand and beside slow references."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import specialization as slow
from reference.captured import by_hand, captured_like

from epsim import cli
from epsim.errors import InputError, PlacementError, TraceError
from epsim.report.files import to_json
from epsim.report.trace_stats import notes
from epsim.trace import RoutingTrace, check_trace, concatenate, routing_counts
from epsim.trace.file import TraceWriter
from epsim.trace.published import transfer_ratios
from epsim.trace.statistics import expert_load
from epsim.trace.synthetic import published, published_workload
from epsim.trace_stats import Spread, sample_request, trace_stats

KINDS = ("prefill_vision", "prefill_text", "prefill_all", "decode_text")

# Top-2 of 4 experts in one layer. Vision chose [3, 2, 1, 0] of 6 pairs, text [1, 0, 1, 2] of 4.
FIVE_TOKENS = [
    ("V", (0, 1), (0.75, 0.25)),
    ("V", (0, 2), (0.5, 0.5)),
    ("V", (1, 0), (0.5, 1.5)),  # as a router that scales: 1/4 and 3/4
    ("T", (2, 3), (0.25, 0.75)),
    ("D", (0, 3), (0.125, 0.125)),  # as one that does not normalise: 1/2 and 1/2
]


def hand() -> RoutingTrace:
    trace = by_hand(FIVE_TOKENS)
    check_trace(trace)
    return trace


def text_only() -> RoutingTrace:
    trace = captured_like(lengths=(0, 6, 2))
    check_trace(trace)
    return trace


def only_layer(stats: dict[str, Any]) -> dict[str, Any]:
    (layer,) = stats["layers"]
    return dict(layer)


# by hand


def test_specialisation_by_hand() -> None:
    layer = only_layer(trace_stats(hand()))
    # Shares: vision [3, 2, 1, 0] / 6, text [1, 0, 1, 2] / 4.
    # Eq. 18: 1/4 / (1/2 + 1/4) = 1/3, 0, 1/4 / (1/6 + 1/4) = 3/5, 1.
    assert layer["layer_id"] == 5
    assert layer["text_affiliation"] == pytest.approx([1 / 3, 0, 3 / 5, 1])
    assert layer["specialization_score"] == pytest.approx([-1 / 3, -1, 1 / 5, 1])
    # Eq. 19: (1/3 + 1 + 1/5 + 1) / 4 = 19/30.
    assert layer["msi"] == pytest.approx(19 / 30)
    assert layer["num_idle_experts"] == 0
    # Text bias, eq. 11, plain counts: 1/4, 0, 1/2, 1. So experts 1, 0, 2, 3; four bins of one.
    assert layer["experts_by_text_bias"] == [1, 0, 2, 3]
    assert layer["bin_load"] == {"vision": [2, 3, 1, 0], "text": [0, 1, 1, 2]}


def test_loads_and_evenness_by_hand() -> None:
    stats = trace_stats(hand())
    layer = only_layer(stats)
    assert layer["expert_load"] == {
        "prefill_vision": [3, 2, 1, 0],
        "prefill_text": [0, 0, 1, 1],
        "decode_text": [1, 0, 0, 1],
        "prefill": [3, 2, 2, 1],
        "all": [4, 2, 2, 2],
    }
    # Mean over maximum: 1.5 / 3, 0.5 / 1, 0.5 / 1, 2 / 3, 2.5 / 4.
    assert list(layer["expert_balancedness"].values()) == pytest.approx([1 / 2, 1 / 2, 1 / 2, 2 / 3, 5 / 8])
    # Contiguous: experts 0, 1 on device 0. Prefill 5 and 3 pairs, decode 1 and 1, together 6 and 4.
    assert layer["device_load"] == {"prefill": [5, 3], "decode": [1, 1], "all": [6, 4]}
    assert list(layer["device_balancedness"].values()) == pytest.approx([4 / 5, 1, 5 / 6])
    assert stats["overall"]["device_balancedness"]["all"]["ratio_of_sums"] == pytest.approx(5 / 6)


def test_transfer_ratios_by_hand() -> None:
    stats = trace_stats(hand())
    # Device 0 serves 5/6 of the vision pairs and 1/4 of the text pairs, so prefill lives there and decode on device 1.
    assert (stats["parameters"]["prefill_devices"], stats["parameters"]["decode_devices"]) == ([0], [1])
    # Vision: 1 pair of 6 (expert 2), 1 token of 3. Prompt text: both pairs. Decode on device 1: expert 0 of 2 pairs.
    without, with_dedup = (stats["transfer_ratio"][way] for way in ("without_dedup", "with_dedup"))
    assert [without[kind] for kind in KINDS] == pytest.approx([1 / 6, 1, 3 / 8, 1 / 2])
    assert [with_dedup[kind] for kind in KINDS] == pytest.approx([1 / 3, 1, 1 / 2, 1])
    assert only_layer(stats)["remote_pairs_frac"] == {"prefill": 3 / 8, "decode": 1 / 2}


def test_routing_distribution_by_hand() -> None:
    layer = only_layer(trace_stats(hand()))
    # Vision: F = [3, 2, 1, 0] / 6, R = [3/4 + 1/2 + 3/4, 1/4 + 1/4, 1/2, 0] / 3 = [2, 1/2, 1/2, 0] / 3;
    # Q ~ [6, 1, 1/2, 0], sum 7.5. Text: F ~ [1, 0, 1, 2], R ~ [1/2, 0, 1/4, 5/4]; Q ~ [1/2, 0, 1/4, 5/2], sum 3.25.
    assert layer["mrd"]["vision"] == pytest.approx([6 / 7.5, 1 / 7.5, 0.5 / 7.5, 0])
    assert layer["mrd"]["text"] == pytest.approx([2 / 13, 0, 1 / 13, 10 / 13])
    # Expert 1 is vision's alone, expert 3 text's: eq. 11 and 12 are infinite, which JSON cannot say.
    assert (layer["mrd_distance_nats"], layer["num_one_sided_experts"]) == (None, 2)
    vision, text = ([(q + 1e-6) / (1 + 4e-6) for q in layer["mrd"][m]] for m in ("vision", "text"))
    expected = (slow.kl(vision, text) + slow.kl(text, vision)) / 2
    assert layer["mrd_distance_smoothed_nats"] == pytest.approx(expected, rel=1e-12)


def test_a_finite_distance_by_hand() -> None:
    trace = by_hand([("V", (0,), (1,)), ("V", (0,), (1,)), ("V", (1,), (1,)), ("T", (0,), (1,)), ("D", (1,), (1,))])
    layer = only_layer(trace_stats(dataclasses.replace(trace, meta=dataclasses.replace(trace.meta, num_experts=2))))
    # Vision F = R = [2/3, 1/3], Q ~ [4, 1]; text Q ~ [1, 1]. KL(v||t) = 0.8 ln 1.6 + 0.2 ln 0.4,
    # KL(t||v) = 0.5 ln 0.625 + 0.5 ln 2.5; half of their sum is 0.15 ln 4.
    assert layer["mrd_distance_nats"] == pytest.approx(0.15 * math.log(4))
    assert layer["num_one_sided_experts"] == 0


@pytest.mark.parametrize(
    ("vision", "text", "bits"), [((0, 1), (2, 3), 1.0), ((0, 1), (0, 1), 0.0), ((0, 1), (1, 2), 0.5)]
)
def test_jensen_shannon_by_hand(vision: tuple[int, int], text: tuple[int, int], bits: float) -> None:
    # Half of the mass in common: the middle is [1/4, 1/2, 1/4] of 1.5 bits, less 1 bit of either.
    layer = only_layer(trace_stats(by_hand([("V", vision, (1, 1)), ("T", text, (1, 1))])))
    assert layer["jensen_shannon_bits"] == pytest.approx(bits, abs=1e-12)
    assert layer["num_idle_experts"] == 4 - len({*vision, *text})


def test_an_idle_expert_has_no_score_and_counts_as_nothing_in_the_index() -> None:
    layer = only_layer(trace_stats(by_hand([("V", (0, 1), (1, 1)), ("T", (1, 2), (1, 1))])))
    assert layer["specialization_score"] == [-1, 0, 1, None]
    assert layer["msi"] == pytest.approx((1 + 0 + 1) / 4)


# beside slow references


@pytest.mark.parametrize("seed", [0, 1])
def test_layers_are_what_loops_over_tokens_say(seed: int) -> None:
    trace = captured_like(seed=seed)
    check_trace(trace)
    stats = trace_stats(trace)
    num_experts = trace.meta.num_experts
    for at, layer in enumerate(stats["layers"]):
        tokens = slow.tokens_of(trace, at)
        assert layer["text_affiliation"] == pytest.approx([slow.affiliation(tokens, e) for e in range(num_experts)])
        assert layer["msi"] == pytest.approx(slow.msi(tokens, num_experts), rel=1e-12)
        text, vision = ([slow.share(tokens, m, e) for e in range(num_experts)] for m in (0, 1))
        assert layer["jensen_shannon_bits"] == pytest.approx(slow.jensen_shannon(text, vision), rel=1e-9)
        mrd_text, mrd_vision = (slow.mrd(tokens, m, num_experts) for m in (0, 1))
        assert layer["mrd"]["text"] == pytest.approx(mrd_text, rel=1e-12)
        assert layer["mrd"]["vision"] == pytest.approx(mrd_vision, rel=1e-12)
        distance = (slow.kl(mrd_text, mrd_vision) + slow.kl(mrd_vision, mrd_text)) / 2
        assert layer["mrd_distance_nats"] == (pytest.approx(distance) if math.isfinite(distance) else None)
    assert stats["overall"]["msi"] == pytest.approx(np.mean([layer["msi"] for layer in stats["layers"]]))


def test_scores_are_what_numpy_says() -> None:
    trace = captured_like()
    stats = trace_stats(trace)
    correlations = []
    for at, layer in enumerate(stats["layers"]):
        columns = {name: scores[:, at].astype(np.float64) for name, scores in trace.modality_scores.items()}
        for name, scores in columns.items():
            for modality, code in (("text", 0), ("vision", 1)):
                own = scores[trace.modality_T == code]
                found = layer["modality_scores"][name]
                assert found["mean"][modality] == pytest.approx(own.mean())
                assert found["histogram"][modality] == np.histogram(own, bins=20, range=(0, 1))[0].tolist()
        expected = np.corrcoef(columns["attention"], columns["gaussian"])[0, 1]
        assert layer["score_correlation"]["attention and gaussian"] == pytest.approx(expected)
        correlations.append(expected)
    assert stats["overall"]["score_correlation"]["attention and gaussian"] == pytest.approx(np.mean(correlations))


@pytest.mark.parametrize("homes", ["balanced", "by_modality"])
@pytest.mark.parametrize("placement", ["round_robin", "modality_bins", "random"])
def test_transfer_is_what_loops_over_tokens_say(placement: str, homes: str) -> None:
    trace, spread = captured_like(), Spread(num_devices=3, placement=placement, homes=homes, seed=4)
    stats = trace_stats(trace, spread)
    placed, plan = spread.place(trace, expert_load(trace))
    where = {}
    for q, request_id in enumerate(sorted(set(trace.request_id_T.tolist()))):
        where[request_id, 0] = int(plan.prefill_devices[q % len(plan.prefill_devices)])
        where[request_id, 1] = int(plan.decode_devices[q % len(plan.decode_devices)])
    expected = slow.transfer(trace, placed.device_of_expert_RLE[0], where)
    for kind in KINDS:
        found = [stats["transfer_ratio"][way][kind] for way in ("without_dedup", "with_dedup")]
        assert found == pytest.approx(expected[kind])
    pairs = sum(sum(layer["device_load"]["all"]) for layer in stats["layers"])
    assert pairs == trace.topk_expert_ids_TLK.size


def test_table_s10_comes_back_from_a_trace_drawn_to_it() -> None:
    workload = published_workload("MMMU", num_requests=4)
    trace = concatenate(list(published("MMMU", "gaussian-soft", workload, seed=1)))
    stats = trace_stats(trace, Spread(placement="modality_bins"))
    known = transfer_ratios("MMMU", "gaussian-soft")
    for way, (vision, text, decode) in (("without_dedup", known.pairs_frac), ("with_dedup", known.tokens_frac)):
        found = stats["transfer_ratio"][way]
        assert [found[kind] for kind in ("prefill_vision", "prefill_text", "decode_text")] == pytest.approx(
            [vision, text, decode], abs=0.03
        )
    assert stats["parameters"]["placement_fitted_to_this_trace"]
    assert stats["layers"][0]["mrd"] is None
    assert stats["overall"]["mrd_distance_smoothed_nats"] is None


def test_pieces_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = captured_like()
    whole = trace_stats(trace)

    class Batched:
        name, meta, num_tokens, requests, select = "trace", trace.meta, trace.num_tokens, trace.requests, trace.select

        def batches(self) -> Any:
            return (trace.take(slice(i, i + 11)) for i in range(0, trace.num_tokens, 11))

    monkeypatch.setattr(routing_counts, "PIECE_TOKENS", 4)
    parts = trace_stats(Batched())
    assert_alike(parts, whole)
    assert sample_request(Batched()) == sample_request(trace)


def assert_alike(found: Any, expected: Any) -> None:
    """Equal, but for the rounding of sums in another order."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)
    else:
        assert found == expected


# what is missing


def test_text_alone_has_no_comparison_and_no_nan() -> None:
    stats = trace_stats(text_only())
    assert json.loads(to_json(stats)) == stats  # no NaN, no infinity
    for values in (stats["overall"], *stats["layers"]):
        assert all(
            values[name] is None
            for name in ("msi", "jensen_shannon_bits", "mrd_distance_nats", "num_one_sided_experts")
        )
    layer = stats["layers"][0]
    assert set(layer["text_affiliation"]) == set(layer["specialization_score"]) == {None}
    assert layer["mrd"]["vision"] == [None] * 12
    assert sum(layer["mrd"]["text"]) == pytest.approx(1)
    assert layer["modality_scores"]["attention"]["mean"]["vision"] is None
    assert layer["expert_balancedness"]["prefill_vision"] is None
    assert stats["transfer_ratio"]["without_dedup"]["prefill_vision"] is None
    assert stats["transfer_ratio"]["without_dedup"]["prefill_text"] is not None
    assert "The trace has no vision tokens" in " ".join(notes(stats))


def test_without_gate_weights_the_distance_is_nothing_not_zero() -> None:
    stats = trace_stats(by_hand(FIVE_TOKENS, gate_weights_TLK=None))
    layer = only_layer(stats)
    assert layer["mrd"] is layer["mrd_distance_nats"] is layer["mrd_distance_smoothed_nats"] is None
    assert layer["msi"] == pytest.approx(19 / 30)
    assert "The trace has no gate weights: no MRD distance." in list(notes(stats))


def test_weights_of_nothing_are_counted_and_left_out() -> None:
    stats = trace_stats(by_hand([*FIVE_TOKENS, ("D", (0, 1), (0, 0))]))
    assert stats["trace"]["num_weightless_visits"] == 1
    # Only F changes: text chose [2, 1, 1, 2]; Q ~ [2 * 1/2, 0, 1/4, 2 * 5/4] = [1, 0, 1/4, 5/2], sum 3.75.
    assert only_layer(stats)["mrd"]["text"] == pytest.approx([1 / 3.75, 0, 0.25 / 3.75, 2.5 / 3.75])


def test_scores_that_do_not_vary_have_no_correlation() -> None:
    scores = {name: np.full((5, 1), 0.3, np.float16) for name in ("a", "b")}
    stats = trace_stats(by_hand(FIVE_TOKENS, modality_scores=scores))
    assert only_layer(stats)["score_correlation"] == stats["overall"]["score_correlation"] == {"a and b": None}


def test_the_sample_is_a_request_with_both_modalities() -> None:
    first = captured_like(lengths=(0, 4, 1), num_requests=1)
    both = captured_like(lengths=(2, 2, 1), num_requests=1)
    trace = concatenate([first, dataclasses.replace(both, request_id_T=both.request_id_T + 1)])
    sample = sample_request(trace)
    assert sample is not None
    assert (sample["request_id"], sample["is_vision"]) == (4, [True, True, False, False])
    assert np.shape(sample["scores"]["gaussian"]) == (4, 3)
    assert sample["scores"]["gaussian"][1][2] == trace.select([4]).modality_scores["gaussian"][1, 2]
    assert sample_request(hand()) is None


# mistakes


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_gate_weights_are_refused(bad: float) -> None:
    with pytest.raises(TraceError, match="gate weights must be finite and not negative; `epsim trace check`"):
        trace_stats(by_hand([("V", (0, 1), (bad, 1)), ("T", (0, 1), (1, 1))]))


def test_bad_scores_are_refused() -> None:
    with pytest.raises(TraceError, match="modality scores of 'a' must be from 0 to 1"):
        trace_stats(by_hand(FIVE_TOKENS, modality_scores={"a": np.full((5, 1), math.nan, np.float16)}))


def test_choices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"bins: 3 does not divide 4 experts; use a divisor, e\.g\. 2"):
        trace_stats(hand(), num_bins=3)
    with pytest.raises(PlacementError, match="4 experts do not divide over 3 devices"):
        trace_stats(hand(), Spread(num_devices=3))
    with pytest.raises(PlacementError, match="homes: 'best' is not one of by_modality, balanced"):
        Spread(homes="best")
    with pytest.raises(PlacementError, match="'best' is neither a policy nor a file; write contiguous, round_robin"):
        Spread(placement="best")
    with pytest.raises(PlacementError, match="devices: 0 must be 1 or more"):
        Spread(num_devices=0)


def test_a_placement_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"physical_to_logical_map": [[0, 3, 1, 2]]}')
    stats = trace_stats(hand(), Spread(placement=str(path), homes="balanced"))
    assert only_layer(stats)["device_load"]["all"] == [4 + 2, 2 + 2]
    # All on device 0, with experts 0 and 3: of vision's pairs experts 1, 1, 2 are remote; the decode token has none.
    without = stats["transfer_ratio"]["without_dedup"]
    assert [without[kind] for kind in KINDS] == pytest.approx([3 / 6, 1 / 2, 4 / 8, 0])


# the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that writes a trace and runs `epsim trace stats` on it: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(trace: RoutingTrace, *options: str) -> tuple[Any, str, str]:
        with TraceWriter("t.arrow", trace.meta) as writer:
            writer.write(trace)
        monkeypatch.setattr(sys, "argv", ["epsim", "trace", "stats", "t.arrow", *options])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return (exit_info.value.code, *capsys.readouterr())

    return run


def test_the_tables_fit_and_say_where_the_routing_is_from(command: Callable[..., Any]) -> None:
    code, out, err = command(captured_like(layer_ids=range(48)), "--placement", "modality_bins")
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 100
    assert out.splitlines()[0] == "routing: captured, MOCK: made up"
    assert "In sample: placement modality_bins is fitted to this very trace" in out
    assert "nan" not in out.lower()


def test_the_printed_figures_are_those_of_the_json(command: Callable[..., Any]) -> None:
    _, out, _ = command(hand())
    rows = [line.split() for line in out.splitlines()]
    # JSD: the middle is [9, 4, 5, 6] / 24, 1.933 bits; vision has 1.459 bits, text 1.5.
    assert next(row for row in rows if row[:1] == ["5"])[:4] == ["5", "0.633", "0.453", "inf"]
    assert ["pairs,", "without", "dedup", "16.7", "100.0", "37.5", "50.0"] in rows
    assert ["tokens,", "with", "dedup", "33.3", "100.0", "50.0", "100.0"] in rows
    code, out, _ = command(hand(), "--json")
    found = json.loads(out)
    assert (code, found["layers"]) == (0, trace_stats(hand())["layers"])
    assert found["trace"]["name"] == "t.arrow"


def test_text_alone_prints_dashes(command: Callable[..., Any]) -> None:
    code, out, _ = command(text_only())
    assert code == 0
    assert "nan" not in out.lower()
    first = next(line.split() for line in out.splitlines() if line.split()[:1] == ["1"])
    assert first[1:5] == ["-"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bins", "7"), "epsim: bins: 7 does not divide 4 experts; use a divisor, e.g. 4\n"),
        (("--homes", "best"), "epsim: homes: 'best' is not one of by_modality, balanced\n"),
        (
            ("--placement", "best"),
            "epsim: placement: 'best' is neither a policy nor a file; write contiguous, round_robin, random, "
            "modality_bins, coactivation, balanced_coactivation, replicated, or the path of a JSON file\n",
        ),
    ],
)
def test_mistakes_are_one_line(command: Callable[..., Any], options: tuple[str, str], message: str) -> None:
    assert command(hand(), *options) == (2, "", message)


def test_figures_without_matplotlib_are_one_line(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = command(hand(), "--plot", "figures")
    assert (code, out) == (2, "")
    assert err == "epsim: figures need matplotlib; install it with: pip install -e '.[plot]' in epsim's folder\n"
    assert not (tmp_path / "figures").exists()
