"""Predictions beside measured runs: `measured_report`, as plain values.

A prediction comes from the scenario and the micro-benchmarks of the folder alone. A measured figure is the mean over
launches of each launch's median over runs. Noise is how far a launch is from the mean of the others of its cell; the
floor is what the mean of the launches is off by on that account, and so a prediction without any fault.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.batch import step_inputs
from epsim.cluster import build_cluster
from epsim.cost.profile import read_profile
from epsim.errors import InputError
from epsim.measured.device_profile import with_device_profile
from epsim.measured.folder import DEVICE_FILE, CellRuns, MeasuredRuns
from epsim.measured.grid import Cell
from epsim.measured.network_profile import with_overrides
from epsim.metrics import RequestRecord
from epsim.run import assemble, simulate
from epsim.scenario import ScenarioSpec
from epsim.validate.measured_parts import experts_ratio

METRICS = ("ttft_s", "tpot_s")
PHASES = ("prefill", "decode")
CLEAR_GAIN_PERCENT = 5.0  # gains beyond it should have the right sign
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of a cell, s: its mean, and that of each launch."""

    mean: float
    launches: Floats

    @property
    def noise_percent(self) -> float | None:
        """Return by how much a launch differs from the mean of the others, on average; None for a single one."""
        n = len(self.launches)
        if n < 2:
            return None
        others = (self.launches.sum() - self.launches) / (n - 1)
        return float(100 * np.abs(self.launches / others - 1).mean())

    @property
    def floor_percent(self) -> float | None:
        """Return what a faultless prediction would be off by: noise is s sqrt(n / (n - 1)), of a mean s / sqrt(n)."""
        n, noise = len(self.launches), self.noise_percent
        return None if noise is None else noise * math.sqrt(n - 1) / n


def predicted_spec(runs: MeasuredRuns, cell: Cell, device_profile: Path, *, dry_run: bool = True) -> ScenarioSpec:
    """Return the scenario of a cell with everything that the micro-benchmarks say; of devices, if these compute.

    dry_run: what a received message takes is that of the engine run dry, not the posting of its receive alone.
    """
    cluster, profile = build_cluster(cell.spec.cluster.model_dump()), runs.network_of(cell)
    if dry_run:
        overrides = profile.overrides(cell.spec, cluster)
    else:
        overrides = profile.terms(cell.spec, cluster, profile.post_receive_s)
    spec = with_overrides(cell.spec, overrides)
    return spec if runs.options["emulated"] else with_device_profile(spec, device_profile)


def _requests(cell: Cell) -> list[npt.NDArray[np.int64]]:
    """Return which requests of the batch get a token in each step."""
    deployment, workload = assemble(cell.spec), cell.spec.workload
    ids = deployment.trace.requests.request_id_Q[: workload.batch_sizes[0]]
    return [given.request_Q for given in step_inputs(deployment, ids, workload.max_output_tokens)]


def measured_figures(requests: Sequence[npt.NDArray[np.int64]], runs: CellRuns) -> dict[str, Measured | None]:
    """Return TTFT and TPOT, means over requests; None where nothing is decoded."""
    by_launch: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for step_s, kv_s in zip(runs.step_s, runs.kv_s, strict=True):
        of_runs: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for steps, waited_s in zip(step_s, kv_s, strict=True):
            records = _records(requests, steps, float(waited_s))
            of_runs["ttft_s"].append(float(np.mean([record.ttft_s for record in records])))
            tpots = [record.tpot_s for record in records if record.tpot_s is not None]
            if tpots:
                of_runs["tpot_s"].append(float(np.mean(tpots)))
        for metric, values in of_runs.items():
            if values:
                by_launch[metric].append(float(np.median(values)))
    return {
        metric: Measured(mean=float(np.mean(values)), launches=np.array(values)) if values else None
        for metric, values in by_launch.items()
    }


def _records(requests: Sequence[npt.NDArray[np.int64]], step_s: Floats, kv_s: float) -> list[RequestRecord]:
    ends_s = np.cumsum(step_s)
    ends_s[1:] += kv_s
    times: dict[int, list[float]] = {int(q): [] for q in requests[0]}
    for request_Q, end_s in zip(requests, ends_s, strict=True):
        for q in request_Q:
            times[int(q)].append(float(end_s))
    return [RequestRecord(request_id=q, arrival_s=0.0, token_times_s=tuple(seen)) for q, seen in times.items()]


def measured_report(folder: Path, device_profile: Path | None = None) -> dict[str, Any]:
    """Return cells, errors and gains of a folder of measured runs, as plain values.

    device_profile: to predict real runs from, in place of the one that was kept with them.
    """
    runs, device = MeasuredRuns.read(folder), device_profile or folder / DEVICE_FILE
    if not runs.launches:
        raise InputError(f"{runs.path}: holds no complete launch; go on with epsim measure run ... --resume")
    if device_profile is not None:
        if runs.options["emulated"]:
            raise InputError(f"--device-profile: is for real runs, and those of {folder} are emulated; leave it out")
        read_profile(device_profile)
    cells = []
    for number, cell in enumerate(runs.cells):
        predicted = predicted_spec(runs, cell, device)
        posted = predicted_spec(runs, cell, device, dry_run=False)
        row = _cell(runs, cell, runs.runs_of(number), predicted, posted)
        row["experts_ratio"] = experts_ratio(runs, number, predicted)
        cells.append(row)
    return {
        "scenario": runs.scenario["name"],
        "machine": runs.machine,
        "options": runs.options,
        "axes": runs.axes,
        "num_launches": len(runs.launches),
        "networks": [_network(runs, network) for network in _first_cells(runs)],
        "cells": cells,
        "experts_ratio": {phase: _mean_of(cell["experts_ratio"][phase] for cell in cells) for phase in PHASES},
        "errors": {metric: _errors(cells, metric) for metric in METRICS},
        "gains": {metric: list(_gains(cells, runs.axes, metric)) for metric in METRICS},
        "gain_errors": {metric: _gain_errors(list(_gains(cells, runs.axes, metric))) for metric in METRICS},
    }


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _first_cells(runs: MeasuredRuns) -> list[Cell]:
    """Return a cell of each network."""
    found = {id(runs.network_of(cell).raw): cell for cell in reversed(runs.cells)}
    return list(found.values())[::-1]


