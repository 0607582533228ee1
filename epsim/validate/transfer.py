"""Table S10: simulated transfer ratios beside the published ones, `transfer_report`.

The synthetic traces are drawn so that a token's remote experts follow the table; what is tested is all that lies
between a trace and a ratio: placement by the trace's own loads, homes, and counting. Ratios do not depend on any
device figure.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epsim.batch import step_inputs
from epsim.metrics import TransferCounts
from epsim.run import assemble
from epsim.scenario import load_scenario
from epsim.trace.published import BENCHMARKS, METHODS, transfer_ratios

COLUMNS = ("P_V", "P_T", "P_V+T", "D_T")
BATCH_SIZE = 32
_NOT_DRAWN = (COLUMNS.index("P_V+T"), len(COLUMNS) + COLUMNS.index("P_V+T"))  # follow from the token mix


def transfer_report(scenarios: Path, benchmarks: Iterable[str] = BENCHMARKS) -> dict[str, Any]:
    """Return 3 rows per benchmark of 8 ratios, percent, simulated (batch 32) and published, and their errors in points.

    scenarios: the folder with `s10/BENCHMARK-METHOD.yaml`.
    """
    rows = [_row(scenarios, benchmark, method) for benchmark in benchmarks for method in METHODS]
    errors = [abs(a - b) for row in rows for a, b in zip(row["simulated"], row["published"], strict=True)]
    mixed = [abs(row["simulated"][at] - row["published"][at]) for row in rows for at in _NOT_DRAWN]
    return {
        "columns": [f"{column}, {way}" for way in ("pairs", "tokens") for column in COLUMNS],
        "rows": rows,
        "batch_size": BATCH_SIZE,
        "num_cells": len(errors),
        "mean_error_points": sum(errors) / len(errors),
        "max_error_points": max(errors),
        "mean_mixed_error_points": sum(mixed) / len(mixed),
    }


def _row(scenarios: Path, benchmark: str, method: str) -> dict[str, Any]:
    ratio = _simulated_ratio(scenarios / "s10" / f"{benchmark.lower()}-{method}.yaml")
    known = transfer_ratios(benchmark, method)
    published = [
        share
        for (vision, text, decode), both in (
            (known.pairs_frac, known.pairs_vt_frac),
            (known.tokens_frac, known.tokens_vt_frac),
        )
        for share in (vision, text, both, decode)
    ]
    return {
        "benchmark": benchmark,
        "method": method,
        "published": [100 * share for share in published],
        "simulated": [100 * share for way in ("without_dedup", "with_dedup") for share in ratio[way].values()],
    }


def _simulated_ratio(path: Path) -> dict[str, dict[str, float]]:
    """Count what the steps of a batch route; no engine need run, since times do not change routing."""
    spec = load_scenario(path, [f"workload.batch_sizes=[{BATCH_SIZE}]"])
    deployment, counts = assemble(spec), TransferCounts()
    request_ids = deployment.trace.requests.request_id_Q[:BATCH_SIZE]
    for step in step_inputs(deployment, request_ids, spec.workload.max_output_tokens):
        counts.add(step.phase, step.counts_M4)
    return {way: {name: share or 0.0 for name, share in own.items()} for way, own in counts.ratios().items()}
