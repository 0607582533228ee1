"""The files of a run: `write_run` puts results.json, steps.parquet, timeline.json into a folder; `write_csv` a table.

Each file appears whole or not at all, and only after all contents have been made.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from epsim.atomic import whole_file, write_errors
from epsim.metrics import StepRecord
from epsim.report.timeline import TimelineSlice, timeline


def to_json(content: Any) -> str:
    """Return JSON text; same content, same bytes."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_run(
    folder: Path,
    *,
    results: dict[str, Any],
    steps: Mapping[int, Sequence[StepRecord]],
    slices: Sequence[TimelineSlice],
    device_names: Sequence[str],
) -> list[Path]:
    """Write the files of a run and return their paths; no timeline.json where nothing was executed (closed form)."""
    contents: dict[str, bytes] = {"results.json": to_json(results).encode()}
    buffer = io.BytesIO()
    origin = results["trace"]["kind"]
    pq.write_table(steps_table(steps, device_names, origin), buffer)
    contents["steps.parquet"] = buffer.getvalue()
    if slices:
        contents["timeline.json"] = json.dumps(timeline(slices, device_names, origin), allow_nan=False).encode()
    paths = write_files(folder, contents)
    if not slices:
        (folder / "timeline.json").unlink(missing_ok=True)
    return paths


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write the contents, by name, into a folder, made if it is not there; return their paths."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in contents.items():
        path = folder / name
        with whole_file(path) as partial:
            partial.write_bytes(content)
        paths.append(path)
    return paths


def steps_table(steps: Mapping[int, Sequence[StepRecord]], device_names: Sequence[str], trace_origin: str) -> pa.Table:
    """Return one row per batch size, batch, step and device, with the seconds of each part."""
    columns: dict[str, list[Any]] = {}
    for batch_size, records in steps.items():
        for record in records:
            for r, device in enumerate(device_names):
                row = {
                    "batch_size": batch_size,
                    "batch": record.batch,
                    "phase": record.phase,
                    "step": record.step,
                    "device": device,
                    "num_tokens": record.num_tokens,
                    "start_s": record.start_s,
                    "duration_s": record.duration_s,
                    "kv_exposed_s": record.kv_exposed_s,
                    **{f"{part}_s": float(seconds_R[r]) for part, seconds_R in record.parts_s.items()},
                    "served_pairs": int(record.pairs_LR[:, r].sum()),
                    "trace_origin": trace_origin,
                }
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
    return pa.table(columns)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")
