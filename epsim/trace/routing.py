"""A routing trace in memory: `RoutingTrace`, and `TraceSource`, what it and a trace file have in common.

Shapes: T tokens (rows), L MoE layers, K top-k. A row is a token in a forward pass; rows come in any order.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from epsim.errors import TraceError
from epsim.trace.index import Ints, RequestIndex, RequestTable, build_index
from epsim.trace.meta import ExpertIds, TraceMeta

__all__ = ["RequestTable", "RoutingTrace", "TraceSource", "concatenate"]

RequestIds = Sequence[int] | NDArray[np.integer]


class TraceSource(Protocol):
    """A trace to read from, in memory or on disk."""

    @property
    def name(self) -> str:
        """What to call it in messages: the path of a file, "trace" in memory."""

    @property
    def meta(self) -> TraceMeta:
        """Where it comes from and which layers it covers."""

    @property
    def num_tokens(self) -> int:
        """Rows, T."""

    @property
    def requests(self) -> RequestTable:
        """The requests and their token counts, by ascending request id."""

    def select(self, request_ids: RequestIds) -> "RoutingTrace":
        """Return the rows of these requests, ordered by (order given, step, position)."""

    def batches(self) -> "Iterator[RoutingTrace]":
        """Yield all rows in their order, a bounded number at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Tokens and the experts they were routed to.

    Construction checks shapes and dtypes; `epsim.trace.check.check_trace` checks what the values mean.

    Attributes:
        meta: where the trace comes from and which layers it covers.
        request_id_T: int32 [T].
        position_T: int32 [T], place in the request: prompt from 0, then generated tokens.
        step_T: int32 [T], 0 for prefill, else the decode step 1, 2, …
        phase_T: uint8 [T], a `Phase`.
        modality_T: uint8 [T], a `Modality`.
        topk_expert_ids_TLK: uint8 (uint16 above 256 experts) [T, L, K], logical experts.
        gate_weights_TLK: float16 [T, L, K] as the model multiplies expert outputs by, or None.
        token_id_T: int32 [T] ids in the model's vocabulary, -1 where a token has none, or None.
        modality_scores: for each estimator of the soft modality score, float16 [T, L]: 1 text, 0 vision.
    """

    meta: TraceMeta
    request_id_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    step_T: NDArray[np.int32]
    phase_T: NDArray[np.uint8]
    modality_T: NDArray[np.uint8]
    topk_expert_ids_TLK: ExpertIds
    gate_weights_TLK: NDArray[np.float16] | None = None
    token_id_T: NDArray[np.int32] | None = None
    modality_scores: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_tokens = len(self.request_id_T)
        for name, dtype, tail in column_layout(self.meta):
            array = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, _checked(name, array, dtype, (num_tokens, *tail)))
        scores = {
            name: _checked(
                f"modality_scores[{name!r}]", array, np.dtype(np.float16), (num_tokens, self.meta.num_layers)
            )
            for name, array in self.modality_scores.items()
        }
        object.__setattr__(self, "modality_scores", scores)

    @property
    def name(self) -> str:
        """What messages call a trace in memory."""
        return "trace"

    @property
    def num_tokens(self) -> int:
        """Rows, T."""
        return len(self.request_id_T)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self.columns().values(), *self.modality_scores.values()))

    @property
    def requests(self) -> RequestTable:
        """The requests and their token counts, by ascending request id."""
        return self._index.requests

    def select(self, request_ids: RequestIds) -> "RoutingTrace":
        """Return the rows of these requests, ordered by (order given, step, position).

        Raises TraceError for a request id that the trace does not hold, or that is given twice.
        """
        rows, rank = self._index.locate(request_ids)
        return self.take(replay_order(rows, rank, self.step_T[rows], self.position_T[rows]))

    def batches(self) -> "Iterator[RoutingTrace]":
        """Yield this trace."""
        yield self

    def take(self, rows: Ints | slice) -> "RoutingTrace":
        """Return these rows in this order (a view if `rows` is a slice)."""
        columns: dict[str, Any] = {name: array[rows] for name, array in self.columns().items()}
        scores = {name: array[rows] for name, array in self.modality_scores.items()}
        return dataclasses.replace(self, **columns, modality_scores=scores)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are there, by attribute name, without the modality scores."""
        arrays = {name: getattr(self, name) for name, _, _ in column_layout(self.meta)}
        return {name: array for name, array in arrays.items() if array is not None}

    @cached_property
    def _index(self) -> RequestIndex:
        return build_index([(self.request_id_T, self.phase_T, self.modality_T)])


def column_layout(meta: TraceMeta) -> tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]:
    """Return (attribute of RoutingTrace, dtype, shape after T) of every column but the modality scores."""
    int32, uint8, wide = np.dtype(np.int32), np.dtype(np.uint8), (meta.num_layers, meta.topk)
    return (
        ("request_id_T", int32, ()),
        ("position_T", int32, ()),
        ("step_T", int32, ()),
        ("phase_T", uint8, ()),
        ("modality_T", uint8, ()),
        ("token_id_T", int32, ()),
        ("topk_expert_ids_TLK", meta.expert_id_dtype, wide),
        ("gate_weights_TLK", np.dtype(np.float16), wide),
    )


def concatenate(parts: Sequence[RoutingTrace]) -> RoutingTrace:
    """Return the rows of all parts, in order. The parts must share the metadata and have the same columns."""
    if not parts:
        raise TraceError("there are no trace parts to concatenate")
    first = parts[0]
    for part in parts[1:]:
        require_same_layout(first, part)
    if len(parts) == 1:
        return first
    columns: dict[str, Any] = {
        name: np.concatenate([part.columns()[name] for part in parts]) for name in first.columns()
    }
    scores = {name: np.concatenate([part.modality_scores[name] for part in parts]) for name in first.modality_scores}
    return dataclasses.replace(first, **columns, modality_scores=scores)


def require_same_layout(first: RoutingTrace, other: RoutingTrace) -> None:
    """Raise TraceError unless both have the same metadata, columns and modality scores."""
    if other.meta != first.meta:
        raise TraceError(f"trace parts differ in metadata: {first.meta.to_json()} and {other.meta.to_json()}")
    names = [sorted((*part.columns(), *part.modality_scores)) for part in (first, other)]
    if names[0] != names[1]:
        raise TraceError(f"trace parts differ in columns: {', '.join(names[0])} and {', '.join(names[1])}")


def replay_order(rows: Ints, rank: Ints, step: NDArray[np.integer], position: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return `rows` ordered by (rank, step, position); all four are [N]."""
    later = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    tied = ~later
    for key in (rank, step, position):
        difference = np.diff(key)
        later |= tied & (difference > 0)
        tied &= difference == 0
    return rows if later.all() else rows[np.lexsort((position, step, rank))]


def _checked(name: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = getattr(array, "dtype", type(array).__name__)
        raise TraceError(f"{name}: {found} must be a NumPy array of {dtype}")
    if array.shape != shape:
        raise TraceError(f"{name}: shape {array.shape} must be {shape}")
    view = array.view()
    view.flags.writeable = False
    return view
