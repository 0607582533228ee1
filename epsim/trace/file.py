"""Routing traces on disk, as Arrow IPC files: `TraceFile` reads; `TraceWriter` and the others write.

An uncompressed file is memory-mapped and its arrays are views of the mapping; pages that were read are given
back to the operating system, so that a trace may be larger than memory. Shapes: T tokens, N selected rows.
"""

import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from epsim.errors import TraceError
from epsim.trace import schema as arrow
from epsim.trace.index import Ints, RequestIndex, RequestTable, build_index
from epsim.trace.meta import Modality, Phase, TraceMeta
from epsim.trace.parquet import export_parquet
from epsim.trace.routing import RequestIds, RoutingTrace, column_layout, replay_order
from epsim.trace.writer import TraceWriter, copy_trace, sample_trace

__all__ = ["TraceFile", "TraceWriter", "copy_trace", "export_parquet", "sample_trace"]

_MAGIC = b"ARROW1"
_INDEX_COLUMNS = ("request_id", "phase", "modality")
_CACHED_BATCHES = 4
_RESIDENT_BYTES = 32 * 2**20  # of the mapping, before its pages are given back


class _Batch(NamedTuple):
    """A record batch, the CRC-32 of each column (none in a foreign copy), and in the last one the tokens."""

    arrow: Any
    sums: dict[str, int]
    total: str


