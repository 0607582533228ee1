"""The Arrow side of a trace: `arrow_schema`, `to_record_batch`, and `check_schema` for what a file claims.

Each attribute of `RoutingTrace` is one column; the wide ones are FixedSizeList. The metadata is JSON under
the key "epsim" of the schema. Shapes: T rows, L MoE layers, K top-k.
"""

import json
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from epsim.errors import TraceError
from epsim.trace.meta import TraceMeta
from epsim.trace.routing import RoutingTrace, column_layout

META_KEY = b"epsim"
CRC_KEY = b"crc32"
TOTAL_KEY = b"num_tokens"  # of the whole file; on the last record batch only
SCORE_PREFIX = "modality_score_"
OPTIONAL = ("token_id", "gate_weights")

_MEANING = {
    "request_id": "which request the token belongs to",
    "position": "place of the token in its request, from 0",
    "step": "0 = prefill, else the decode step 1, 2, ...",
    "phase": "0 = prefill, 1 = decode",
    "modality": "0 = text, 1 = vision",
    "token_id": "id in the model's vocabulary, -1 = none",
    "expert_ids": "logical experts, [layer, k] row-major",
    "gate_weights": "weights of the expert outputs, [layer, k] row-major",
}


def column_name(attribute: str) -> str:
    """Return the column of an attribute of RoutingTrace: topk_expert_ids_TLK is in expert_ids."""
    return attribute.rsplit("_", 1)[0].removeprefix("topk_")


def column_types(meta: TraceMeta) -> dict[str, pa.DataType]:
    """Return the type of every column but the modality scores."""
    types = {}
    for attribute, dtype, tail in column_layout(meta):
        types[column_name(attribute)] = _list_type(dtype, *tail) if tail else pa.from_numpy_dtype(dtype)
    return types


def score_type(meta: TraceMeta) -> pa.DataType:
    """Return the type of a modality-score column."""
    return _list_type(np.dtype(np.float16), meta.num_layers)


def arrow_schema(trace: RoutingTrace) -> pa.Schema:
    """Return the schema of a file that holds `trace`: its columns, what they mean, and its metadata."""
    types = column_types(trace.meta)
    fields = [
        pa.field(name, types[name], nullable=False, metadata={"meaning": _MEANING[name]})
        for name in map(column_name, trace.columns())
    ]
    fields += [
        pa.field(SCORE_PREFIX + estimator, score_type(trace.meta), nullable=False)
        for estimator in sorted(trace.modality_scores)
    ]
    return pa.schema(fields, metadata={META_KEY: trace.meta.to_json()})


def to_record_batch(trace: RoutingTrace, schema: pa.Schema) -> tuple[pa.RecordBatch, dict[bytes, str]]:
    """Return the rows as an Arrow batch, without copying, and for its metadata the CRC-32 of each column."""
    arrays = {column_name(name): array for name, array in trace.columns().items()}
    arrays |= {SCORE_PREFIX + name: array for name, array in trace.modality_scores.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    columns = [_to_arrow(arrays[field.name], field.type) for field in schema]
    sums = {name: checksum(array) for name, array in arrays.items()}
    return pa.RecordBatch.from_arrays(columns, schema=schema), {CRC_KEY: json.dumps(sums, sort_keys=True)}


def to_numpy(column: pa.Array) -> NDArray[Any]:
    """Return the values of a column as [T] or, for a list column, [T, list size], without copying."""
    if pa.types.is_fixed_size_list(column.type):
        values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
        return values.reshape(len(column), column.type.list_size)
    flat: NDArray[Any] = column.to_numpy(zero_copy_only=True)
    return flat


def checksum(array: NDArray[Any]) -> int:
    """Return the CRC-32 of the bytes of a contiguous array."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def check_schema(schema: pa.Schema) -> TraceMeta:
    """Return the metadata of a schema; raises TraceError (naming no file) unless it is that of a trace."""
    text = (schema.metadata or {}).get(META_KEY)
    if text is None:
        raise TraceError('it is an Arrow file without "epsim" metadata, so not a routing trace')
    meta = TraceMeta.from_json(text)
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise TraceError(f"the column {repeated[0]} comes twice")
    types = column_types(meta)
    if missing := sorted(set(types) - set(OPTIONAL) - set(schema.names)):
        raise TraceError(f"the column {missing[0]} is missing")
    for column in schema:
        expected = score_type(meta) if column.name.startswith(SCORE_PREFIX) else types.get(column.name)
        if expected is None:
            raise TraceError(f"the column {column.name} is not one of a trace; drop it")
        if not _same_type(column.type, expected):
            raise TraceError(f"the column {column.name} has type {column.type} but must have {expected}")
    return meta


def estimators(schema: pa.Schema) -> Iterable[str]:
    """Return the names of the estimators whose modality scores a file holds."""
    return [name.removeprefix(SCORE_PREFIX) for name in schema.names if name.startswith(SCORE_PREFIX)]


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(expected) and pa.types.is_fixed_size_list(found):
        return bool(found.list_size == expected.list_size and found.value_type == expected.value_type)
    return bool(found == expected)


def _list_type(dtype: np.dtype[Any], *sizes: int) -> pa.DataType:
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.list_(item, int(np.prod(sizes)))


def _to_arrow(array: NDArray[Any], arrow_type: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(arrow_type):
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), type=arrow_type)
    return pa.array(array)