def _network(runs: MeasuredRuns, cell: Cell) -> dict[str, Any]:
    """Return what the micro-benchmarks of a cell's network say."""
    profile, cluster = runs.network_of(cell), build_cluster(cell.spec.cluster.model_dump())
    return {
        "links": [f"{link.name or link.source + '-' + link.target}" for link in cell.spec.cluster.links],
        "fits": [vars(fit) for fit in profile.fits(cluster)],
        "send_overhead_s": profile.send_overhead_s,
        "receive_overhead_s": profile.receive_overheads_s(cell.spec, cluster),
        "post_receive_s": profile.post_receive_s,
        "background_bytes_per_s": profile.background_bytes_per_s,
        "barrier_s": profile.raw["barrier"]["s"],
        "set": {path: str(value) for path, value in profile.overrides(cell.spec, cluster).items()},
    }


def _cell(
    runs: MeasuredRuns, cell: Cell, own: CellRuns, predicted_by: ScenarioSpec, posted_by: ScenarioSpec
) -> dict[str, Any]:
    """Return a cell's figures. predicted_by, posted_by: `predicted_spec` with and without the dry run."""
    requests = _requests(cell)
    if own.step_s[0].shape[1] != len(requests):
        raise InputError(
            f"{runs.path}: cell {cell.label} has runs of {own.step_s[0].shape[1]} steps, and its scenario takes "
            f"{len(requests)}; measure it again"
        )
    measured = measured_figures(requests, own)
    summary, posted = (simulate(spec).results["batch_sizes"][0] for spec in (predicted_by, posted_by))
    row: dict[str, Any] = {
        "label": cell.label,
        "settings": dict(cell.settings),
        "num_repeated": own.num_repeated,
        "num_disturbed": own.num_disturbed,
    }
    for metric in METRICS:
        found, predicted = measured[metric], summary[metric]
        if found is None or predicted is None:
            row[metric] = None
            continue
        row[metric] = {
            "measured": found.mean,
            "low": float(found.launches.min()),
            "high": float(found.launches.max()),
            "noise_percent": found.noise_percent,
            "floor_percent": found.floor_percent,
            "predicted": predicted["mean"],
            "error_percent": 100 * (predicted["mean"] / found.mean - 1),
            "error_without_dry_run_percent": 100 * (posted[metric]["mean"] / found.mean - 1),
        }
    return row


def _errors(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    errors = np.array([cell[metric]["error_percent"] for cell in cells if cell[metric]])
    if not len(errors):
        return None
    without = np.array([cell[metric]["error_without_dry_run_percent"] for cell in cells if cell[metric]])
    noises, floors = ([c[metric][key] for c in cells if c[metric]] for key in ("noise_percent", "floor_percent"))
    return {
        "num_cells": len(errors),
        "mean_percent": float(np.abs(errors).mean()),
        "max_percent": float(np.abs(errors).max()),
        "bias_percent": float(errors.mean()),
        "without_dry_run_percent": float(np.abs(without).mean()),
        "noise_percent": None if None in noises else float(np.mean(noises)),
        "floor_percent": None if None in floors else float(np.mean(floors)),
    }


def _gains(cells: Sequence[Mapping[str, Any]], axes: Mapping[str, list[Any]], metric: str) -> Iterator[dict[str, Any]]:
    """Yield, for each axis and pair of its values, the change of otherwise equal cells, measured and predicted."""
    for path in axes:
        for first, second in itertools.combinations(cells, 2):
            differing = [p for p in first["settings"] if first["settings"][p] != second["settings"][p]]
            if differing != [path] or not first[metric] or not second[metric]:
                continue
            measured, predicted = (
                100 * (second[metric][source] / first[metric][source] - 1) for source in ("measured", "predicted")
            )
            yield {
                "axis": path,
                "from": first["label"],
                "to": str(second["settings"][path]),
                "measured_percent": measured,
                "predicted_percent": predicted,
                "error_points": predicted - measured,
            }


def _gain_errors(gains: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the errors of the gains by axis, and of all."""
    rows = []
    for path in [*dict.fromkeys(gain["axis"] for gain in gains), None]:
        own = [gain for gain in gains if path in (None, gain["axis"])]
        clear = [gain for gain in own if abs(gain["measured_percent"]) > CLEAR_GAIN_PERCENT]
        right = [gain for gain in clear if gain["measured_percent"] * gain["predicted_percent"] > 0]
        if own:
            rows.append(
                {
                    "axis": path,
                    "num_gains": len(own),
                    "mean_error_points": float(np.mean([abs(gain["error_points"]) for gain in own])),
                    "max_error_points": float(np.max([abs(gain["error_points"]) for gain in own])),
                    "num_clear": len(clear),
                    "num_right_sign": len(right),
                }
            )
    return rows
