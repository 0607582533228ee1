"""The figures of each MoE layer as plain values: `layer_stats`, `layer_measures`, and how arrays become JSON values.

Letters: P phase (prefill, decode), M modality (text, vision), L MoE layers, E experts, R devices, B expert bins.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.placement.policies import text_bias
from epsim.trace import Modality, Phase, TraceSource
from epsim.trace import specialization as spec
from epsim.trace.routing_counts import RoutingCounts
from epsim.trace_stats.spread import PHASES, Served

Counts = npt.NDArray[np.int64]
KINDS = {
    "prefill_vision": (Phase.PREFILL, Modality.VISION),
    "prefill_text": (Phase.PREFILL, Modality.TEXT),
    "decode_text": (Phase.DECODE, Modality.TEXT),
}


def layer_measures(counts: RoutingCounts) -> dict[str, spec.Floats]:
    """Return the measures of each layer, [L]; NaN where a modality or gate weights are missing."""
    load_MLE, mrd_MLE = counts.load_MLE, modality_routing(counts)
    share_MLE = spec.load_distribution(load_MLE)
    text_LE, vision_LE = np.full(share_MLE.shape, np.nan) if mrd_MLE is None else mrd_MLE
    return {
        "msi": spec.specialization_index(load_MLE),
        "jensen_shannon_bits": spec.jensen_shannon(share_MLE[spec.TEXT], share_MLE[spec.VISION]),
        "mrd_distance_nats": spec.symmetric_kl(vision_LE, text_LE),
        "mrd_distance_smoothed_nats": spec.symmetric_kl(spec.smoothed(vision_LE), spec.smoothed(text_LE)),
    }


def modality_routing(counts: RoutingCounts) -> spec.Floats | None:
    """Return the MRD of each modality [M, L, E], None without gate weights."""
    if counts.gate_mass_MLE is None:
        return None
    return spec.modality_routing_distribution(counts.load_MLE, counts.gate_mass_MLE)


def one_sided_experts(counts: RoutingCounts) -> Counts | None:
    """Return how many experts of each layer have mass in one modality's MRD alone, [L]; None without both."""
    mrd_MLE = modality_routing(counts)
    if mrd_MLE is None or np.isnan(mrd_MLE).any():
        return None
    return np.asarray(((mrd_MLE > 0).sum(axis=0) == 1).sum(axis=1))


def layer_stats(source: TraceSource, counts: RoutingCounts, served: Served, num_bins: int) -> list[dict[str, Any]]:
    """Return a mapping for each MoE layer, in the order of the trace (docs/trace-stats.md)."""
    parts = (_measured(counts), _loads(counts, served), _specialised(counts, num_bins), _scored(counts))
    return [
        {"layer_id": layer_id, **measured, **loads, **specialised, **scored}
        for layer_id, measured, loads, specialised, scored in zip(source.meta.layer_ids, *parts, strict=True)
    ]


def _measured(counts: RoutingCounts) -> list[dict[str, Any]]:
    measures, is_idle_LE = layer_measures(counts), counts.load_MLE.sum(axis=0) == 0
    one_sided = one_sided_experts(counts)
    return [
        {
            **{name: number(values_L[at]) for name, values_L in measures.items()},
            "num_one_sided_experts": None if one_sided is None else int(one_sided[at]),
            "num_idle_experts": int(is_idle_E.sum()),
        }
        for at, is_idle_E in enumerate(is_idle_LE)
    ]


def _loads(counts: RoutingCounts, served: Served) -> list[dict[str, Any]]:
    experts, devices = by_kind(counts.load_PMLE), by_phase(served.pairs_PLR)
    return [
        {
            "expert_balancedness": {name: _mean_over_max(load_LE[at]) for name, load_LE in experts.items()},
            "device_balancedness": {
                name: _mean_over_max(pairs_LR[at, served.serving_R]) for name, pairs_LR in devices.items()
            },
            "expert_load": {name: load_LE[at].tolist() for name, load_LE in experts.items()},
            "device_load": {name: pairs_LR[at].tolist() for name, pairs_LR in devices.items()},
            "remote_pairs_frac": {
                name: _share(served.remote_PL[phase, at], served.pairs_PLR[phase, at].sum())
                for name, phase in PHASES.items()
            },
        }
        for at in range(counts.load_MLE.shape[1])
    ]


def _specialised(counts: RoutingCounts, num_bins: int) -> list[dict[str, Any]]:
    load_MLE = counts.load_MLE
    text_LE, score_LE = spec.text_affiliation(load_MLE), spec.specialization_score(load_MLE)
    mrd_MLE = modality_routing(counts)
    order_LE = np.argsort(text_bias(load_MLE), axis=1, kind="stable")
    return [
        {
            "text_affiliation": numbers(text_LE[at]),
            "specialization_score": numbers(score_LE[at]),
            "experts_by_text_bias": order_E.tolist(),
            "bin_load": _by_modality(load_MLE[:, at, order_E].reshape(len(Modality), num_bins, -1).sum(axis=2)),
            "mrd": None if mrd_MLE is None else _by_modality(mrd_MLE[:, at]),
        }
        for at, order_E in enumerate(order_LE)
    ]


def _scored(counts: RoutingCounts) -> list[dict[str, Any]]:
    return [
        {
            "modality_scores": {name: _score_stats(counts, name, at) for name in sorted(counts.scores)},
            "score_correlation": {
                " and ".join(pair): number(own_L[at]) for pair, own_L in counts.correlation_L.items()
            },
        }
        for at in range(counts.load_MLE.shape[1])
    ]


def _score_stats(counts: RoutingCounts, name: str, at: int) -> dict[str, Any]:
    own = counts.scores[name]
    return {"mean": _by_modality(own.mean_ML[:, at]), "histogram": _by_modality(own.histogram_MLX[:, at])}


def by_kind(load_PMLE: Counts) -> dict[str, Counts]:
    """Return the loads [L, E] of each kind of tokens, of the prefill, and of all."""
    kinds = {name: load_PMLE[kind] for name, kind in KINDS.items()}
    return {**kinds, "prefill": load_PMLE[Phase.PREFILL].sum(axis=0), "all": load_PMLE.sum(axis=(0, 1))}


def by_phase(values_PLR: Counts) -> dict[str, Counts]:
    """Return the values [L, R] of each phase, and of both."""
    return {**{name: values_PLR[phase] for name, phase in PHASES.items()}, "all": values_PLR.sum(axis=0)}


def _by_modality(values_M: npt.NDArray[Any]) -> dict[str, Any]:
    return {modality.name.lower(): numbers(values_M[modality]) for modality in Modality}


def _mean_over_max(load: Counts) -> float | None:
    return float(load.mean() / load.max()) if load.any() else None


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def number(value: float) -> float | None:
    """Return the number, None if it is not finite: JSON has neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def numbers(values: npt.NDArray[Any]) -> Any:
    """Return a number, or a list of them, with None for what is not finite."""
    if values.dtype.kind != "f":
        return values.tolist()
    return number(float(values)) if values.ndim == 0 else [number(value) for value in values.tolist()]
