"""Simulated TTFT and TPOT of the routing in a trace, on layers of a full-size model: `simulated_times`.

Before there is a trace: `check_scenario`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epsim.run import simulate
from epsim.scenario import ScenarioSpec, load_scenario
from epsim.trace.file import TraceFile

BASELINE = "contiguous, sync"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    BASELINE: {"placement.policy": "contiguous", "transmission.mode": "sync"},
    "bins, sync": {"placement.policy": "modality_bins", "transmission.mode": "sync"},
    "bins, async": {"placement.policy": "modality_bins", "transmission.mode": "async"},
}
BATCH_SIZES = (1, 8, 32)


def simulated_times(scenario: Path, trace: Path) -> list[dict[str, Any]]:
    """Return setting, batch size, mean TTFT and TPOT (s; None where no request has a second token).

    Every batch size runs over all requests of the trace, batch after batch, but for those that fill none. The model has
    the layer shapes of the scenario's, and as many layers, experts and top-k as the trace.
    """
    source = TraceFile.open(trace)
    shape = _shape(trace, len(source.meta.layer_ids), source.meta.num_experts, source.meta.topk)
    sizes = [size for size in BATCH_SIZES if size <= len(source.requests)]
    return [
        _times(scenario, name, size, {**shape, **settings, **_batches(size, len(source.requests) // size)})
        for name, settings in SETTINGS.items()
        for size in sizes
    ]


def check_scenario(scenario: Path) -> None:
    """Raise ScenarioError, before there is a trace, for a file in which one cannot be put, or that is wrong itself."""
    for settings in SETTINGS.values():
        _spec(scenario, {**_shape(Path("any.arrow"), 1, 2, 1), **settings, **_batches(1, 1)})


def _times(scenario: Path, name: str, batch_size: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = simulate(_spec(scenario, changes)).results["batch_sizes"]
    tpot = found["tpot_s"]
    return {
        "setting": name,
        "batch_size": batch_size,
        "ttft_s": found["ttft_s"]["mean"],
        "tpot_s": None if tpot is None else tpot["mean"],
    }


def _shape(trace: Path, num_layers: int, num_experts: int, topk: int) -> dict[str, Any]:
    return {
        "model.num_layers": num_layers,
        "model.moe.num_experts": num_experts,
        "model.moe.topk": topk,
        "trace.path": str(trace),
    }


def _batches(batch_size: int, num_batches: int) -> dict[str, Any]:
    return {"workload.batch_sizes": [batch_size], "workload.num_batches": num_batches}


def _spec(scenario: Path, changes: Mapping[str, Any]) -> ScenarioSpec:
    return load_scenario(scenario, [f"{path}={json.dumps(value)}" for path, value in changes.items()])
