"""Fits: predictions are the simulator's, known values are found again, and what data cannot say is not said."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from epsim.calibrate.fit import Effort, fit
from epsim.calibrate.holdout import in_sample
from epsim.calibrate.measured import Compare, Floats, MeasuredError, MeasuredRow
from epsim.calibrate.parameters import Parameter, ParameterError, default_parameters
from epsim.calibrate.predict import Predictor
from epsim.calibrate.problem import Problem, Weights
from epsim.calibrate.workers import Workers
from epsim.errors import CapacityError, ScenarioError
from epsim.run import simulate
from epsim.scenario import apply_override, check_scenario
from epsim.scenario.fields import ClusterField

SCENARIO: dict[str, Any] = {
    "name": "small",
    "model": "olmoe",
    "cluster": "orin-2x-10gbe",
    "trace": {"kind": "uniform", "vision_tokens": 20, "text_tokens": 7, "output_tokens": 4},
    "simulation": {"fidelity": "analytic"},
}
ORIN = "cluster.device_types.orin"


def raw_scenario(**changes: Any) -> dict[str, Any]:
    return {**{name: value if isinstance(value, str) else dict(value) for name, value in SCENARIO.items()}, **changes}


def row(batch_size: int, ttft_s: float | None = 1.0, tpot_s: float | None = 1.0, **settings: Any) -> MeasuredRow:
    named = tuple((name.replace("__", "."), value) for name, value in settings.items())
    return MeasuredRow(settings=named, batch_size=batch_size, ttft_s=ttft_s, tpot_s=tpot_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formula:
    """TTFT = a + b * batch, TPOT = a / 10 + c; faster modes take half of b. The scenario says a = 1, b = 1, c = 0.5."""

    rows: tuple[MeasuredRow, ...]

    def specified(self, field: str) -> float | None:
        return {"a": 1.0, "b": 1.0, "c": 0.5}.get(field)

    def rounded(self, field: str, value: float) -> float:
        return value

    def predict(self, values: Mapping[str, float]) -> Floats:
        a, b, c = (values.get(name, 1.0) for name in "abc")
        b_of_row = [b / 2 if row.get("mode") == "fast" else b for row in self.rows]
        return np.array([[a + b * r.batch_size, a / 10 + c] for r, b in zip(self.rows, b_of_row, strict=True)])


def formula(values: Mapping[str, float], noise: float = 0.0, tpot: bool = True) -> Formula:
    """A formula whose rows were measured with the given values and a relative noise."""
    blank = tuple(row(n, mode=mode) for mode in ("slow", "fast") for n in (1, 2, 4, 8))
    truth = Formula(rows=blank).predict(values) * np.exp(noise * np.random.default_rng(0).normal(size=(8, 2)))
    rows = [
        dataclasses.replace(r, ttft_s=float(ttft), tpot_s=float(tpot_s) if tpot else None)
        for r, (ttft, tpot_s) in zip(blank, truth, strict=True)
    ]
    return Formula(rows=tuple(rows))


def parameter(field: str, low: float = 0.01, high: float = 10.0, log: bool = True) -> Parameter:
    return Parameter(field=field, low=low, high=high, log=log, reason="a test")


PARAMETERS = tuple(parameter(field) for field in "abc")
QUICK = Effort(num_screened=8, num_short=2, short_steps=8, num_long=1, long_steps=40)


@pytest.mark.parametrize("fidelity", ["analytic", "event"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_predictions_are_those_of_simulate(fidelity: str, mode: str) -> None:
    values = {
        f"{ORIN}.expert_overhead": 0.0012345,
        f"{ORIN}.compute_efficiency": 0.123,
        f"{ORIN}.staging.bandwidth": 1e9 / 3,
        f"{ORIN}.staging.message_overhead": 0.0007,
        "cluster.links[ethernet].bandwidth": 1e9 / 7,
    }
    raw = raw_scenario(simulation={"fidelity": fidelity}, workload={"batch_sizes": [5], "num_batches": 2})
    rows = [row(3, transmission__mode=mode), row(1, transmission__mode=mode)]
    predicted = Predictor(raw, rows).predict(values)
    apply_override(raw, "transmission.mode", mode)
    apply_override(raw, "workload.batch_sizes", [1, 3])
    for name in sorted(values):  # the bandwidth of staging comes before its overhead
        apply_override(raw, name, ClusterField(path=name).format(values[name]))
    sizes = simulate(check_scenario(raw)).results["batch_sizes"]
    expected = [[size["ttft_s"]["mean"], size["tpot_s"]["mean"]] for size in (sizes[1], sizes[0])]
    assert predicted == pytest.approx(np.array(expected), rel=1e-12)


def test_fields_that_are_not_named_keep_the_scenarios_values() -> None:
    predictor = Predictor(raw_scenario(), [row(2)])
    as_specified = predictor.predict({})
    assert predictor.specified(f"{ORIN}.compute_efficiency") == 0.5
    assert predictor.specified(f"{ORIN}.staging.bandwidth") is None
    predictor.predict({f"{ORIN}.expert_overhead": 1.0})
    assert np.array_equal(predictor.predict({}), as_specified)


def test_what_cannot_be_predicted_is_said() -> None:
    with pytest.raises(ScenarioError, match=r'with transmission.mode=never: transmission.mode: "never" is not known'):
        Predictor(raw_scenario(), [row(1, transmission__mode="never")])
    tight = raw_scenario()
    apply_override(tight, f"{ORIN}.memory", "1 GB")
    with pytest.raises(CapacityError, match=r"with homes.policy=balanced: .*does not fit"):
        Predictor(tight, [row(1, homes__policy="balanced")])
    with pytest.raises(MeasuredError, match="batch 1: a TPOT was measured, but the scenario makes one token"):
        Predictor(raw_scenario(workload={"max_output_tokens": 1}), [row(1)])


def test_what_cannot_be_fitted_is_said() -> None:
    predictor = Predictor(raw_scenario(), [MeasuredRow(
        settings=(("cluster.links[0].bandwidth", "1 Gbit/s"),), batch_size=1, ttft_s=1.0, tpot_s=None
    )])  # fmt: skip
    with pytest.raises(ParameterError, match=r"the measurements set it in the column cluster.links\[0\].bandwidth"):
        predictor.check(["cluster.links[ethernet].bandwidth"])
    with pytest.raises(ParameterError, match=r"links\[ethernet\].latency: is the same field as cluster.links\[0\].lat"):
        predictor.check(["cluster.links[0].latency", "cluster.links[ethernet].latency"])
    with pytest.raises(ParameterError, match=r"orin.staging.bandwidth: is missing"):
        predictor.check([f"{ORIN}.staging.message_overhead"])
    with pytest.raises(ScenarioError, match="the cluster has no xavier; write one of orin"):
        predictor.check(["cluster.device_types.xavier.launch_overhead"])
    predictor.check([f"{ORIN}.staging.message_overhead", f"{ORIN}.staging.bandwidth"])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("cluster", "orin-2x-10gbe"),
        (ORIN, "orin-smoes-s11"),
        ("cluster.device_types[orin].staging", {"bandwidth": "1 GB/s"}),
        (f"{ORIN}.staging.bandwidth", "1 GB/s"),
    ],
)
def test_a_column_that_holds_a_fitted_field_is_refused(column: str, value: Any) -> None:
    rows = [MeasuredRow(settings=((column, value),), batch_size=1, ttft_s=1.0, tpot_s=None)]
    predictor = Predictor(raw_scenario(), rows)
    name = f"{ORIN}.staging.bandwidth"
    with pytest.raises(ParameterError) as error:
        predictor.check(["cluster.links[ethernet].latency", name] if column != "cluster" else [name])
    assert str(error.value) == f"{name}: the measurements set it in the column {column}; fit it or set it"
    if column != "cluster":
        predictor.check(["cluster.links[ethernet].latency"])


def test_residuals_by_hand() -> None:
    # Values a = 1, b = 2, c = 0.5: TTFT 3 and (fast) 2, TPOT 0.6; measured 2 and 2, and TPOT 0.6 of the first alone.
    rows = (row(1, 2.0, 0.6, mode="slow"), row(1, 2.0, None, mode="fast"))
    problem = Problem(
        predictor=Formula(rows=rows),
        free=(parameter("b", 1.0, 3.0, log=False),),
        train=np.ones(2, dtype=bool),
        compare=Compare(column="mode", value="slow"),
        weights=Weights(pairs=3.0, ridge=0.1, loss_scale=0.2),
        fixed={"a": 1.0, "c": 0.5},
    )
    # Levels log(3/2), 0, 0; the difference 3 * (0 - log(3/2)); the ridge 0.1 * (0.5 - 0): b = 1 is the low bound.
    log = np.log(1.5)
    assert problem.residuals(np.array([0.5])) == pytest.approx([log, 0.0, 0.0, -3 * log, 0.05], abs=1e-15)
    assert problem.num_cells == 3
    # d log(1 + b)/d place = 2/(1 + b) = 2/3; fast: d log(1 + b/2) = 1/(1 + b/2) = 1/2.
    assert problem.jacobian(np.array([0.5]))[:, 0] == pytest.approx([2 / 3, 0, 1 / 2, -3 / 6, 0.1], abs=1e-3)
    # Small residuals cost r^2 / 2, large ones about the loss scale times |r|.
    assert problem.robust_cost(np.array([1e-4])) == pytest.approx(0.5e-8, rel=1e-4)
    assert problem.robust_cost(np.array([100.0])) == pytest.approx(0.2 * 100, rel=2e-3)


def test_known_values_are_found_again() -> None:
    truth = {"a": 3.0, "b": 0.2, "c": 0.05}
    predictor = formula(truth)
    found = fit(predictor, PARAMETERS, in_sample(predictor.rows).train, effort=QUICK)
    assert found.values == pytest.approx(truth, rel=1e-3)  # the ridge is not quite nothing
    assert found.predicted == pytest.approx(predictor.predict(truth), rel=1e-3)
    assert found.message == "converged"


def test_a_parameter_without_influence_stays_at_the_specification() -> None:
    predictor = formula({"a": 3.0, "b": 0.2, "c": 0.05}, tpot=False)
    found = fit(predictor, PARAMETERS, in_sample(predictor.rows).train, effort=QUICK)
    assert found.values["c"] == pytest.approx(0.5, rel=1e-3)


def test_rows_held_out_do_not_count() -> None:
    predictor = formula({"a": 3.0, "b": 0.2, "c": 0.05})
    train = np.array([r.batch_size != 8 for r in predictor.rows])
    spoilt = tuple(r if t else dataclasses.replace(r, ttft_s=1e3) for r, t in zip(predictor.rows, train, strict=True))
    compare = Compare(column="mode", value="slow")
    fits = [fit(Formula(rows=rows), PARAMETERS, train, compare, effort=QUICK) for rows in (predictor.rows, spoilt)]
    assert fits[0].values == fits[1].values


def test_an_outlier_does_not_govern() -> None:
    truth = {"a": 3.0, "b": 0.2, "c": 0.05}
    rows = formula(truth).rows
    outlier = (dataclasses.replace(rows[0], ttft_s=rows[0].ttft_s / 3), *rows[1:])  # type: ignore[operator]
    found = fit(Formula(rows=outlier), PARAMETERS, in_sample(rows).train, effort=QUICK)
    # Plain least squares puts log(3)/8 = 14 % on every other TTFT; the loss lets the outlier have most of it.
    assert found.predicted[1:, 0] == pytest.approx(Formula(rows=rows).predict(truth)[1:, 0], rel=0.05)


def test_the_same_fit_twice_and_on_processes() -> None:
    predictor = formula({"a": 3.0, "b": 0.2, "c": 0.05}, noise=0.05)
    train = in_sample(predictor.rows).train
    first, second = (fit(predictor, PARAMETERS, train, effort=QUICK) for _ in range(2))
    assert first.values == second.values
    with Workers(predictor, 2) as workers:
        third = fit(predictor, PARAMETERS, train, effort=QUICK, workers=workers)
    assert third.values == first.values
    assert third.evaluations == first.evaluations


def test_nothing_measured_is_no_fit() -> None:
    predictor = Formula(rows=(row(1, 1.0, None), row(2, None, 1.0)))
    with pytest.raises(MeasuredError, match="no measured cell is left to fit"):
        fit(predictor, PARAMETERS, np.zeros(2, dtype=bool))


def test_the_simulators_own_values_are_found_again() -> None:
    # Made with these values by the simulator itself: 2 modes x 3 batch sizes, TTFT and TPOT.
    truth = {f"{ORIN}.expert_overhead": 2e-3, f"{ORIN}.launch_overhead": 3e-4}
    blank = [row(n, transmission__mode=mode) for mode in ("sync", "async") for n in (1, 4, 16)]
    made = Predictor(raw_scenario(), blank).predict(truth)
    rows = [dataclasses.replace(r, ttft_s=t, tpot_s=p) for r, (t, p) in zip(blank, made.tolist(), strict=True)]
    parameters = [parameter(field, 1e-5, 1e-1) for field in truth]
    predictor = Predictor(raw_scenario(), rows)
    found = fit(predictor, parameters, in_sample(rows).train, effort=QUICK)
    assert found.values == pytest.approx(truth, rel=1e-3)


def test_the_default_parameters_are_fields_of_a_shipped_cluster() -> None:
    predictor = Predictor(raw_scenario(), [row(1)])
    parameters = default_parameters(predictor.device_types)
    predictor.check([p.field for p in parameters])
    as_specified = predictor.predict({})
    # Each moves some figure: at its dearer end TTFT or TPOT is larger than as specified.
    staging = {f"{ORIN}.staging.bandwidth": 20e9}
    for p in parameters:
        ends = [predictor.predict({**staging, p.field: end}) for end in (p.low, p.high)]
        inert = p.field.endswith(("transfer_overlap", "barrier_slowdown", "efficiency_exponent"))
        assert inert or np.max([end - as_specified for end in ends]) > 0


def test_a_rate_that_the_scenario_leaves_out_is_drawn_to_its_high_bound() -> None:
    free = (parameter("not there"), parameter("a", 0.5, 2.0, log=False))
    problem = Problem(predictor=Formula(rows=(row(1),)), free=free, train=np.ones(1, dtype=bool))
    assert problem.specified_N == pytest.approx([1.0, 1 / 3])  # a is 1: a third of the way from 0.5 to 2
