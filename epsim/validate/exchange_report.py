"""All of `epsim validate exchange` as plain values: `exchange_report`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from epsim import __version__
from epsim.validate.exchange_fit import Constants, fit_constants
from epsim.validate.exchange_study import NCCL_STUDIES, STUDIES, Cell, Study, row_load, run_studies

# What is wanted: the mean error of held-out rows, all kinds of operation together, at most so many percent.
TARGETS = (
    ("DeepEP low latency, hidden 7168, fitted to one node", ("low-latency",), 15.0),
    ("the same, fitted to two nodes", ("low-latency-network",), 15.0),
    ("DeepEP normal, hidden 7168", ("normal",), 15.0),
    ("NCCL on H100 and A100", ("nccl-h100", "nccl-a100"), 15.0),
)
_SIZES = ((0, 2**15, "below 32 KiB"), (2**15, 2**22, "32 KiB to 4 MiB"), (2**22, 2**62, "4 MiB and more"))
_TOKENS = ((0, 33, "1 to 32 tokens"), (33, 513, "48 to 512 tokens"), (513, 2**62, "1024 tokens and more"))


def exchange_report() -> dict[str, Any]:
    """Return targets, studies with constants and errors, and every cell. Errors: predicted / published - 1, percent."""
    cells, constants = run_studies()
    return {
        "epsim_version": __version__,
        "targets": targets(cells),
        "studies": [_study(study, [cell for cell in cells if cell.study == study.key], constants) for study in STUDIES],
        "nccl_fitted_to_all": nccl_fitted_to_all(cells),
        "cells": [describe(cell) for cell in cells],
    }


def nccl_fitted_to_all(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the errors of NCCL's rows with constants fitted to all rows of a study and kind, none held out."""
    found: list[float] = []
    for study in NCCL_STUDIES:
        for kind in study.kinds:
            rows = [cell.row for cell in cells if (cell.study, cell.row.kind) == (study.key, kind)]
            loads = [row_load(study, row) for row in rows]
            fitted = fit_constants(rows, loads)
            found += [fitted.predict_s(load) / row.time_s - 1 for row, load in zip(rows, loads, strict=True)]
    return errors(found)


def targets(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return each target with the figure that is reached."""
    found = []
    for text, studies, limit in TARGETS:
        held = [cell for cell in cells if cell.study in studies and not cell.fitted]
        figure = errors([cell.error for cell in held])["mean_percent"]
        found.append(
            {
                "text": text,
                "target_percent": limit,
                "num_rows": len(held),
                "figure_percent": figure,
                "met": bool(figure <= limit),
                "missed_by_points": max(0.0, figure - limit),
            }
        )
    return found


def errors(values: Sequence[float]) -> dict[str, Any]:
    """Return how many errors there are, the mean of their sizes, their mean, and the largest, percent; None of none."""
    if not values:
        return {"num_rows": 0, "mean_percent": None, "bias_percent": None, "worst_percent": None}
    percent = 100 * np.array(values)
    return {
        "num_rows": len(values),
        "mean_percent": float(np.abs(percent).mean()),
        "bias_percent": float(percent.mean()),
        "worst_percent": float(percent[np.abs(percent).argmax()]),
    }


def _study(study: Study, cells: Sequence[Cell], constants: Mapping[tuple[str, str], Constants]) -> dict[str, Any]:
    return {
        "key": study.key,
        "title": study.title,
        "fitted_to": study.fitted_to,
        "kinds": [_kind(study, kind, cells, constants[study.key, kind]) for kind in study.kinds],
        "all": errors([cell.error for cell in cells if not cell.fitted]),
        "groups": _groups(cells),
    }


def _kind(study: Study, kind: str, cells: Sequence[Cell], found: Constants) -> dict[str, Any]:
    own = [cell for cell in cells if cell.row.kind == kind]
    held = [cell for cell in own if not cell.fitted]
    with_notify = [cell.predicted_s / (cell.published_s + cell.row.notify_s) - 1 for cell in held]
    return {
        "kind": kind,
        "latency_us": 1e6 * found.latency_s,
        "share": found.nvlink_share if study.limit == "nvlink" else found.network_share,
        "share_of": study.limit,
        "fitted": errors([cell.error for cell in own if cell.fitted]),
        "held_out": errors([cell.error for cell in held]),
        "without_constants": errors([cell.bare_s / cell.published_s - 1 for cell in held]),
        "with_notify": errors(with_notify) if any(cell.row.notify_s for cell in held) else None,
    }


def _groups(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the errors of held-out rows by GPUs, SMs, size."""
    held = [cell for cell in cells if not cell.fitted]
    ways: list[Callable[[Cell], str]] = [lambda cell: f"{cell.row.num_ranks} GPUs"]
    if len({cell.row.num_sms for cell in held}) > 1:
        ways.append(lambda cell: f"{cell.row.num_ranks} GPUs, {cell.row.num_sms} SMs")
    if len({(cell.row.num_tokens, cell.row.num_bytes) for cell in held}) > 1:
        ways.append(_size)
    if len({(cell.row.hidden, cell.row.experts, cell.row.topk) for cell in held}) > 2:
        ways.append(lambda cell: f"hidden {cell.row.hidden}, {cell.row.experts} experts, top-{cell.row.topk}")
    ways.append(lambda cell: f"mostly {cell.limit}")
    found = []
    for way in ways:
        names = dict.fromkeys(way(cell) for cell in held)
        for name in names:
            own = [cell for cell in held if way(cell) == name]
            kinds = dict.fromkeys(cell.row.kind for cell in held)
            of_kind = {kind: errors([cell.error for cell in own if cell.row.kind == kind]) for kind in kinds}
            found.append({"group": name, "kinds": of_kind, "all": errors([cell.error for cell in own])})
    return found


def _size(cell: Cell) -> str:
    value, classes = (cell.row.num_bytes, _SIZES) if cell.row.num_bytes else (cell.row.num_tokens, _TOKENS)
    return next(name for low, high, name in classes if low <= value < high)


def describe(cell: Cell) -> dict[str, Any]:
    """Return a cell as plain values; None for what its row has not."""
    row = cell.row
    return {
        "study": cell.study,
        "kind": row.kind,
        "device": row.device,
        "gpus": row.num_ranks,
        "tokens": row.num_tokens or None,
        "hidden": row.hidden or None,
        "experts": row.experts or None,
        "topk": row.topk or None,
        "sms": row.num_sms or None,
        "dtype": row.dtype or None,
        "message_bytes": row.num_bytes or None,
        "published_us": 1e6 * cell.published_s,
        "notify_us": 1e6 * row.notify_s or None,
        "predicted_us": 1e6 * cell.predicted_s,
        "error_percent": 100 * cell.error,
        "fitted": cell.fitted,
        "mostly": cell.limit,
    }
