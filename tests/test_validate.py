"""Published figures as data, and what is worked out from them without any fit: table S10, the lines of S12, targets."""

from pathlib import Path

import numpy as np
import pytest

from epsim.trace.published import transfer_ratios
from epsim.validate.affine import affine_report, fit_affine
from epsim.validate.latency import ASSUMED_IMAGES, is_outlier, load_case
from epsim.validate.published import load_published
from epsim.validate.targets import TARGETS, target_report
from epsim.validate.transfer import transfer_report

ROOT = Path(__file__).parent.parent
PUBLISHED = load_published()
CASE = load_case(ROOT / "scenarios")


# The paper's own columns of differences, percent: a value with a wrong digit would move its difference.
PRINTED_S11 = {
    ("MMMU", "ttft_s"): [-10.3, -13.5, -15.7, -22.0, -23.9, -22.6],
    ("MMMU", "tpot_s"): [-10.5, -10.1, -9.3, -9.0, -8.6, -9.6],
    ("SQA-IMG", "ttft_s"): [-9.2, -13.0, -13.3, -16.6, -22.4, -20.0],
    ("SQA-IMG", "tpot_s"): [-9.7, -9.7, -9.8, -11.3, -10.3, -10.6],
}
PRINTED_S12 = [-4.7, -6.9, -8.3, -4.2, -4.0, -5.6]


@pytest.mark.parametrize(("benchmark", "metric"), PRINTED_S11)
def test_the_paper_s_own_differences_follow_from_the_values_of_s11(benchmark: str, metric: str) -> None:
    # The paper rounds or cuts to 0.1 percent.
    rows = [row for row in CASE.rows if row.get("trace.benchmark") == benchmark]
    baseline, smoes = (
        np.array([getattr(row, metric) for row in rows if row.get("trace.method") == method])
        for method in ("baseline", "attention-soft")
    )
    assert 100 * (smoes / baseline - 1) == pytest.approx(PRINTED_S11[benchmark, metric], abs=0.1)


def test_the_paper_s_own_differences_follow_from_the_values_of_s12() -> None:
    change = 100 * (PUBLISHED.s12["smoes"] / PUBLISHED.s12["baseline"] - 1)
    assert change == pytest.approx(PRINTED_S12, abs=0.1)
    assert change.mean() == pytest.approx(PUBLISHED.s12_mean_change_percent, abs=0.05)


def test_a_cell_of_s10_that_does_not_follow_is_named() -> None:
    found = transfer_ratios("MMMU", "attention-soft").pairs_frac[1] / transfer_ratios("MMMU", "baseline").pairs_frac[1]
    assert 100 * (found - 1) == pytest.approx(1.8, abs=0.05)
    assert "printed +1.0 %" in PUBLISHED.mismatches[0]


def test_s11_is_four_blocks_of_six_batch_sizes() -> None:
    found = [(row.get("trace.benchmark"), row.get("trace.method"), row.batch_size) for row in CASE.rows]
    assert found == [
        (benchmark, method, size)
        for benchmark in ("MMMU", "SQA-IMG")
        for method in ("baseline", "attention-soft")
        for size in (1, 2, 4, 8, 16, 32)
    ]
    for (benchmark, method, _), row in zip(found, CASE.rows, strict=True):
        assert (row.get("placement.policy"), row.get("transmission.mode")) == {
            "baseline": ("contiguous", "sync"),
            "attention-soft": ("modality_bins", "async"),
        }[method]
        assert row.get("trace.images") == (ASSUMED_IMAGES if benchmark == "MMMU" else 1)


