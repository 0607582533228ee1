"""Where the rows of each request are: `RequestTable` (how many of a kind) and `RequestIndex` (which rows).

Shapes: T rows, Q requests, N selected rows, X runs. A run is a stretch of neighbouring rows of one request. A
trace with contiguous requests has about as many runs as requests, however long it is; one with interleaved
decode steps has up to one per row, at 16 bytes each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epsim.errors import TraceError
from epsim.trace.meta import Modality, Phase

Int32s = NDArray[np.int32]
Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestTable:
    """Token counts of the requests in a trace, in ascending order of request id.

    Attributes:
        request_id_Q: int32 [Q], ascending.
        num_prefill_tokens_Q: int64 [Q], vision and text tokens of the prompt.
        num_vision_tokens_Q: int64 [Q], those of them that are vision tokens.
        num_decode_tokens_Q: int64 [Q], decode steps. The first output token comes from prefill, so a request
            with n output tokens has n - 1 of them.
    """

    request_id_Q: Int32s
    num_prefill_tokens_Q: Ints
    num_vision_tokens_Q: Ints
    num_decode_tokens_Q: Ints

    def __post_init__(self) -> None:
        shape = (len(self.request_id_Q),)
        for name in ("num_prefill_tokens_Q", "num_vision_tokens_Q", "num_decode_tokens_Q"):
            if getattr(self, name).shape != shape:
                raise TraceError(f"requests.{name}: shape {getattr(self, name).shape} must be {shape}")

    def __len__(self) -> int:
        return len(self.request_id_Q)

    @property
    def num_tokens_Q(self) -> Ints:
        """int64 [Q]: prefill and decode tokens."""
        return self.num_prefill_tokens_Q + self.num_decode_tokens_Q

    def find(self, request_ids: Sequence[int] | NDArray[np.integer]) -> Ints:
        """Return int64 [n], the places of `request_ids` in the table; TraceError for an unknown one."""
        wanted = np.asarray(request_ids, dtype=np.int64).reshape(-1)
        place = np.searchsorted(self.request_id_Q, wanted)
        known = place < len(self)
        known[known] = self.request_id_Q[place[known]] == wanted[known]
        if not known.all():
            held = f"{len(self)} requests"
            if len(self):
                held += f" with ids {self.request_id_Q[0]} to {self.request_id_Q[-1]}"
            raise TraceError(f"request {wanted[~known][0]} is not in the trace, which holds {held}")
        return place


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestIndex:
    """The runs of each request, ordered by request id and then by row.

    Attributes:
        requests: the table of requests.
        num_rows: rows indexed, T.
        first_run_Q: int64 [Q + 1]; request q has the runs first_run_Q[q] to first_run_Q[q + 1] - 1.
        run_start_X: int64 [X], first row of each run.
        run_length_X: int32 [X], rows in each run.
    """

    requests: RequestTable
    num_rows: int
    first_run_Q: Ints
    run_start_X: Ints
    run_length_X: Int32s

    def locate(self, request_ids: Sequence[int] | NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Return (rows, rank), int64 [N] each: all rows of the requests, and which request each is of.

        Requests come in the order given (rank 0, 1, …), the rows of each ascend. Raises TraceError for an
        unknown or a repeated request id.
        """
        place = self.requests.find(request_ids)
        if len(np.unique(place)) != len(place):
            raise TraceError("request ids to select must not repeat")
        runs = _ranges(self.first_run_Q[place], np.diff(self.first_run_Q)[place])
        rows = _ranges(self.run_start_X[runs], self.run_length_X[runs].astype(np.int64))
        return rows, np.repeat(np.arange(len(place)), self.requests.num_tokens_Q[place])


def build_index(batches: Iterable[tuple[Int32s, Codes, Codes]]) -> RequestIndex:
    """Return the index of rows that come as batches of (request_id_T, phase_T, modality_T), one at a time."""
    runs: list[tuple[Int32s, Ints, Int32s]] = [(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32))]
    counts = [np.empty((4, 0), dtype=np.int64)]
    num_rows = 0
    for request_id_T, phase_T, modality_T in batches:
        if len(request_id_T):
            runs.append(_runs(request_id_T, first_row=num_rows))
            counts.append(_counts(request_id_T, phase_T, modality_T))
            num_rows += len(request_id_T)
    request_X, start_X, length_X = (np.concatenate(column) for column in zip(*runs, strict=True))
    order_X = np.argsort(request_X, kind="stable")
    requests = _table(np.concatenate(counts, axis=1))
    first_run_Q = np.searchsorted(request_X[order_X], requests.request_id_Q)
    return RequestIndex(
        requests=requests,
        num_rows=num_rows,
        first_run_Q=np.append(first_run_Q, len(order_X)).astype(np.int64),
        run_start_X=start_X[order_X],
        run_length_X=length_X[order_X],
    )


def _runs(request_id_T: Int32s, *, first_row: int) -> tuple[Int32s, Ints, Int32s]:
    """Return the request id, first row and number of rows of each run, three [X]."""
    start_X = np.concatenate(([0], np.flatnonzero(np.diff(request_id_T)) + 1))
    length_X = np.diff(start_X, append=len(request_id_T)).astype(np.int32)
    return request_id_T[start_X], start_X + first_row, length_X


def _counts(request_id_T: Int32s, phase_T: Codes, modality_T: Codes) -> Ints:
    """Return int64 [4, requests of this batch]: id, prefill rows, prefill vision rows, decode rows."""
    ids, q_T = np.unique(request_id_T, return_inverse=True)
    prefill_T = phase_T != Phase.DECODE
    vision_T = prefill_T & (modality_T == Modality.VISION)
    return np.stack([ids, *(np.bincount(q_T[of_T], minlength=len(ids)) for of_T in (prefill_T, vision_T, ~prefill_T))])


def _table(counts: Ints) -> RequestTable:
    """Return the sums of the columns of `counts` (int64 [4, n], see `_counts`) that share a request id."""
    ids, q = np.unique(counts[0], return_inverse=True)
    sums = np.zeros((3, len(ids)), dtype=np.int64)
    for row, count in zip(sums, counts[1:], strict=True):
        np.add.at(row, q, count)
    return RequestTable(
        request_id_Q=ids.astype(np.int32),
        num_prefill_tokens_Q=sums[0],
        num_vision_tokens_Q=sums[1],
        num_decode_tokens_Q=sums[2],
    )


def _ranges(start_X: Ints, length_X: Ints) -> Ints:
    """Return start_X[0], start_X[0] + 1, … (length_X[0] of them), then the same for the next one, …"""
    begin_X = np.cumsum(length_X) - length_X
    return np.repeat(start_X - begin_X, length_X) + np.arange(length_X.sum())