class TraceFile:
    """A routing trace in an Arrow IPC file; a `TraceSource`. Made by `TraceFile.open`.

    Opening reads the schema only; the request index is made when it is first asked for. When a column of a
    batch is first read, it is checked against its CRC-32, and expert ids against the number of experts.
    """

    def __init__(self, *, path: Path, buffer: mmap.mmap, reader: Any, meta: TraceMeta) -> None:
        self.path = path
        self.meta = meta
        self._buffer = buffer
        self._reader = reader
        self._cache: OrderedDict[int, _Batch] = OrderedDict()
        self._verified: set[tuple[int, str]] = set()
        self._touched_bytes = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TraceFile":
        """Return the trace in `path`; raises TraceError if it is missing, damaged or something else."""
        path = Path(path)
        buffer = _map(path)
        with _named(path):
            _check_magic(buffer)
            with _arrow_errors():
                reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(buffer)), options=_read_options())
                meta = arrow.check_schema(reader.schema)
            if not reader.num_record_batches:
                raise TraceError("it holds no tokens")
        return cls(path=path, buffer=buffer, reader=reader, meta=meta)

    @property
    def name(self) -> str:
        """The path, for messages."""
        return str(self.path)

    @property
    def num_tokens(self) -> int:
        """Rows, T."""
        return self._index[0].num_rows

    @property
    def requests(self) -> RequestTable:
        """The requests and their token counts, by ascending request id."""
        return self._index[0].requests

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the file."""
        return tuple(self._reader.schema.names)

    def batches(self) -> Iterator[RoutingTrace]:
        """Yield all rows in file order; the arrays are views of the file, or of one decompressed batch."""
        _, first_rows = self._index
        for i in range(len(first_rows) - 1):
            with _named(self.path):
                arrays = {name: self._column(i, name) for name in self.columns}
            yield self._trace(arrays)
            self._give_back()

    def select(self, request_ids: RequestIds) -> RoutingTrace:
        """Return a copy of the rows of these requests, ordered by (order given, step, position).

        Raises TraceError for a request id that the trace does not hold, or that is given twice.
        """
        index, _ = self._index
        with _named(self.path):
            rows, rank = index.locate(request_ids)
            order = self._gather(rows, ("step", "position"))
            rows = replay_order(rows, rank, order["step"], order["position"])
            return self._trace(self._gather(rows, self.columns))

    @cached_property
    def _index(self) -> tuple[RequestIndex, Ints]:
        """The request index, and int64 [batches + 1], the first row of each batch."""
        first_rows = [0]

        def keys() -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
            names = self._reader.schema.names
            options = _read_options(included_fields=sorted(names.index(name) for name in _INDEX_COLUMNS))
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._buffer)), options=options)
            for i in range(reader.num_record_batches):
                batch = _read_batch(reader, i)
                first_rows.append(first_rows[-1] + batch.arrow.num_rows)
                request_id, phase, modality = (self._verify(i, name, batch) for name in _INDEX_COLUMNS)
                yield request_id, phase, modality
                self._give_back()
            if batch.sums and set(batch.sums) != set(self.columns):
                raise TraceError("its columns are not those that were written; the file is damaged")
            if batch.sums and batch.total != str(first_rows[-1]):
                raise TraceError(f"its end is missing after {first_rows[-1]} tokens; the file is damaged")

        with _named(self.path):
            return build_index(keys()), np.array(first_rows, dtype=np.int64)

    def _gather(self, rows: Ints, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the values of these columns at `rows` (int64 [N]), by column: [N] or [N, list size]."""
        _, first_rows = self._index
        batch_N = np.searchsorted(first_rows, rows, side="right") - 1
        gathered: dict[str, NDArray[Any]] = {}
        for i in np.unique(batch_N) if len(rows) else [0]:
            here = np.flatnonzero(batch_N == i)
            for name in names:
                values = self._column(int(i), name)
                out = gathered.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))
                out[here] = values[rows[here] - first_rows[i]]
            self._give_back()
        return gathered

    def _column(self, i: int, name: str) -> NDArray[Any]:
        if i in self._cache:
            self._cache.move_to_end(i)
        else:
            self._cache[i] = _read_batch(self._reader, i)
        if len(self._cache) > _CACHED_BATCHES:
            self._cache.popitem(last=False)
        return self._verify(i, name, self._cache[i])

    def _verify(self, i: int, name: str, batch: _Batch) -> NDArray[Any]:
        """Return a column of batch `i`; raises TraceError if, when first read, it is found to be damaged."""
        values = arrow.to_numpy(batch.arrow.column(name))
        self._touched_bytes += values.nbytes
        if (i, name) not in self._verified:
            if batch.sums and arrow.checksum(values) != batch.sums.get(name):
                raise TraceError(f"record batch {i}, column {name}: the CRC-32 is wrong; the file is damaged")
            # Codes and ids index arrays in compiled code, which does not look: a value out of range never gets there.
            limit = {"expert_ids": self.meta.num_experts, "phase": len(Phase), "modality": len(Modality)}.get(name)
            if limit is not None and values.size and values.max() >= limit:
                raise TraceError(f"record batch {i}, column {name}: {values.max()} must be below {limit}")
            self._verified.add((i, name))
        return values

    def _trace(self, arrays: dict[str, NDArray[Any]]) -> RoutingTrace:
        num_rows = len(arrays["request_id"])
        fields: dict[str, Any] = {}
        for attribute, _, tail in column_layout(self.meta):
            if (values := arrays.get(arrow.column_name(attribute))) is not None:
                fields[attribute] = values.reshape(num_rows, *tail)
        scores = {name: arrays[arrow.SCORE_PREFIX + name] for name in arrow.estimators(self._reader.schema)}
        return RoutingTrace(meta=self.meta, **fields, modality_scores=scores)

    def _give_back(self) -> None:
        """Let the operating system take back the pages of the mapping; views stay valid."""
        if self._touched_bytes > _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._buffer.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise TraceError(f"{path}: the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_magic(buffer: mmap.mmap) -> None:
    if buffer[:4] == b"PAR1":
        raise TraceError("it is a Parquet file; a routing trace is an Arrow IPC file")
    if buffer[: len(_MAGIC)] != _MAGIC:
        raise TraceError("it is not an Arrow IPC file, so not a routing trace")
    if len(buffer) < 2 * len(_MAGIC) or buffer[-len(_MAGIC) :] != _MAGIC:
        raise TraceError("its end is missing; the file was cut off, copy or write it again")


def _read_batch(reader: Any, i: int) -> _Batch:
    """Return record batch `i`; raises TraceError unless it is sound and without nulls."""
    with _arrow_errors():
        batch, metadata = reader.get_batch_with_custom_metadata(i)
        batch.validate()
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            if column.null_count or flat.null_count:
                raise TraceError(f"record batch {i}, column {name}: there are nulls, and must be none")
        sums = json.loads((metadata or {}).get(arrow.CRC_KEY, b"{}"))
    if not isinstance(sums, dict):
        raise TraceError("the file is damaged (checksums)")
    return _Batch(batch, sums, (metadata or {}).get(arrow.TOTAL_KEY, b"unknown").decode(errors="replace"))


def _read_options(included_fields: list[int] | None = None) -> Any:
    return pa.ipc.IpcReadOptions(included_fields=included_fields or [], use_threads=False)


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise TraceError(f"the file is damaged ({reason})") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
