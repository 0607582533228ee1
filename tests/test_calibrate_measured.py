"""Tables of measurements, parameters, hold-outs and the naive rule: what is read, refused, split and counted."""

import math
from pathlib import Path

import numpy as np
import pytest

from epsim.calibrate.holdout import errors, hold_out, in_sample, k_folds, naive, naive_beside_seen, require_cells
from epsim.calibrate.measured import (
    Compare,
    MeasuredError,
    MeasuredRow,
    measured_matrix,
    pairs_of,
    parse_compare,
    read_measured,
)
from epsim.calibrate.parameters import Parameter, ParameterError, default_parameters, load_parameters, parse_parameters
from epsim.calibrate.profile import fitted_type, set_lines
from epsim.scenario.cluster import ClusterSpec
from epsim.scenario.fields import ClusterField

TABLE = """\
trace.method,placement.policy,batch_size,ttft_s,tpot_s,note
baseline,contiguous,1,1.0,0.1,first
baseline,contiguous,2,2.0,,
soft,modality_bins,1,0.8,0.1,
soft,modality_bins,2,1.5,0.3,
"""


def rows_of(tmp_path: Path, text: str = TABLE) -> tuple[MeasuredRow, ...]:
    path = tmp_path / "measured.csv"
    path.write_text(text, encoding="utf-8")
    return read_measured(path)


def row(batch_size: int, ttft_s: float | None = 1.0, tpot_s: float | None = None, **settings: object) -> MeasuredRow:
    return MeasuredRow(settings=tuple(settings.items()), batch_size=batch_size, ttft_s=ttft_s, tpot_s=tpot_s)


def test_rows_are_what_is_written(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert rows[0] == MeasuredRow(
        settings=(("trace.method", "baseline"), ("placement.policy", "contiguous")),
        batch_size=1, ttft_s=1.0, tpot_s=0.1,
    )  # fmt: skip
    assert rows[1].tpot_s is None
    assert measured_matrix(rows)[:, 0].tolist() == [1.0, 2.0, 0.8, 1.5]
    assert np.isnan(measured_matrix(rows)[1, 1])


def test_values_are_yaml_and_empty_cells_leave_the_scenario(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "trace.images,trace.seed,batch_size,ttft_s\n2,,1,1\n,7,1,1\n")
    assert rows[0].settings == (("trace.images", 2),)
    assert rows[1].settings == (("trace.seed", 7),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "measured.csv: holds no measurements"),
        ("batch_size,ttft_s\n", "measured.csv: holds no measurements"),
        ("size,ttft_s\n1,1\n", "line 1: the column batch_size is missing"),
        ("batch_size,ttft_s,workload.batch_sizes\n1,1,[1]\n", "workload.batch_sizes cannot be a column"),
        ("batch_size,note\n1,1\n", "line 1: neither ttft_s nor tpot_s is there"),
        ("batch_size,ttft_s,ttft_s\n1,1,1\n", 'line 1: the column "ttft_s" is there twice'),
        ("batch_size,ttft_s,\n1,1,1\n", "line 1: a column has no name"),
        ("batch_size,ttft_s\n1,1,1\n", "line 2: 3 cells under 2 names"),
        ("batch_size,ttft_s\n1,1\n0,1\n", 'line 3, column batch_size: "0" is not a whole number above 0'),
        ("batch_size,ttft_s\n1,1 ms\n", 'line 2, column ttft_s: "1 ms" is not a number of seconds above 0'),
        ("batch_size,ttft_s\n1,-1\n", 'column ttft_s: "-1" is not a number of seconds above 0'),
        ("batch_size,ttft_s\n1,nan\n", 'column ttft_s: "nan" is not a number of seconds above 0'),
        ("batch_size,ttft_s,a\n1,1,[\n", 'line 2, column a: "[" is not YAML'),
        ("batch_size,ttft_s,tpot_s\n1,1,\n2,,\n", "line 3: holds neither TTFT nor TPOT"),
        ("batch_size,ttft_s\n1,1\n1,2\n", "line 3: the same settings and batch size as line 2"),
    ],
)
def test_a_mistake_is_one_line_with_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MeasuredError) as error:
        rows_of(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MeasuredError, match="cannot be read: No such file"):
        read_measured(tmp_path / "none.csv")


