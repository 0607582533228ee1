"""A trace as a plain table for other tools: `export_parquet`, one row per token and layer.

Shapes: T tokens, L MoE layers, K top-k.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from epsim.atomic import whole_file, write_errors
from epsim.trace.meta import Modality, Phase, TraceMeta
from epsim.trace.routing import RoutingTrace, TraceSource

_TOKENS_PER_ROW_GROUP = 16384


def export_parquet(source: TraceSource, path: str | os.PathLike[str]) -> None:
    """Write `source` as Parquet (zstd), a row per token and layer; the file appears whole or not at all.

    Columns: request_id, position, step (int32), phase ("prefill", "decode"), modality ("text", "vision"),
    layer_id (int32, real id), expert_ids (list), and if the trace has them token_id (int32), gate_weights
    (list of float32), modality_score_<estimator> (float32). The metadata of the trace is under the key
    "epsim".
    """
    with whole_file(path) as part, write_errors(Path(path)):
        writer: pq.ParquetWriter | None = None
        try:
            for batch in source.batches():
                for start in range(0, batch.num_tokens, _TOKENS_PER_ROW_GROUP):
                    table = _table(batch.take(slice(start, start + _TOKENS_PER_ROW_GROUP)))
                    writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
                    writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _table(trace: RoutingTrace) -> pa.Table:
    meta = trace.meta

    def per_layer(values_T: NDArray[np.generic]) -> pa.Array:
        return pa.array(np.repeat(values_T, meta.num_layers))

    columns = {
        "request_id": per_layer(trace.request_id_T),
        "position": per_layer(trace.position_T),
        "step": per_layer(trace.step_T),
        "phase": _names(Phase).take(per_layer(trace.phase_T)),
        "modality": _names(Modality).take(per_layer(trace.modality_T)),
        "layer_id": pa.array(np.tile(np.array(meta.layer_ids, dtype=np.int32), trace.num_tokens)),
        "expert_ids": _lists(trace.topk_expert_ids_TLK, meta),
    }
    if trace.token_id_T is not None:
        columns["token_id"] = per_layer(trace.token_id_T)
    if trace.gate_weights_TLK is not None:
        columns["gate_weights"] = _lists(trace.gate_weights_TLK.astype(np.float32), meta)
    for name, scores_TL in trace.modality_scores.items():
        columns[f"modality_score_{name}"] = pa.array(scores_TL.astype(np.float32).reshape(-1))
    return pa.table(columns).replace_schema_metadata({"epsim": meta.to_json()})


def _names(codes: type[Phase] | type[Modality]) -> pa.Array:
    return pa.array([code.name.lower() for code in codes])


def _lists(values_TLK: NDArray[np.generic], meta: TraceMeta) -> pa.Array:
    offsets = np.arange(0, values_TLK.size + 1, meta.topk, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_TLK.reshape(-1)))