def test_the_reasons_of_the_bounds_say_what_the_table_says() -> None:
    reasons = {parameter.field.rpartition(".")[2]: parameter.reason for parameter in CASE.parameters}
    times = {
        (row.get("trace.benchmark"), row.get("trace.method"), row.batch_size): (row.ttft_s, row.tpot_s)
        for row in CASE.rows
    }
    settings = list(dict.fromkeys(key[:2] for key in times))
    rises = [times[*key, 32][1] - times[*key, 1][1] for key in settings]
    assert f"TPOT rises by {min(rises):.2f} to {max(rises):.2f} s" in reasons["request_overhead"]
    powers = [
        [np.log(times[*key, 32][0] / times[*key, first][0]) / np.log(32 / first) for key in settings]
        for first in (1, 2)
    ]
    whole, rest = (f"{min(found):.2f} to {max(found):.2f} from" for found in powers)
    assert f"to the power {whole} batch 1 to 32, {rest} 2 to 32." in reasons["efficiency_exponent"]


def test_other_images_change_mmmu_alone() -> None:
    other = CASE.with_images(3)
    assert [row.get("trace.images") for row in other.rows] == [3] * 12 + [1] * 12
    assert [row.ttft_s for row in other.rows] == [row.ttft_s for row in CASE.rows]


def test_the_outlier_is_two_rows() -> None:
    rows = [row for row in CASE.rows if is_outlier(row)]
    assert [row.ttft_s for row in rows] == [1.493, 1.356]


def test_a_line_by_hand() -> None:
    # 1 + 2 n passes through (1, 3) and (2, 5).
    assert fit_affine(np.array([1.0, 2.0]), np.array([3.0, 5.0])) == pytest.approx((1.0, 2.0))


def test_a_line_weighs_relative_errors() -> None:
    # b n through (1, 1) and (1, 3), a = 0 by symmetry of one batch size: minimise (b - 1)^2 + (b / 3 - 1)^2, so
    # b - 1 + (b / 3 - 1) / 3 = 0 and b = (4 / 3) / (10 / 9) = 1.2. With one batch size a + b is what is determined.
    assert sum(fit_affine(np.ones(2), np.array([1.0, 3.0]))) == pytest.approx(1.2)


def test_table_s12_is_a_line() -> None:
    report = affine_report(PUBLISHED)
    assert report["max_error_percent"] < 3
    assert report["saving_percent"] == pytest.approx(5.6, abs=0.1)
    # Leaving a batch out can only make its error larger.
    for row in report["rows"]:
        for error, left_out in zip(row["error_percent"], row["left_out_error_percent"], strict=True):
            assert abs(left_out) >= abs(error)


def test_transfer_ratios_of_a_benchmark() -> None:
    report = transfer_report(ROOT / "scenarios", ["MMMU"])
    assert [row["method"] for row in report["rows"]] == ["baseline", "attention-soft", "gaussian-soft"]
    assert report["num_cells"] == 24
    assert report["rows"][0]["published"] == pytest.approx([42.7, 70.4, 48.0, 37.4, 97.7, 99.5, 98.0, 86.5])
    # P_V+T by hand: 576 vision and 139 text tokens, (576 * 8.8 + 139 * 71.7) / 715 = 21.03.
    assert report["rows"][1]["simulated"][2] == pytest.approx(21.03, abs=0.02)
    assert report["max_error_points"] == pytest.approx(21.03 - 20.7, abs=0.1)


def test_targets_are_met_or_missed_by_a_figure() -> None:
    errors = {"ttft_percent": 9.5, "tpot_percent": 5.0, "speedup_ttft_points": 0.0, "speedup_tpot_points": 0.0}
    study = {"errors": errors, "without_outlier": errors}
    report = target_report(
        {
            "s11": {"studies": [{"key": key, **study} for key in ("in_sample", "batches", "smoes")]},
            "s12": {"max_error_percent": 1.0, "saving_error_points": 3.5},
        }
    )
    assert len(report) == len(TARGETS)
    missed = {(entry["group"], entry["text"]): entry["missed_by"] for entry in report if not entry["met"]}
    assert missed == {
        ("S11, in sample", "TTFT, mean error"): pytest.approx(0.5),
        ("S11, in sample", "TTFT, mean error, without SQA-IMG batch 1"): pytest.approx(3.5),
        ("S12, a + b * batch", "mean saving, error"): pytest.approx(0.5),
    }
