"""`trace_stats`: all that `epsim trace stats` says of a trace, as plain values; `sample_request`, scores for a figure.

Formulas: docs/metrics.md. Letters: P phase (prefill, decode), M modality (text, vision), L MoE layers, E experts,
R devices, T tokens, Q requests.
"""

from typing import Any

import numpy as np

from epsim.errors import InputError
from epsim.metrics import balancedness
from epsim.placement import HomePlan, Placement
from epsim.trace import Modality, Phase, TraceSource
from epsim.trace import specialization as spec
from epsim.trace.routing_counts import NUM_SCORE_BINS, RoutingCounts, count_routing
from epsim.trace_stats.layers import KINDS, by_kind, by_phase, layer_measures, layer_stats, number, one_sided_experts
from epsim.trace_stats.spread import FITTED, Served, Spread, serve

DEFAULT_BINS = 8  # SMoES figure 6


def trace_stats(source: TraceSource, spread: Spread | None = None, *, num_bins: int | None = None) -> dict[str, Any]:
    """Read the trace twice, first for counts, then for what crosses between devices, and return all of it.

    num_bins: equal bins of the experts of a layer by text bias; None: 8, or the next smaller divisor of the experts.
    What needs a modality, gate weights or scores that are not there is None. Raises TraceError, PlacementError or
    InputError, each one line.
    """
    spread = spread or Spread()
    num_bins = _num_bins(source.meta.num_experts, num_bins)
    counts = count_routing(source)
    placement, homes = spread.place(source, counts.load_MLE)
    served = serve(source, placement, homes)
    return {
        "trace": _about(source, counts),
        "parameters": _parameters(spread, placement, homes, num_bins),
        "transfer_ratio": served.transfers.ratios(),
        "overall": _overall(counts, served),
        "layers": layer_stats(source, counts, served, num_bins),
    }


def sample_request(source: TraceSource) -> dict[str, Any] | None:
    """Return the scores of the prompt of the first request with both modalities, else of the first; None without any.

    request_id; is_vision: bool [T] as a list; scores: by estimator, [T][L]. Tokens by position.
    """
    table = source.requests
    vision_Q, prefill_Q = table.num_vision_tokens_Q, table.num_prefill_tokens_Q
    both_Q = (vision_Q > 0) & (vision_Q < prefill_Q)
    request_id = int(table.request_id_Q[np.argmax(both_Q)])
    rows = source.select([request_id])
    if not rows.modality_scores:
        return None
    prompt_T = rows.phase_T == Phase.PREFILL
    return {
        "request_id": request_id,
        "is_vision": (rows.modality_T[prompt_T] == Modality.VISION).tolist(),
        "scores": {
            name: scores_TL[prompt_T].astype(np.float64).tolist() for name, scores_TL in rows.modality_scores.items()
        },
    }


def _num_bins(num_experts: int, asked: int | None) -> int:
    if asked is None:
        return max(n for n in range(1, DEFAULT_BINS + 1) if num_experts % n == 0)
    if asked < 1 or num_experts % asked:
        near = max(n for n in range(1, max(asked, 1) + 1) if num_experts % n == 0)
        raise InputError(f"bins: {asked} does not divide {num_experts} experts; use a divisor, e.g. {near}")
    return asked


def _about(source: TraceSource, counts: RoutingCounts) -> dict[str, Any]:
    meta = source.meta
    return {
        "name": source.name,
        "kind": meta.kind,
        "origin": meta.origin,
        "mock": meta.mock,
        "description": meta.words,
        "model": meta.model,
        "layer_ids": list(meta.layer_ids),
        "num_experts": meta.num_experts,
        "topk": meta.topk,
        "num_requests": len(source.requests),
        "num_tokens": {name: int(counts.num_tokens_PM[kind]) for name, kind in KINDS.items()},
        "has_both_modalities": bool(counts.num_tokens_PM.sum(axis=0).all()),
        "has_gate_weights": counts.gate_mass_MLE is not None,
        "num_weightless_visits": counts.num_weightless_visits,
        "estimators": sorted(counts.scores),
    }


def _parameters(spread: Spread, placement: Placement, homes: HomePlan, num_bins: int) -> dict[str, Any]:
    return {
        "num_devices": spread.num_devices,
        "placement": spread.placement,
        "placement_fitted_to_this_trace": placement.policy in FITTED,
        "homes": spread.homes,
        "homes_fitted_to_this_trace": spread.homes == "by_modality",
        "prefill_devices": homes.prefill_devices.tolist(),
        "decode_devices": homes.decode_devices.tolist(),
        "seed": spread.seed if spread.placement == "random" else None,
        "num_bins": num_bins,
        "num_score_bins": NUM_SCORE_BINS,
        "kl_smoothing": spec.KL_SMOOTHING,
    }


def _overall(counts: RoutingCounts, served: Served) -> dict[str, Any]:
    """Return means over layers, and balancedness in both forms of docs/metrics.md."""
    scores = {
        name: {modality.name.lower(): number(own.mean_ML[modality].mean()) for modality in Modality}
        for name, own in counts.scores.items()
    }
    loads, one_sided = by_kind(counts.load_PMLE), one_sided_experts(counts)
    devices = {name: pairs_LR[:, served.serving_R] for name, pairs_LR in by_phase(served.pairs_PLR).items()}
    return {
        **{name: number(values_L.mean()) for name, values_L in layer_measures(counts).items()},
        "num_one_sided_experts": None if one_sided is None else int(one_sided.sum()),
        "num_idle_experts": int((counts.load_MLE.sum(axis=0) == 0).sum()),
        "expert_balancedness": {name: balancedness([load_LE]) for name, load_LE in loads.items()},
        "device_balancedness": {name: balancedness([pairs_LR]) for name, pairs_LR in devices.items()},
        "mean_modality_score": scores,
        "score_correlation": {
            " and ".join(pair): number(_mean_known(own_L)) for pair, own_L in counts.correlation_L.items()
        },
    }


def _mean_known(values_L: spec.Floats) -> float:
    known = values_L[~np.isnan(values_L)]
    return float(known.mean()) if known.size else float("nan")
