"""Figures of merit from plain records: `RequestRecord`, `StepRecord`, `TransferCounts` -> `summarise_batch_size`.

Formulas: docs/metrics.md. Nothing here knows how the records came about; measured runs can fill them as well.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Phase = Literal["prefill", "decode"]
TRANSFER_COLUMNS = ("prefill_vision", "prefill_text", "prefill_all", "decode_text")


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request: when it arrived and when each of its output tokens was there, in s."""

    request_id: int
    arrival_s: float
    token_times_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Time to first token, from arrival."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """Time to the last token, from arrival."""
        return self.token_times_s[-1] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, (e2e - ttft) / (tokens - 1); None for one token."""
        if len(self.token_times_s) < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (len(self.token_times_s) - 1)

    @property
    def itl_s(self) -> Floats:
        """Gaps between consecutive tokens (inter-token latencies)."""
        return np.diff(np.array(self.token_times_s))


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One prefill (step 0) or decode step of a batch.

    parts_s: seconds per device [R] of each part. link_busy_s, link_bytes: per link [X]. pairs_LR: routed pairs that
    each device served. serving_R: which devices can serve pairs in this phase; none for a dense model. sent_bytes: of
    all messages between devices, each counted once. kv_exposed_s: what the next step waited for KV caches on their way.
    contended: whether a flow waited for another on a link, None where unknown.
    """

    batch: int
    phase: Phase
    step: int
    start_s: float
    duration_s: float
    kv_exposed_s: float
    num_tokens: int
    parts_s: Mapping[str, Floats]
    link_busy_s_X: Floats
    link_bytes_X: Floats
    pairs_LR: npt.NDArray[np.int64]
    serving_R: npt.NDArray[np.bool_]
    sent_bytes: float
    contended: bool | None


@dataclass(kw_only=True)
class TransferCounts:
    """Routed pairs and (token, layer) visits by modality (text, vision), all and remote ones, for each phase.

    A pair is remote when its expert is not on the token's home; a visit when at least one of its pairs is.
    """

    counts: dict[Phase, npt.NDArray[np.int64]] = field(
        default_factory=lambda: {"prefill": np.zeros((2, 4), np.int64), "decode": np.zeros((2, 4), np.int64)}
    )

    def add(self, phase: Phase, counts_M4: npt.NDArray[np.int64]) -> None:
        """Add [modality, (pairs, remote pairs, visits, remote visits)]."""
        self.counts[phase] = self.counts[phase] + counts_M4

    def ratios(self) -> dict[str, dict[str, float | None]]:
        """Return the shares of SMoES table S10 as fractions; None for a column without tokens."""
        rows = dict(
            zip(
                TRANSFER_COLUMNS,
                (
                    self.counts["prefill"][1],
                    self.counts["prefill"][0],
                    self.counts["prefill"].sum(axis=0),
                    self.counts["decode"][0],
                ),
                strict=True,
            )
        )
        return {
            "without_dedup": {name: _share(row[1], row[0]) for name, row in rows.items()},
            "with_dedup": {name: _share(row[3], row[2]) for name, row in rows.items()},
        }


def _share(part: int, whole: int) -> float | None:
    return float(part) / float(whole) if whole else None


def distribution(values: Sequence[float] | Floats) -> dict[str, float] | None:
    """Return mean, percentiles (linear interpolation) and maximum; None for no values."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return {
        "mean": float(array.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(array.max()),
    }


def balancedness(pairs_by_step: Sequence[npt.NDArray[np.int64]]) -> dict[str, float] | None:
    """Return mean load over maximum load of the devices, in the two forms in use; None where nothing is routed.

    pairs_by_step: routed pairs of each layer and device that can serve them, [layers, devices], for each step.
    ratio_of_sums: sum of means / sum of maxima over layers and steps (vLLM); mean_of_ratios: the mean of each
    layer's mean / max (SGLang). Layers without load do not count.
    """
    loads = np.concatenate(pairs_by_step) if pairs_by_step else np.zeros((0, 1))
    loads = loads[loads.any(axis=1)]
    if not len(loads):
        return None
    mean, maximum = loads.mean(axis=1), loads.max(axis=1)
    return {
        "ratio_of_sums": float(mean.sum() / maximum.sum()),
        "mean_of_ratios": float((mean / maximum).mean()),
    }


