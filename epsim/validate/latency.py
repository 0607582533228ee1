"""Table S11: parameters of two Orins fitted to published TTFT and TPOT, and what held-out rows say, `latency_report`.

Everything is fitted (`epsim.calibrate`): four times with other training rows, and once for each number of images that
the unpublished workload may have. Plain values come out, for JSON, tables, figures and the document.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epsim.calibrate.calibration import text
from epsim.calibrate.fit import Effort, Fit, fit
from epsim.calibrate.holdout import Errors, Mask, Scheme, errors, hold_out, in_sample, naive_beside_seen
from epsim.calibrate.measured import Compare, Floats, MeasuredRow, measured_matrix, read_measured
from epsim.calibrate.parameters import Parameter, load_parameters
from epsim.calibrate.predict import Predictor
from epsim.calibrate.workers import Workers, default_processes
from epsim.scenario import load_raw
from epsim.validate.published import data_path

COMPARE = Compare(column="trace.method", value="baseline")
EFFORT = Effort(tolerance=1e-8)  # a long flat valley: with the default the search stops some steps early
DATA_NAME = "s11.csv"
PARAMETERS_NAME = "orin.parameters.yaml"
SCENARIO = Path("s11") / "orin-2x-olmoe.yaml"
IMAGES = (1, 2, 3)
ASSUMED_IMAGES = 2
# The four fits: key, title, what is held out.
STUDIES = (
    ("in_sample", "in sample", None),
    ("batches", "batches 2, 4, 16 from 1, 8, 32", "batch_size=2,4,16"),
    ("smoes", "SMoES from the baseline", "trace.method=attention-soft"),
    ("sqa_img", "SQA-IMG from MMMU", "trace.benchmark=SQA-IMG"),
)
_NO_INFLUENCE = 1e-9  # a derivative of the logarithm of a time, by a parameter's whole range: rounding gives 1e-12
Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is fitted: the raw scenario, the published rows as measurements, the parameters."""

    raw: dict[str, Any]
    rows: tuple[MeasuredRow, ...]
    parameters: tuple[Parameter, ...]

    def scheme(self, held_out: str | None) -> Scheme:
        """Return training and test rows of a study."""
        return in_sample(self.rows) if held_out is None else hold_out(self.rows, held_out)

    def with_images(self, num_images: int) -> "Case":
        """Return the case with another number of images in every MMMU request."""
        return dataclasses.replace(self, rows=tuple(_with_images(row, num_images) for row in self.rows))


def load_case(scenarios: Path) -> Case:
    """Return table S11 as a case; scenarios: the folder with `s11/orin-2x-olmoe.yaml`."""
    return Case(
        raw=load_raw(scenarios / SCENARIO),
        rows=read_measured(data_path(DATA_NAME)),
        parameters=load_parameters(data_path(PARAMETERS_NAME)),
    )


def fit_rows(case: Case, train: Mask) -> Fit:
    """Fit the training rows alone; what comes out predicts all rows.

    The values of the others are never seen. What was chosen beforehand with every row seen are the model's terms, the
    bounds, the images per request and the weights.
    """
    rows = tuple(row for row, known in zip(case.rows, train, strict=True) if known)
    with Workers(Predictor(case.raw, rows), default_processes()) as workers:
        every = np.ones(len(rows), dtype=bool)
        found = fit(workers.predictor, case.parameters, every, COMPARE, effort=EFFORT, workers=workers)
    if len(rows) == len(case.rows):
        return found
    return dataclasses.replace(found, predicted=Predictor(case.raw, case.rows).predict(found.values))


def run_studies(case: Case, advance: Advance = lambda text: None) -> dict[str, Fit]:
    """Return the fit of every study by key; advance: is told what comes next."""
    fits = {}
    for key, title, held_out in STUDIES:
        advance(f"fit: {title}")
        fits[key] = fit_rows(case, case.scheme(held_out).train)
    return fits


