"""Simulated TTFT and TPOT of the routing in a trace, on layers of a full-size model: `simulated_times`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epsim.run import simulate
from epsim.scenario import load_scenario
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
    shape = {
        "model.num_layers": len(source.meta.layer_ids),
        "model.moe.num_experts": source.meta.num_experts,
        "model.moe.topk": source.meta.topk,
        "trace.path": str(trace),
    }
    sizes = [size for size in BATCH_SIZES if size <= len(source.requests)]
    return [
        _times(scenario, name, size, {**shape, **settings, "workload.num_batches": len(source.requests) // size})
        for name, settings in SETTINGS.items()
        for size in sizes
    ]


def _times(scenario: Path, name: str, batch_size: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**changes, "workload.batch_sizes": [batch_size]}
    spec = load_scenario(scenario, [f"{path}={json.dumps(value)}" for path, value in changed.items()])
    (found,) = simulate(spec).results["batch_sizes"]
    tpot = found["tpot_s"]
    return {
        "setting": name,
        "batch_size": batch_size,
        "ttft_s": found["ttft_s"]["mean"],
        "tpot_s": None if tpot is None else tpot["mean"],
    }
