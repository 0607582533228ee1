"""Traces one after the other in time: `followed_by`, a question whose trace goes on with others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from epsim.errors import TraceError
from epsim.lab.question import Question, one_request
from epsim.trace import RoutingTrace, TraceMeta, TraceShape, TraceSource
from epsim.trace.routing import concatenate
from epsim.traces import checked_trace

_ORIGINS = ("synthetic", "imported", "captured")  # the first that some part has is that of the whole


def followed_by(question: Question, paths: Sequence[Path]) -> Question:
    """Return the question with the requests of more trace files after those of its own, all numbered anew from 0.

    Raises InputError for a trace that does not fit the model of the question.
    """
    if not paths:
        return question
    parts, load_MLE = [question.trace], question.load_MLE.copy()
    for path in paths:
        spec = question.spec.trace.model_copy(update={"path": str(path)})
        trace, own_load_MLE = checked_trace(spec, question.model, one_request(question.spec))
        parts.append(trace)
        load_MLE += own_load_MLE
    return replace(question, trace=in_sequence(parts), load_MLE=load_MLE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequel(RoutingTrace):
    """Traces one after the other; title: their names."""

    title: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.title


def in_sequence(parts: Sequence[TraceSource]) -> Sequel:
    """Return the rows of all parts, part by part; requests keep their order and are numbered anew from 0.

    Only the columns that every trace has are kept. Raises TraceError for parts of different shapes.
    """
    meta = _meta(parts)
    rows, num_requests = [], 0
    for part in parts:
        if _shape(part) != _shape(parts[0]):
            raise TraceError(f"--then: {part.name} has other layers or experts than {parts[0].name}; name one like it")
        ids_Q = part.requests.request_id_Q
        own = part.select(ids_Q)
        number_T = num_requests + np.searchsorted(ids_Q, own.request_id_T)
        rows.append(
            replace(
                own,
                meta=meta,
                request_id_T=number_T.astype(np.int32),
                gate_weights_TLK=None,
                token_id_T=None,
                modality_scores={},
            )
        )
        num_requests += len(ids_Q)
    whole = concatenate(rows)
    columns: dict[str, Any] = dict(whole.columns())
    return Sequel(meta=meta, title=", then ".join(part.name for part in parts), **columns)


def _shape(part: TraceSource) -> TraceShape:
    meta = part.meta
    return TraceShape(layer_ids=meta.layer_ids, num_experts=meta.num_experts, topk=meta.topk)


def _meta(parts: Sequence[TraceSource]) -> TraceMeta:
    """Return the metadata of the whole: of the least real origin of its parts, and mock if one is."""
    return TraceMeta.of(
        _shape(parts[0]),
        model=", then ".join(dict.fromkeys(part.meta.model for part in parts)),
        origin=next(origin for origin in _ORIGINS if origin in {part.meta.origin for part in parts}),
        description="; then ".join(part.meta.words for part in parts),
        mock=any(part.meta.mock for part in parts),
    )