def latency_report(case: Case, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Return schemes with their errors beside the naive rule, and every cell, published and predicted."""
    studies = [
        scheme_report(case, key, title, held_out, fits[key].predicted)
        | {"values": dict(fits[key].values), "without_influence": without_influence(case, fits[key])}
        for key, title, held_out in STUDIES
    ]
    return {"studies": studies, "cells": cells(case, fits["in_sample"].predicted), "held_out": _held_out(case, fits)}


def without_influence(case: Case, fit: Fit) -> list[dict[str, str]]:
    """Return field and value of the parameters that no fitted row depends on at the fit: the ridge places them."""
    data_DN = fit.jacobian[: -len(case.parameters)]
    still_N = np.abs(data_DN).max(axis=0) < _NO_INFLUENCE
    return [
        {"field": parameter.field, "text": str(text(parameter, fit.values[parameter.field]))}
        for parameter, still in zip(case.parameters, still_N, strict=True)
        if still
    ]


def scheme_report(case: Case, key: str, title: str, held_out: str | None, predicted: Floats) -> dict[str, Any]:
    """Return the errors of predictions, s [rows, 2], on the test rows of a study, with and without the outlier."""
    scheme = case.scheme(held_out)
    known = naive_beside_seen(case.rows, scheme)
    return {
        "key": key,
        "title": title,
        "num_train": int(scheme.train.sum()),
        "num_test": int(scheme.test.sum()),
        "errors": _errors(case, scheme, predicted),
        "without_outlier": _errors(case, scheme, _hide_outlier(case, predicted)),
        "naive": _errors(case, scheme, known),
        "naive_without_outlier": _errors(case, scheme, _hide_outlier(case, known)),
    }


def images_report(case: Case, assumed: Floats, advance: Advance = lambda text: None) -> list[dict[str, Any]]:
    """Return the in-sample errors with 1, 2 and 3 images per MMMU request.

    assumed: the in-sample predictions of the assumed number, s [rows, 2].
    """
    found = []
    for num_images in IMAGES:
        other = case.with_images(num_images)
        predicted = assumed
        if num_images != ASSUMED_IMAGES:
            advance(f"fit: {num_images} images per MMMU request")
            predicted = fit_rows(other, other.scheme(None).train).predicted
        report = scheme_report(other, f"images_{num_images}", f"{num_images} images", None, predicted)
        found.append(
            {"images": num_images, "assumed": num_images == ASSUMED_IMAGES}
            | {key: report[key] for key in ("errors", "without_outlier")}
        )
    return found


def cells(case: Case, predicted: Floats) -> list[dict[str, Any]]:
    """Return one entry per row: benchmark, method, batch size, published and predicted seconds, error in percent."""
    return [
        {**_name(row), "outlier": is_outlier(row)}
        | {
            metric: {
                "published_s": float(published[m]),
                "predicted_s": float(values[m]),
                "error_percent": float(100 * (values[m] / published[m] - 1)),
            }
            for m, metric in enumerate(("ttft", "tpot"))
        }
        for row, published, values in zip(case.rows, measured_matrix(case.rows), predicted, strict=True)
    ]


def is_outlier(row: MeasuredRow) -> bool:
    """Whether the row's TTFT is the one that no published workload explains (SQA-IMG, batch 1)."""
    return row.batch_size == 1 and row.get("trace.benchmark") == "SQA-IMG"


def _errors(case: Case, scheme: Scheme, predicted: Floats) -> dict[str, Any]:
    found: Errors = errors(case.rows, predicted, scheme.test, COMPARE)
    return {
        "ttft_percent": _times_100(found.mean_abs_ttft),
        "tpot_percent": _times_100(found.mean_abs_tpot),
        "ttft_bias_percent": _times_100(found.bias_ttft),
        "tpot_bias_percent": _times_100(found.bias_tpot),
        "speedup_ttft_points": found.speedup_ttft_points,
        "speedup_tpot_points": found.speedup_tpot_points,
    }


def _times_100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _hide_outlier(case: Case, predicted: Floats) -> Floats:
    shown = predicted.copy()
    shown[[is_outlier(row) for row in case.rows], 0] = np.nan
    return shown


def _held_out(case: Case, fits: Mapping[str, Fit]) -> list[dict[str, Any]]:
    """Return the cells that each study predicts without having seen them."""
    return [
        {"key": key, "title": title, "cells": [cell for cell, there in zip(own, scheme.test, strict=True) if there]}
        for key, title, held_out in STUDIES
        if held_out is not None
        for scheme in [case.scheme(held_out)]
        for own in [cells(case, fits[key].predicted)]
    ]


def _name(row: MeasuredRow) -> dict[str, Any]:
    return {
        "benchmark": row.get("trace.benchmark"),
        "method": row.get("trace.method"),
        "batch_size": row.batch_size,
    }


def _with_images(row: MeasuredRow, num_images: int) -> MeasuredRow:
    if row.get("trace.benchmark") != "MMMU":
        return row
    settings: Sequence[tuple[str, Any]] = [
        (path, num_images if path == "trace.images" else value) for path, value in row.settings
    ]
    return dataclasses.replace(row, settings=tuple(settings))