def test_pairs_ignore_what_follows_from_the_compared_column(tmp_path: Path) -> None:
    # The placement is another one, but goes with the method: rows 2 and 3 stand beside 0 and 1 of equal batch size.
    rows = rows_of(tmp_path)
    assert pairs_of(rows, parse_compare("trace.method=baseline", rows)).tolist() == [[2, 0], [3, 1]]
    assert pairs_of(rows, None).shape == (0, 2)


def test_pairs_keep_other_settings_apart() -> None:
    rows = [row(1, a=a, b=b) for a in ("x", "y") for b in (1, 2)]
    assert pairs_of(rows, Compare(column="a", value="x")).tolist() == [[2, 0], [3, 1]]
    assert pairs_of(rows, Compare(column="b", value=2)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "method=baseline",
            "not a column of the measurements; write one of batch_size, trace.method, placement.policy",
        ),
        ("trace.method=base", "no row has base; known are baseline, soft"),
        ("trace.method", "write column=value"),
        ("trace.method=baseline,soft", "2 values; write the one"),
        ("trace.method=", "no value; known are baseline, soft"),
    ],
)
def test_a_comparison_must_be_of_the_table(tmp_path: Path, text: str, message: str) -> None:
    rows = rows_of(tmp_path)
    with pytest.raises(MeasuredError) as error:
        parse_compare(text, rows)
    assert f'--compare "{text}": ' in str(error.value)
    assert message in str(error.value)


def test_hold_out_takes_the_named_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    scheme = hold_out(rows, "batch_size=2")
    assert scheme.test.tolist() == [False, True, False, True]
    assert scheme.train.tolist() == [True, False, True, False]
    assert hold_out(rows, "trace.method=soft").test.tolist() == [False, False, True, True]
    with pytest.raises(MeasuredError, match="holds out every row"):
        hold_out(rows, "batch_size=1,2")
    with pytest.raises(MeasuredError, match="no row has 3; known are 1, 2"):
        hold_out(rows, "batch_size=3")


def test_folds_test_every_row_once_and_keep_pairs_together() -> None:
    rows = [row(n, m=m) for m in ("base", "new") for n in range(1, 8)]
    compare = Compare(column="m", value="base")
    schemes = k_folds(rows, 3, seed=5, compare=compare)
    assert np.sum([scheme.test for scheme in schemes], axis=0).tolist() == [1] * 14
    for scheme in schemes:
        assert np.array_equal(scheme.train, ~scheme.test)
        assert np.array_equal(scheme.test[:7], scheme.test[7:])
    again = k_folds(rows, 3, seed=5, compare=compare)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(schemes, again, strict=True))
    with pytest.raises(MeasuredError, match="--folds: 15 is not from 2 to 14"):
        k_folds(rows, 15, seed=5)
    with pytest.raises(MeasuredError, match="--folds: 8 is above 7"):
        k_folds(rows, 8, seed=5, compare=compare)


def test_a_scheme_without_a_cell_to_fit_is_refused() -> None:
    rows = [row(1, 1.0), row(2, None)]
    with pytest.raises(MeasuredError, match="held out batch_size=1: leaves no measured cell to fit"):
        require_cells(rows, [in_sample(rows), hold_out(rows, "batch_size=1")])
    require_cells(rows, [hold_out(rows, "batch_size=2")])


def test_errors_by_hand() -> None:
    # TTFT: predicted 1.1 and 1.8 for 1 and 2: +10 % and -10 %; bias 0. Change: measured +100 %, predicted 1.8 / 1.1 - 1
    # = +63.636 %: 36.364 points. TPOT: the second was not measured, so 20 % of one cell, and no change.
    rows = [row(1, 1.0, 0.1, m="base"), row(1, 2.0, None, m="new")]
    predicted = np.array([[1.1, 0.12], [1.8, 0.5]])
    found = errors(rows, predicted, in_sample(rows).test, Compare(column="m", value="base"))
    assert found.mean_abs_ttft == pytest.approx(0.1)
    assert found.bias_ttft == pytest.approx(0.0)
    assert found.mean_abs_tpot == found.bias_tpot == pytest.approx(0.2)
    assert found.speedup_ttft_points == pytest.approx(100 - 100 * 0.7 / 1.1)
    assert found.speedup_tpot_points is None
    assert found.num_cells == 3


