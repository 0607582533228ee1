"""Writing routing traces as Arrow IPC files: `TraceWriter`; `copy_trace` to compress one, `sample_trace` to cut it.

What is written is described in `epsim.trace.schema`.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from epsim.atomic import whole_file, write_errors
from epsim.errors import TraceError
from epsim.trace import schema as arrow
from epsim.trace.meta import TraceMeta
from epsim.trace.routing import RoutingTrace, TraceSource, concatenate, require_same_layout

Compression = Literal["zstd"] | None


class TraceWriter:
    """Writes a trace piece by piece; a context manager. The file appears when the block ends well.

    Args:
        path: the file to write; one that is there is replaced.
        meta: metadata, which every piece must have.
        compression: None (to be read by memory mapping) or "zstd" (to be shipped).
        batch_rows: rows in a record batch. The same rows give the same bytes, however they are cut.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: TraceMeta,
        *,
        compression: Compression = None,
        batch_rows: int = 65536,
    ) -> None:
        if batch_rows < 1:
            raise TraceError(f"batch_rows: {batch_rows} must be 1 or more")
        if compression not in (None, "zstd"):
            raise TraceError(f'compression: "{compression}" must be zstd or none')
        self.path = Path(path)
        self.meta = meta
        self._options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
        self._batch_rows = batch_rows
        self._stack = ExitStack()
        self._part: Path | None = None
        self._first: RoutingTrace | None = None
        self._writer: Any = None
        self._pending: list[RoutingTrace] = []
        self._num_pending = 0
        self._num_pending_bytes = 0
        self._num_written = 0

    def __enter__(self) -> Self:
        self._part = self._stack.enter_context(whole_file(self.path))
        return self

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of the rows that wait for a batch to be full, or for the end."""
        return self._num_pending_bytes

    def write(self, trace: RoutingTrace) -> None:
        """Append the rows of `trace`, whose arrays must not change until the block ends.

        Raises TraceError if its metadata is not the file's, or its columns are not those of the first piece.
        """
        if self._part is None:
            raise TraceError(f"{self.path}: write to it inside a with block")
        if trace.meta != self.meta:
            raise TraceError(f"{self.path}: the piece has the metadata {trace.meta.to_json()}, not the file's")
        if self._first is None:
            self._start(trace)
        else:
            require_same_layout(self._first, trace)
        self._pending.append(trace)
        self._num_pending += trace.num_tokens
        self._num_pending_bytes += trace.num_bytes
        if self._num_pending > self._batch_rows:
            self._flush(last=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if kind is None:
                self._flush(last=True)
                if not self._num_written:
                    raise TraceError(f"{self.path}: there are no tokens to write")
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        finally:
            self._part = None
        with write_errors(self.path):
            return bool(self._stack.__exit__(kind, error, trace))

    def _start(self, trace: RoutingTrace) -> None:
        self._first = trace.take(slice(0, 0))
        with write_errors(self.path):
            sink = self._stack.enter_context(pa.OSFile(str(self._part), "wb"))
        self._schema = arrow.arrow_schema(trace)
        self._writer = self._stack.enter_context(pa.ipc.new_file(sink, self._schema, options=self._options))

    def _flush(self, *, last: bool) -> None:
        """Write pending rows in whole batches; keep some for the last, which states the number of tokens."""
        if not self._pending:
            return
        rows = concatenate(self._pending)
        end = rows.num_tokens if last else (rows.num_tokens - 1) // self._batch_rows * self._batch_rows
        for start in range(0, end, self._batch_rows):
            piece = rows.take(slice(start, min(start + self._batch_rows, end)))
            batch, metadata = arrow.to_record_batch(piece, self._schema)
            self._num_written += piece.num_tokens
            if last and start + self._batch_rows >= end:
                metadata[arrow.TOTAL_KEY] = str(self._num_written)
            with write_errors(self.path):
                self._writer.write_batch(batch, custom_metadata=metadata)
        self._num_pending = rows.num_tokens - end
        self._pending = [rows.take(slice(end, None))] if self._num_pending else []
        self._num_pending_bytes = sum(part.num_bytes for part in self._pending)


def copy_trace(source: TraceSource, path: str | os.PathLike[str], compression: Compression = None) -> None:
    """Write `source` to `path`, compressed or not; the file appears whole or not at all."""
    with TraceWriter(path, source.meta, compression=compression) as writer:
        for batch in source.batches():
            writer.write(batch)


def sample_trace(
    source: TraceSource, path: str | os.PathLike[str], num_requests: int, compression: Compression = None
) -> int:
    """Write up to `num_requests` requests of `source`, evenly spaced over its request ids, and return how many.

    Raises TraceError unless `num_requests` is 1 or more.
    """
    if num_requests < 1:
        raise TraceError(f"--requests {num_requests}: must be 1 or more")
    ids = source.requests.request_id_Q
    kept = ids[np.unique(np.linspace(0, len(ids) - 1, min(num_requests, len(ids))).round().astype(int))]
    with TraceWriter(path, source.meta, compression=compression) as writer:
        for request_id in kept:
            writer.write(source.select([request_id]))
    return len(kept)
