"""Refitted intervals of a whole calibration: they belong to the fit that is returned, or determine nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from epsim.calibrate import calibration
from epsim.calibrate.calibration import Calibration, Question, calibrate
from epsim.calibrate.determine import Profile, linearised
from epsim.calibrate.fit import Effort, Fit
from epsim.calibrate.holdout import Scheme
from epsim.calibrate.measured import Floats, MeasuredError, MeasuredRow
from epsim.calibrate.parameters import Parameter
from epsim.calibrate.workers import Workers

NOISE = np.array([0.01, -0.02, 0.02, -0.01, 0.005, -0.005])
FROM_THE_SCENARIO = Effort(num_screened=0, num_short=1, short_steps=4, num_long=1, long_steps=10)
PARAMETER = Parameter(field="a", low=0.0, high=8.0, log=False, reason="a test")


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """log TTFT = 1, and 0.1 for each stair of `a` below `top`: a search stays on the stair on which it starts."""

    rows: tuple[MeasuredRow, ...]
    top: int

    def check(self, fields: Sequence[str]) -> None:
        assert fields == ["a"]

    def specified(self, field: str) -> float:
        return 0.5

    def rounded(self, field: str, value: float) -> float:
        return value

    def predict(self, values: Mapping[str, float]) -> Floats:
        below = max(self.top - int(values.get("a", 0.5)), 0)
        return np.full((len(self.rows), 2), np.exp(1 + 0.1 * below))


def calibrated(top: int, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> tuple[Calibration, list[Fit]]:
    """Calibrate with walks that come upon the next stair, below the top; return the fits that were walked too."""
    walked = []

    def walk(fit: Fit, workers: Workers) -> Profile:
        walked.append(fit)
        a = fit.values["a"]
        return Profile(intervals=linearised(fit), better={"a": a + 1} if a < top else None)

    monkeypatch.setattr(calibration, "profile", walk)
    rows = tuple(
        MeasuredRow(settings=(), batch_size=1 + i, ttft_s=s, tpot_s=None) for i, s in enumerate(np.exp(1 + NOISE))
    )
    predictor: Any = Stairs(rows=rows, top=top)
    asked = {"hold_outs": {}, "profiled": True, **asked}
    question = Question(parameters=(PARAMETER,), effort=FROM_THE_SCENARIO, **asked)
    return calibrate(predictor, question, Workers(predictor)), walked


def test_intervals_are_of_the_better_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found, walked = calibrated(2, monkeypatch)
    assert [int(fit.values["a"]) for fit in walked] == [0, 1, 2]
    assert found.fit is walked[-1]
    assert found.intervals == linearised(found.fit)
    assert found.predicted["in sample"].seconds[:, 0] == pytest.approx(np.full(6, np.e))


def test_intervals_say_that_the_minimum_was_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found, walked = calibrated(5, monkeypatch)
    assert [int(fit.values["a"]) for fit in walked] == [0, 1, 2]
    assert found.fit is walked[-1]
    (interval,) = found.intervals
    assert interval.why == "not converged: a better fit was found on the way"
    assert not interval.determined


def test_a_scheme_without_a_time_is_refused_before_any_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_fit", lambda *arguments: pytest.fail("fitted"))
    every = np.ones(6, dtype=bool)
    nothing_left = Scheme(name="all of them", train=~every, test=every)
    with pytest.raises(MeasuredError, match="all of them: leaves no measured cell to fit"):
        calibrated(1, monkeypatch, hold_outs={"all": [nothing_left]})