def test_naive_interpolates_in_logarithms_of_the_batch_size() -> None:
    # Batches 1 and 4 take 1 s and 4 s: a line of slope 1 in logarithms, so 2 s at 2 and, beyond the end, 8 s at 8.
    rows = [row(1, 1.0), row(4, 4.0), row(2, 9.0), row(8, 9.0)]
    train = np.array([True, True, False, False])
    predicted = naive(rows, train, ~train)
    assert predicted[2:, 0] == pytest.approx([2.0, 8.0])
    assert np.isnan(predicted[:2]).all()
    assert np.isnan(predicted[:, 1]).all()


def test_naive_copies_the_row_that_is_most_alike() -> None:
    rows = [row(1, 1.0, m="a", d="x"), row(1, 2.0, m="b", d="y"), row(2, 3.0, m="a", d="z"), row(1, 9.0, m="c", d="y")]
    train = np.array([True, True, True, False])
    # The last: equal batch size has row 0 (nothing else) and row 1 (d): a copy of row 1.
    assert naive(rows, train, ~train)[3, 0] == 2.0


def test_naive_in_sample_leaves_the_row_itself_out() -> None:
    rows = [row(1, 1.0), row(2, 5.0), row(4, 4.0)]
    every = np.ones(3, dtype=bool)
    assert naive(rows, every, every)[1, 0] == pytest.approx(2.0)


