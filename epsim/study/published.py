"""The paper's transfer ratios and times, as changes against its baseline: `transfer_changes`, `time_changes`.

Changes are fractions, -0.2 for a fifth less.
"""

import csv
import io
from typing import Any

from epsim.metrics import TRANSFER_COLUMNS
from epsim.trace.published import BENCHMARKS, transfer_ratios
from epsim.validate.published import data_text

WAYS = ("without_dedup", "with_dedup")
Cell = tuple[str, str]  # a way and a column of `TRANSFER_COLUMNS`


def table_s10(benchmark: str, method: str) -> dict[Cell, float]:
    """Return a row of table S10, fractions."""
    row = transfer_ratios(benchmark, method)
    found: dict[Cell, float] = {}
    for way, (vision, text, decode), both in (
        (WAYS[0], row.pairs_frac, row.pairs_vt_frac),
        (WAYS[1], row.tokens_frac, row.tokens_vt_frac),
    ):
        found |= {
            (way, name): value for name, value in zip(TRANSFER_COLUMNS, (vision, text, both, decode), strict=True)
        }
    return found


def transfer_changes(method: str) -> dict[Cell, list[float]]:
    """Return the changes of a method's ratios against the baseline's, one for each benchmark."""
    rows = [(table_s10(benchmark, "baseline"), table_s10(benchmark, method)) for benchmark in BENCHMARKS]
    return {cell: [new[cell] / old[cell] - 1 for old, new in rows] for cell in rows[0][0]}


def time_changes(batch_size: int, metric: str) -> dict[str, float]:
    """Return the change of `ttft_s` or `tpot_s` in table S11 (attention-soft), by benchmark."""
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(data_text("s11.csv"))))
    times = {
        (row["trace.benchmark"], row["trace.method"]): float(row[metric])
        for row in rows
        if int(row["batch_size"]) == batch_size
    }
    benchmarks = dict.fromkeys(benchmark for benchmark, _ in times)
    return {name: times[name, "attention-soft"] / times[name, "baseline"] - 1 for name in benchmarks}
