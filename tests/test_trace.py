"""Traces in memory: construction, requests, selection, and what `check_trace` refuses."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from epsim.errors import TraceError
from epsim.trace import RoutingTrace, TraceMeta, check_trace, concatenate

META = TraceMeta(
    model="toy",
    layer_ids=(1, 3),
    num_experts=4,
    topk=2,
    origin="captured",
    description="two requests by hand",
)


def captured() -> RoutingTrace:
    """Two requests as a capture writes them: the prefill of both, then their decode steps interleaved.

    Request 7: vision, vision, text, then 2 decode steps. Request 5: text, text, then 1 decode step. The rows:

        row       0  1  2  3  4 | 5  6 | 7
        request   7  7  7  5  5 | 7  5 | 7
        position  0  1  2  0  1 | 3  2 | 4
        step      0  0  0  0  0 | 1  1 | 2
    """
    position = np.array([0, 1, 2, 0, 1, 3, 2, 4], dtype=np.int32)
    first = np.arange(8) % 4
    ids = np.stack([np.stack([first, (first + 1) % 4], -1), np.stack([first, (first + 2) % 4], -1)], axis=1)
    return RoutingTrace(
        meta=META,
        request_id_T=np.array([7, 7, 7, 5, 5, 7, 5, 7], dtype=np.int32),
        position_T=position,
        step_T=np.array([0, 0, 0, 0, 0, 1, 1, 2], dtype=np.int32),
        phase_T=np.array([0, 0, 0, 0, 0, 1, 1, 1], dtype=np.uint8),
        modality_T=np.array([1, 1, 0, 0, 0, 0, 0, 0], dtype=np.uint8),
        topk_expert_ids_TLK=ids.astype(np.uint8),
        gate_weights_TLK=np.full((8, 2, 2), 0.5, dtype=np.float16),
        token_id_T=np.array([-1, -1, 11, 12, 13, 14, 15, 16], dtype=np.int32),
        modality_scores={"attention": np.full((8, 2), 0.25, dtype=np.float16)},
    )


def with_value(trace: RoutingTrace, name: str, place: Any, value: Any) -> RoutingTrace:
    array = getattr(trace, name).copy()
    array[place] = value
    return dataclasses.replace(trace, **{name: array})


def in_batches(trace: RoutingTrace, rows: int) -> Any:
    """The same trace as a source that yields a few rows at a time."""

    class Batched:
        name, meta, num_tokens, requests = "batched", trace.meta, trace.num_tokens, trace.requests

        def batches(self) -> Any:
            return (trace.take(slice(i, i + rows)) for i in range(0, trace.num_tokens, rows))

    return Batched()


def test_requests_are_counted_by_ascending_id() -> None:
    requests = captured().requests
    assert requests.request_id_Q.tolist() == [5, 7]
    assert requests.num_prefill_tokens_Q.tolist() == [2, 3]
    assert requests.num_vision_tokens_Q.tolist() == [0, 2]
    assert requests.num_decode_tokens_Q.tolist() == [1, 2]
    assert requests.num_tokens_Q.tolist() == [3, 5]
    assert len(requests) == 2


def test_select_orders_by_request_then_step_then_position() -> None:
    trace = captured()
    both = trace.select([7, 5])
    assert both.request_id_T.tolist() == [7] * 5 + [5] * 3
    assert both.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert both.token_id_T is not None
    assert both.token_id_T.tolist() == [-1, -1, 11, 14, 16, 12, 13, 15]
    # Rows 3, 4 and 6 of the trace are request 5: first experts 3, 0, 2.
    assert trace.select([5]).topk_expert_ids_TLK[:, 0, 0].tolist() == [3, 0, 2]


def test_select_orders_rows_that_come_in_any_order() -> None:
    trace = captured()
    shuffled = trace.take(np.random.default_rng(0).permutation(8))
    check_trace(shuffled)
    for name, array in shuffled.select([5, 7]).columns().items():
        np.testing.assert_array_equal(array, trace.select([5, 7]).columns()[name])


@pytest.mark.parametrize("request_ids", [[7, 6], [4], [9]])
def test_select_refuses_unknown_requests(request_ids: list[int]) -> None:
    with pytest.raises(TraceError, match=r"request \d is not in the trace, which holds 2 requests with ids 5 to 7"):
        captured().select(request_ids)


def test_select_refuses_repeats_and_selects_nothing() -> None:
    with pytest.raises(TraceError, match="repeat"):
        captured().select([7, 7])
    assert captured().select([]).num_tokens == 0


def test_arrays_are_read_only_and_the_callers_are_not() -> None:
    ids = captured().topk_expert_ids_TLK.copy()
    trace = dataclasses.replace(captured(), topk_expert_ids_TLK=ids)
    with pytest.raises(ValueError, match="read-only"):
        trace.topk_expert_ids_TLK[0, 0, 0] = 1
    ids[0, 0, 0] = 2  # still the caller's own


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("request_id_T", np.zeros(8), "request_id_T: float64 must be a NumPy array of int32"),
        ("step_T", np.zeros(7, np.int32), r"step_T: shape \(7,\) must be \(8,\)"),
        ("topk_expert_ids_TLK", np.zeros((8, 2, 2), np.int64), "topk_expert_ids_TLK: int64 must be .* uint8"),
        ("topk_expert_ids_TLK", np.zeros((8, 2, 3), np.uint8), r"shape \(8, 2, 3\) must be \(8, 2, 2\)"),
        ("gate_weights_TLK", np.zeros((8, 4), np.float16), r"gate_weights_TLK: shape \(8, 4\)"),
        ("token_id_T", [1] * 8, "token_id_T: list must be a NumPy array of int32"),
        ("modality_scores", {"a": np.zeros((8, 3), np.float16)}, r"modality_scores\['a'\]: shape \(8, 3\)"),
    ],
)
def test_construction_checks_shapes_and_dtypes(name: str, array: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(captured(), **{name: array})


def test_more_than_256_experts_need_uint16() -> None:
    assert dataclasses.replace(META, num_experts=256).expert_id_dtype == np.uint8
    assert dataclasses.replace(META, num_experts=257).expert_id_dtype == np.uint16


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "trace.num_experts: 0 must be an integer from 1 to 65536"),
        ("topk", 5, "trace.topk: 5 must be an integer from 1 to num_experts = 4"),
        ("topk", True, "trace.topk: True must be an integer"),
        ("layer_ids", (), "trace.layer_ids: .* non-empty"),
        ("layer_ids", (3, 1), "trace.layer_ids: .* ascend"),
        ("layer_ids", (-1, 1), "trace.layer_ids: .* integers >= 0"),
        ("origin", "made up", "trace.origin: 'made up' is not one of captured, imported, synthetic"),
        ("seed", 1.5, "trace.seed: 1.5 must be an integer or null"),
        ("mock", 1, "trace.mock: 1 must be true or false"),
        ("description", None, "trace.description: None must be text"),
    ],
)
def test_metadata_is_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(META, **{field: value})


def test_metadata_survives_json() -> None:
    assert TraceMeta.from_json(META.to_json()) == META
    newer = META.to_json().replace('"format_version": 1', '"format_version": 2')
    with pytest.raises(TraceError, match="format_version 2 is newer than 1"):
        TraceMeta.from_json(newer)
    with pytest.raises(TraceError, match="lacks or should not have the keys extra"):
        TraceMeta.from_json(META.to_json().replace("{", '{"extra": 1, '))
    with pytest.raises(TraceError, match="not a JSON object"):
        TraceMeta.from_json(b"\xff[]")


def test_concatenate_keeps_rows_and_columns() -> None:
    trace = captured()
    again = concatenate([trace.take(slice(0, 3)), trace.take(slice(3, 8))])
    for name, array in trace.columns().items():
        np.testing.assert_array_equal(again.columns()[name], array)
    assert again.modality_scores["attention"].shape == (8, 2)


def test_concatenate_refuses_parts_that_differ() -> None:
    trace = captured()
    with pytest.raises(TraceError, match="differ in columns"):
        concatenate([trace, dataclasses.replace(trace, token_id_T=None)])
    with pytest.raises(TraceError, match="differ in metadata"):
        concatenate([trace, dataclasses.replace(trace, meta=dataclasses.replace(META, model="other"))])
    with pytest.raises(TraceError, match="no trace parts"):
        concatenate([])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_good_trace_passes_in_any_batches(rows: int) -> None:
    check_trace(captured())
    check_trace(in_batches(captured(), rows))


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("phase_T", 4, 2, r"row 4: phase 2 must be 0 \(prefill\) or 1 \(decode\)"),
        ("modality_T", 1, 3, "row 1: modality 3 must be"),
        ("step_T", 2, 1, "row 2: step 1 of a prefill row must be 0"),
        ("step_T", 5, 0, "row 5: step 0 of a decode row must be 1 or more"),
        ("step_T", 7, -1, "row 7: step -1 of a decode row must be 1 or more"),
        ("modality_T", 6, 1, r"row 6: a decode row must have modality 0 \(text\)"),
        ("position_T", 2, 5, "row 2: position 5 of a prefill row of request 7 must be 0 to 2"),
        ("position_T", 0, -1, "row 0: position -1 of a prefill row of request 7 must be 0 to 2"),
        ("position_T", 2, 1, "row 2: position 1 of request 7 must not come twice"),
        ("position_T", 5, 4, "row 5: position 4 at decode step 1 of request 7 must be 3"),
        ("topk_expert_ids_TLK", (3, 1, 0), 4, "row 3: expert id 4 in layer 3 must be below 4"),
        ("topk_expert_ids_TLK", (6, 0), 1, r"row 6: experts \[1, 1\] in layer 1 must be 2 different ones"),
        ("gate_weights_TLK", (2, 1, 1), np.nan, "row 2: gate weights must be finite and not negative"),
        ("gate_weights_TLK", (2, 1, 1), np.inf, "row 2: gate weights"),
        ("gate_weights_TLK", (7, 0, 1), -0.5, "row 7: gate weights"),
    ],
)
def test_check_names_the_first_bad_row(name: str, place: Any, value: Any, message: str) -> None:
    with pytest.raises(TraceError, match="^trace: " + message) as caught:
        check_trace(with_value(captured(), name, place, value))
    assert "\n" not in str(caught.value)


def test_check_finds_a_gap_in_decode() -> None:
    # Steps 1 and 3 without 2: the last position is 5, though the request has 5 rows.
    bad = with_value(with_value(captured(), "step_T", 7, 3), "position_T", 7, 5)
    with pytest.raises(TraceError, match="row 7: position 5 of request 7 must be below 5, its number of rows"):
        check_trace(bad)


def test_check_finds_a_request_without_prefill() -> None:
    with pytest.raises(TraceError, match="row 1: request 5 must have at least one prefill row"):
        check_trace(captured().take(np.array([0, 6])))


def test_check_finds_modality_scores_out_of_range() -> None:
    scores = np.full((8, 2), 0.5, dtype=np.float16)
    scores[4, 1] = 1.5
    with pytest.raises(TraceError, match="row 4: modality scores of 'gaussian' must be from 0 to 1"):
        check_trace(dataclasses.replace(captured(), modality_scores={"gaussian": scores}))


def test_check_finds_repeats_across_batches_and_counts_rows_over_them() -> None:
    # Row 4 (request 5, position 1) becomes a second row of position 0; row 3 was the first.
    bad = with_value(captured(), "position_T", 4, 0)
    for rows in (1, 2, 4, 5):
        with pytest.raises(TraceError, match=r"^batched: row 4: position 0 of request 5 must not come twice"):
            check_trace(in_batches(bad, rows))


def test_check_refuses_an_empty_trace() -> None:
    with pytest.raises(TraceError, match="it holds no tokens"):
        check_trace(captured().take(slice(0, 0)))


def test_select_agrees_with_a_slow_reference() -> None:
    rng = np.random.default_rng(3)
    size = rng.integers(1, 6, size=20)
    request = np.repeat(rng.permutation(100)[:20], size).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in size]).astype(np.int32)
    order = rng.permutation(len(request))
    zeros = np.zeros(len(request), dtype=np.int32)
    trace = RoutingTrace(
        meta=META,
        request_id_T=request[order],
        position_T=position[order],
        step_T=zeros,
        phase_T=zeros.astype(np.uint8),
        modality_T=zeros.astype(np.uint8),
        topk_expert_ids_TLK=np.tile(np.array([0, 1], np.uint8), (len(request), 2, 1)),
        token_id_T=np.arange(len(request), dtype=np.int32),
    )
    wanted = rng.permutation(np.unique(request))[:7]
    rows = [
        int(np.flatnonzero((trace.request_id_T == q) & (trace.position_T == p))[0])
        for q in wanted
        for p in range(int((request == q).sum()))
    ]
    assert trace.select(wanted).token_id_T is not None
    assert trace.select(wanted).token_id_T.tolist() == rows  # type: ignore[union-attr]