def test_the_naive_rule_sees_measured_rows_but_never_a_test_row() -> None:
    # Row 1 is a copy of row 0, row 2 stands beside nothing that was measured (no TPOT at all).
    rows = [row(1, 1.0, m="a"), row(1, 4.0, m="b"), row(2, 3.0, 0.5, m="b")]
    scheme = hold_out(rows, "m=b")
    found = naive_beside_seen(rows, scheme)
    assert found[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert np.isnan(found[:, 1]).all()


def parameter_text(**changes: str) -> str:
    fields = {
        "field": "cluster.device_types.orin.expert_overhead",
        "low": "0 ms",
        "high": "10 ms",
        "reason": "host",
        **changes,
    }
    return "parameters:\n  - " + "\n    ".join(f"{name}: {value}" for name, value in fields.items() if value) + "\n"


def test_parameters_are_in_the_units_of_their_field(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        parameter_text(field="cluster.links[ethernet].bandwidth", low="1 Gbit/s", high="9 Gbit/s", scale="log")
    )
    (found,) = load_parameters(path)
    assert (found.low, found.high, found.log, found.reason) == (1.25e8, 1.125e9, True, "host")
    # 3 Gbit/s is the geometric mean of 1 and 9.
    assert found.to_unit(3.75e8) == pytest.approx(0.5)
    assert found.from_unit(0.5) == pytest.approx(3.75e8)
    assert found.to_unit(1.0) == 0.0
    assert found.from_unit(1.0) == found.high


def test_a_linear_parameter_by_hand() -> None:
    parameter = Parameter(field="f", low=2.0, high=6.0, log=False, reason="")
    assert parameter.to_unit(3.0) == 0.25
    assert parameter.from_unit(0.75) == 5.0
    assert parameter.to_unit(math.inf) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "p.yaml: not a mapping"),
        ("parameters: []", "p.yaml: parameters: [] is empty"),
        ("parameters: [", "p.yaml: not valid YAML"),
        (parameter_text(low=""), "parameters[0].low: is missing"),
        (parameter_text(reason=""), "parameters[0].reason: is missing"),
        (parameter_text(low="0"), 'parameters[0].low: 0 is not a time; write e.g. "5 us"'),
        (parameter_text(low="20 ms"), "low 0.02 is not below high 0.01"),
        (parameter_text(scale="log"), "low 0 has no logarithm"),
        (parameter_text(scale="cubic"), 'parameters[0].scale: "cubic" is not known; write linear or log'),
        (parameter_text(field="trace.seed"), '"trace.seed" is not a field of the cluster'),
        (parameter_text(field="cluster.device_types.orin.expert"), "expert is not a known field"),
        (parameter_text(field="cluster.device_types.orin.flops"), "is not a number"),
        (parameter_text(extra="1"), "parameters[0].extra: is not a known field"),
        (parameter_text() + parameter_text().partition("\n")[2], "is there twice"),
    ],
)
def test_a_mistake_in_the_parameters_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ParameterError) as error:
        parse_parameters(text, "p.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_default_parameters_want_one_device_type() -> None:
    assert all(".mine." in parameter.field for parameter in default_parameters(["mine"]))
    with pytest.raises(ParameterError, match="a, b are several; write --parameters FILE"):
        default_parameters(["a", "b"])


CLUSTER = {
    "name": "two",
    "device_types": {"d": {"memory": "1 GB", "memory_bandwidth": "1 GB/s", "flops": {"bf16": "1 TFLOP/s"}}},
    "devices": [{"name": "a", "type": "d", "node": "n"}],
    "links": [{"name": "wire", "from": "a", "to": "b", "bandwidth": "8 Gbit/s"}],
}


def test_fields_of_a_cluster_are_read_and_written() -> None:
    cluster = ClusterSpec.model_validate(CLUSTER).model_dump()
    link = ClusterField(path="cluster.links[wire].bandwidth")
    assert link.read(cluster) == 1e9
    link.write(cluster, 2e9)
    assert ClusterField(path="cluster.links[0].bandwidth").read(cluster) == 2e9
    staging = ClusterField(path="cluster.device_types.d.staging.bandwidth")
    assert staging.read(cluster) is None
    staging.write(cluster, 5e8)
    assert cluster["device_types"]["d"]["staging"] == {"bandwidth": 5e8, "message_overhead": 0.0}
    left_out = ClusterSpec.model_validate(CLUSTER).model_dump()
    ClusterField(path="cluster.device_types.d.staging.message_overhead").write(left_out, 1e-3)
    assert left_out["device_types"]["d"]["staging"] == {"bandwidth": None, "message_overhead": 1e-3}
    assert staging.parse(staging.format(5e8 / 3)) == 5e8 / 3


@pytest.mark.parametrize(
    ("path", "default", "text", "value"),
    [
        ("device_types.d.messaging.send_overhead", None, "40 us", 40e-6),
        ("device_types.d.messaging.send_bandwidth", None, "4 GB/s", 4e9),
        ("device_types.d.messaging.background_bandwidth", None, "8 GB/s", 8e9),
        ("device_types.d.step_overhead", 0.0, "1 ms", 1e-3),
        ("links[wire].burst", 0.0, "64 KiB", 65536.0),
        ("links[wire].message_header", 0.0, "0 B", 0.0),
        ("links[wire].ack_overhead", 0.0, 0.02, 0.02),
    ],
)
def test_terms_of_a_transport_are_fields_that_can_be_fitted(
    path: str, default: float | None, text: str | float, value: float
) -> None:
    cluster = ClusterSpec.model_validate(CLUSTER).model_dump()
    field = ClusterField(path=f"cluster.{path}")
    assert field.read(cluster) == default
    assert field.parse(text) == value
    assert field.format(value) == text
    field.write(cluster, value)
    assert field.read(cluster) == value


@pytest.mark.parametrize("field", ["cluster.device_types[d].layer_overhead", "cluster.device_types.d.layer_overhead"])
def test_a_device_type_is_known_by_either_spelling(field: str) -> None:
    parameter = Parameter(field=field, low=0.0, high=1.0, log=False, reason="a test")
    assert fitted_type([parameter]) == "d"
    assert set_lines({field: 0.5, "cluster.links[wire].latency": 1e-6}) == ["cluster.links[wire].latency=1 us"]
