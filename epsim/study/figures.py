"""The figures of docs/specialise.md: `draw_figures`, PNG bytes by name.

From the plain values of a study, and the traces and logs of the first seed that has them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epsim.errors import InputError
from epsim.report.evolution import Evolution, evolution_figure
from epsim.report.layer_plots import LayerLine, by_layer_figure
from epsim.report.routing_plots import draw_routing
from epsim.study.measure import NUM_DEVICES
from epsim.study.plan import StudyFolder
from epsim.study.summary import Estimate, Summary
from epsim.trace.file import TraceFile
from epsim.trace_stats import Spread, sample_request, trace_stats

ROUTING = ("soft", "attention")
FUSION = ("attention", "gaussian")  # methods, and the scores of these names
EVOLUTION = ("soft", "attention")
MRD = ("soft", "attention", "smar")
PREFIX = "specialise-"


def draw_figures(summary: Summary, folder: StudyFolder) -> dict[str, bytes]:
    """Return the PNG files by name, those for which the study has the methods."""
    methods = summary.methods
    files = {f"{PREFIX}msi-by-layer.png": _by_layer(summary, methods, "msi", "MSI of each MoE layer", "MSI", 1.02)}
    if shown := [method for method in MRD if method in methods]:
        files[f"{PREFIX}mrd-by-layer.png"] = _by_layer(
            summary, shown, "mrd_distance_smoothed_nats", "MRD distance of each MoE layer", "MRD distance, nats", None
        )
    if trained := [method for method in EVOLUTION if method in methods]:
        drawn = [_evolution(summary, folder, method) for method in trained]
        files[f"{PREFIX}evolution.png"] = evolution_figure(drawn)
    for method in methods:
        files |= _routing(summary, folder, method)
    return files


def _by_layer(summary: Summary, methods: Sequence[str], name: str, title: str, label: str, top: float | None) -> bytes:
    lines = []
    for method in methods:
        found: list[Estimate | None] = summary.layers(method, name)
        lines.append(
            LayerLine(
                label=method,
                values=[None if one is None else one.mean for one in found],
                errors=[None if one is None else one.standard_error for one in found],
            )
        )
    return by_layer_figure(lines, summary.runs(methods[0])[0]["layer_ids"], title=title, label=label, top=top)


def _evolution(summary: Summary, folder: StudyFolder, method: str) -> Evolution:
    run = summary.runs(method)[0]
    path = folder.run(run["seed"], method) / "experts.npz"
    stage_W, step_W, score_WLE = _read_experts(path)
    rows_W = stage_W == summary.study["stages"][method]
    if not rows_W.any():
        raise InputError(f"{path}: has nothing of stage {summary.study['stages'][method]}; train the run anew")
    return Evolution(title=method, step_W=step_W[rows_W], score_WLE=score_WLE[rows_W], layer_ids=run["layer_ids"])


def _read_experts(path: Path) -> tuple[Any, Any, Any]:
    """Return stage [W], step [W], score [W, L, E] of a run's log."""
    try:
        with np.load(path) as content:
            return content["stage"], content["step"], content["score_WLE"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read; train the run anew") from error


def _routing(summary: Summary, folder: StudyFolder, method: str) -> Mapping[str, bytes]:
    """Return the figures of a trace that the document shows."""
    wanted = {}
    if method in ROUTING:
        wanted["routing-distribution.png"] = f"{PREFIX}routing-{method}.png"
    if method in FUSION:
        wanted[f"modality-scores-{method}.png"] = f"{PREFIX}fusion-{method}.png"
    if not wanted:
        return {}
    trace = TraceFile.open(folder.trace(summary.runs(method)[0]["seed"], method))
    stats = trace_stats(trace, Spread(num_devices=NUM_DEVICES, placement="modality_bins"))
    drawn = draw_routing(stats, sample_request(trace))
    return {new: drawn[old] for old, new in wanted.items() if old in drawn}
