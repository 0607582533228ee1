"""Traces as a capture leaves them, made up: `captured_like`, drawn with a leaning by modality, and `by_hand`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from epsim.trace import RoutingTrace, TraceMeta

ESTIMATORS = ("attention", "gaussian")


def by_hand(
    tokens: Sequence[tuple[str, Sequence[int], Sequence[float]]], *, num_experts: int = 4, **changes: Any
) -> RoutingTrace:
    """Return one request in one layer (id 5): a (kind, experts, gate weights) for each token, prompt first.

    Kinds: V vision, T text, D decode.
    """
    kinds = [kind for kind, _, _ in tokens]
    phase = np.array([kind == "D" for kind in kinds], np.uint8)
    meta = TraceMeta(
        model="toy", layer_ids=(5,), num_experts=num_experts, topk=len(tokens[0][1]), origin="captured",
        description="by hand",
    )  # fmt: skip
    trace = RoutingTrace(
        meta=meta,
        request_id_T=np.zeros(len(tokens), np.int32),
        position_T=np.arange(len(tokens), dtype=np.int32),
        step_T=np.cumsum(phase, dtype=np.int32) * phase.astype(np.int32),
        phase_T=phase,
        modality_T=np.array([kind == "V" for kind in kinds], np.uint8),
        topk_expert_ids_TLK=np.array([[experts] for _, experts, _ in tokens], np.uint8),
        gate_weights_TLK=np.array([[weights] for _, _, weights in tokens], np.float16),
    )
    return dataclasses.replace(trace, **changes)


def captured_like(
    *,
    layer_ids: Sequence[int] = (1, 2, 4),
    num_experts: int = 12,
    topk: int = 3,
    num_requests: int = 5,
    lengths: tuple[int, int, int] = (7, 5, 3),
    mock: bool = True,
    seed: int = 0,
) -> RoutingTrace:
    """Return requests of (vision, text, decode) tokens with gate weights and two scores, rows in a random order."""
    rng = np.random.default_rng(seed)
    num_vision, num_text, num_decode = lengths
    own = num_vision + num_text + num_decode
    position = np.tile(np.arange(own), num_requests)
    step = np.maximum(position - num_vision - num_text + 1, 0)
    vision = position < num_vision
    shape = (len(position), len(layer_ids))
    leaning = rng.normal(size=(len(layer_ids), num_experts))
    logits = rng.normal(size=(*shape, num_experts)) + np.where(vision, -1, 1)[:, None, None] * leaning
    ids = np.argsort(-logits, axis=2)[:, :, :topk]
    weights = np.exp(np.take_along_axis(logits, ids, 2))  # as a router that does not normalise: eq. 5 has work to do
    scores = 1 / (1 + np.exp(-np.where(vision, -2, 2)[:, None] - rng.normal(size=(2, *shape))))
    trace = RoutingTrace(
        meta=TraceMeta(
            model="toy", layer_ids=tuple(layer_ids), num_experts=num_experts, topk=topk, origin="captured",
            description="made up", mock=mock,
        ),
        request_id_T=np.repeat(np.arange(num_requests), own).astype(np.int32) + 3,
        position_T=position.astype(np.int32),
        step_T=step.astype(np.int32),
        phase_T=(step > 0).astype(np.uint8),
        modality_T=vision.astype(np.uint8),
        topk_expert_ids_TLK=ids.astype(np.uint8),
        gate_weights_TLK=weights.astype(np.float16),
        modality_scores={name: own.astype(np.float16) for name, own in zip(ESTIMATORS, scores, strict=True)},
    )  # fmt: skip
    return trace.take(rng.permutation(trace.num_tokens))