def summarise_phase(
    steps: Sequence[StepRecord], link_names: Sequence[str], staging_links: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the figures of the steps of one phase, means over steps; None without steps.

    staging_links: those of the links that are copies between device and host.
    """
    if not steps:
        return None
    busy_s_X = np.sum([step.link_busy_s_X for step in steps], axis=0)
    bytes_X = np.sum([step.link_bytes_X for step in steps], axis=0)
    total_s = sum(step.duration_s for step in steps)
    # A KV cache may still travel after its step: a link is used in the time until the next step starts.
    span_s = total_s + sum(step.kv_exposed_s for step in steps)
    contended = [step.contended for step in steps if step.contended is not None]
    return {
        "num_steps": len(steps),
        "step_s": total_s / len(steps),
        "parts_s": {name: float(np.mean([step.parts_s[name].mean() for step in steps])) for name in steps[0].parts_s},
        "links": {
            name: {
                "busy_frac": float(busy / span_s) if span_s else 0.0,
                "bytes_per_step": float(size / len(steps)),
            }
            for name, busy, size in zip(link_names, busy_s_X, bytes_X, strict=True)
        },
        "sent_bytes_per_step": sum(step.sent_bytes for step in steps) / len(steps),
        "balancedness": balancedness([step.pairs_LR[:, step.serving_R] for step in steps]),
        "staging_s": float(busy_s_X[[name in staging_links for name in link_names]].sum() / len(steps)),
        "contended_steps_frac": float(np.mean(contended)) if contended else None,
    }


def goodput_rps(
    requests: Sequence[RequestRecord],
    duration_s: float,
    ttft_limit_s: float | None,
    tpot_limit_s: float | None,
) -> float:
    """Return requests per second that meet all limits; None is no limit, and one token meets any TPOT limit."""
    good = sum(
        (ttft_limit_s is None or request.ttft_s <= ttft_limit_s)
        and (tpot_limit_s is None or request.tpot_s is None or request.tpot_s <= tpot_limit_s)
        for request in requests
    )
    return good / duration_s


def summarise_batch_size(
    *,
    batch_size: int,
    requests: Sequence[RequestRecord],
    steps: Sequence[StepRecord],
    transfers: TransferCounts,
    link_names: Sequence[str],
    staging_links: Collection[str],
    duration_s: float,
    ttft_limit_s: float | None,
    tpot_limit_s: float | None,
) -> dict[str, Any]:
    """Return all figures of one batch size as plain values (docs/metrics.md).

    duration_s: the time that the batches took, one after the other.
    """
    prefill = [step for step in steps if step.phase == "prefill"]
    decode = [step for step in steps if step.phase == "decode"]
    num_tokens = sum(len(request.token_times_s) for request in requests)
    return {
        "batch_size": batch_size,
        "num_batches": len(prefill),
        "ttft_s": distribution([request.ttft_s for request in requests]),
        "tpot_s": distribution([request.tpot_s for request in requests if request.tpot_s is not None]),
        "itl_s": distribution(np.concatenate([request.itl_s for request in requests])),
        "e2e_s": distribution([request.e2e_s for request in requests]),
        "output_tokens_per_s": num_tokens / duration_s,
        "goodput_rps": goodput_rps(requests, duration_s, ttft_limit_s, tpot_limit_s),
        "sent_bytes_per_output_token": sum(step.sent_bytes for step in steps) / num_tokens,
        "kv_exposed_s": float(np.mean([step.kv_exposed_s for step in prefill])),
        "transfer_ratio": transfers.ratios(),
        "prefill": summarise_phase(prefill, link_names, staging_links),
        "decode": summarise_phase(decode, link_names, staging_links),
    }
