"""What must hold in every trace, beyond shapes and dtypes: `check_trace`, one batch at a time.

Shapes: T rows of a batch, L MoE layers, K top-k, Q requests, N tokens of the whole trace.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from epsim.errors import TraceError
from epsim.trace.index import RequestTable
from epsim.trace.meta import Modality, Phase
from epsim.trace.routing import RoutingTrace, TraceSource

Rule = tuple[NDArray[np.bool_], Callable[[int], str]]  # rows [T] that break it; what to say of one


def check_trace(source: TraceSource) -> None:
    """Raise TraceError (one line: trace, first bad row, value, rule) unless every invariant of a trace holds.

    Rows are counted from 0 in file order. Memory: one batch, and a byte per token of the whole trace.
    """
    requests = source.requests
    if not len(requests):
        raise TraceError(f"{source.name}: it holds no tokens")
    seen_N = np.zeros(int(requests.num_tokens_Q.sum()), dtype=bool)
    first_row = 0
    for batch in source.batches():
        for bad_T, say in _rules(batch, requests, seen_N):
            if bad_T.any():
                t = int(np.argmax(bad_T))
                raise TraceError(f"{source.name}: row {first_row + t}: {say(t)}")
        first_row += batch.num_tokens


def _rules(batch: RoutingTrace, requests: RequestTable, seen_N: NDArray[np.bool_]) -> Iterator[Rule]:
    """Yield the rules lazily: each may rely on the ones before it."""
    yield from _code_rules(batch)
    yield from _position_rules(batch, requests, seen_N)
    yield from _expert_rules(batch)
    yield from _value_rules(batch)


def _code_rules(batch: RoutingTrace) -> Iterator[Rule]:
    phase_T, modality_T, step_T = batch.phase_T, batch.modality_T, batch.step_T
    yield phase_T > max(Phase), lambda t: f"phase {phase_T[t]} must be 0 (prefill) or 1 (decode)"
    yield modality_T > max(Modality), lambda t: f"modality {modality_T[t]} must be 0 (text) or 1 (vision)"
    decode_T = phase_T == Phase.DECODE
    yield ~decode_T & (step_T != 0), lambda t: f"step {step_T[t]} of a prefill row must be 0"
    yield decode_T & (step_T < 1), lambda t: f"step {step_T[t]} of a decode row must be 1 or more"
    yield decode_T & (modality_T != Modality.TEXT), lambda t: "a decode row must have modality 0 (text)"


def _position_rules(batch: RoutingTrace, requests: RequestTable, seen_N: NDArray[np.bool_]) -> Iterator[Rule]:
    """Yield the rules about positions; marks the batch in `seen_N` (request by request, by position).

    As a request has as many rows as positions, "inside the range" and "no repeat" together leave no gap.
    """
    q_T = np.searchsorted(requests.request_id_Q, batch.request_id_T)
    prefill_T = requests.num_prefill_tokens_Q[q_T]
    position_T, step_T, request_T = batch.position_T.astype(np.int64), batch.step_T, batch.request_id_T
    decode_T = batch.phase_T == Phase.DECODE
    yield prefill_T == 0, lambda t: f"request {request_T[t]} must have at least one prefill row"
    yield (
        ~decode_T & ((position_T < 0) | (position_T >= prefill_T)),
        lambda t: (
            f"position {position_T[t]} of a prefill row of request {request_T[t]} must be 0 to "
            f"{prefill_T[t] - 1}, as the request has {prefill_T[t]} prefill rows"
        ),
    )
    expected_T = prefill_T + step_T - 1
    yield (
        decode_T & (position_T != expected_T),
        lambda t: (
            f"position {position_T[t]} at decode step {step_T[t]} of request {request_T[t]} must be "
            f"{expected_T[t]}, prefill rows + step - 1"
        ),
    )
    yield (
        position_T >= requests.num_tokens_Q[q_T],
        lambda t: (
            f"position {position_T[t]} of request {request_T[t]} must be below "
            f"{requests.num_tokens_Q[q_T[t]]}, its number of rows: positions have no gaps"
        ),
    )
    token_T = (np.cumsum(requests.num_tokens_Q) - requests.num_tokens_Q)[q_T] + position_T
    yield (
        seen_N[token_T] | _repeats(token_T),
        lambda t: f"position {position_T[t]} of request {request_T[t]} must not come twice",
    )
    seen_N[token_T] = True


def _expert_rules(batch: RoutingTrace) -> Iterator[Rule]:
    ids_TLK, meta = batch.topk_expert_ids_TLK, batch.meta
    bad_TL = ids_TLK.max(axis=2) >= meta.num_experts
    yield (
        bad_TL.any(axis=1),
        lambda t: (
            f"expert id {ids_TLK[t].max()} in layer {meta.layer_ids[int(np.argmax(bad_TL[t]))]} must be "
            f"below {meta.num_experts}, the number of experts"
        ),
    )
    sorted_TLK = np.sort(ids_TLK, axis=2)
    repeated_TL = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(axis=2)
    yield (
        repeated_TL.any(axis=1),
        lambda t: (
            f"experts {ids_TLK[t, int(np.argmax(repeated_TL[t]))].tolist()} in layer "
            f"{meta.layer_ids[int(np.argmax(repeated_TL[t]))]} must be {meta.topk} different ones"
        ),
    )


def _value_rules(batch: RoutingTrace) -> Iterator[Rule]:
    weights_TLK = batch.gate_weights_TLK
    if weights_TLK is not None:
        bad_T = ~np.all(np.isfinite(weights_TLK) & (weights_TLK >= 0), axis=(1, 2))
        yield bad_T, lambda t: "gate weights must be finite and not negative"
    for name, scores_TL in batch.modality_scores.items():
        bad_T = ~np.all((scores_TL >= 0) & (scores_TL <= 1), axis=1)
        message = f"modality scores of {name!r} must be from 0 to 1"
        yield bad_T, lambda t, message=message: message  # type: ignore[misc]


def _repeats(values_T: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return bool [T]: whether the value stood in an earlier row already."""
    order_T = np.argsort(values_T, kind="stable")
    repeated_T = np.zeros(len(values_T), dtype=bool)
    repeated_T[order_T[1:]] = values_T[order_T[1:]] == values_T[order_T[:-1]]
    return repeated_T
