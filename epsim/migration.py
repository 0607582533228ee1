"""Tokens that stay where their first expert was: `migration_traffic` (one step), `bytes_by_mode` (a whole trace).

In the mode of `epsim.traffic` a token goes home after every layer. Here it goes on from the device of its primary
expert (`epsim.trace.primary_first`), so that consecutive layers whose experts share a device send less: ExFlow, Yao et
al., "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference", IPDPS 2024
(arXiv:2401.08383). What is ExFlow's, from its abstract and its repository's README (YJHMITWEB/ExFlow): one all-to-all
per layer instead of two, the context of all tokens kept coherent on all GPUs by all-gathers (of the prompts at the
start, of the new tokens at the end of each forward pass), one expert per token and layer. What is assumed here:

- With K > 1 a device that holds experts of the token sends one reduced vector to where the token goes on.
- Attention of any layer may run anywhere, so the keys and values of every new token, of all layers, must reach every
  other device: (R - 1) times their bytes. Prompts are treated alike; ExFlow has every GPU process all prompts instead.
- The head is computed where a token ends: no vector goes home after the last layer. Of the all-gathered ids of
  generated tokens, 4 bytes each, nothing is counted. A token begins each step at its home, for any device has its id.

Letters: T tokens, L MoE layers, K top-k, E experts, R devices (source, then destination), F phases, X links, H hops.
"""

from dataclasses import dataclass
from typing import Self

import numba
import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.model import ModelCard
from epsim.placement import HomePlan, Placement
from epsim.trace import Phase, RequestTable, TraceSource
from epsim.trace.primary import primary_first
from epsim.traffic import MessageFormat, TrafficCounter

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MigrationTraffic:
    """Counts of one step. What is on a diagonal stays on its device.

    dispatch_tokens_LRR: tokens on the source with at least one expert on the destination (a vector each).
    dispatch_pairs_LRR: their routed (token, expert) pairs.
    combine_tokens_LRR: tokens with experts on the source that go on from the destination (a reduced vector each).
    tokens_at_LR: int64 [L + 1, R], tokens whose attention of a layer is on a device; the last row: where they end.
    """

    dispatch_tokens_LRR: Counts
    dispatch_pairs_LRR: Counts
    combine_tokens_LRR: Counts
    tokens_at_LR: Counts

    @classmethod
    def none(cls, num_layers: int, num_devices: int) -> Self:
        """Return the traffic of no tokens."""
        shape = num_layers, num_devices, num_devices
        return cls(
            dispatch_tokens_LRR=np.zeros(shape, np.int64),
            dispatch_pairs_LRR=np.zeros(shape, np.int64),
            combine_tokens_LRR=np.zeros(shape, np.int64),
            tokens_at_LR=np.zeros((num_layers + 1, num_devices), np.int64),
        )


def migration_traffic(
    topk_expert_ids_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    home_T: npt.NDArray[np.int32],
    placement: Placement,
) -> MigrationTraffic:
    """Return the traffic of one step whose tokens migrate, with dedup by device.

    topk_expert_ids_TLK: logical expert ids, distinct within (token, layer), the primary expert at k = 0
        (`primary_first`).
    home_T: int32, the device on which each token begins.
    """
    traffic = MigrationTraffic.none(topk_expert_ids_TLK.shape[1], placement.num_devices)
    _walk(
        topk_expert_ids_TLK,
        home_T,
        placement.device_of_expert_RLE,
        traffic.dispatch_tokens_LRR,
        traffic.dispatch_pairs_LRR,
        traffic.combine_tokens_LRR,
        traffic.tokens_at_LR,
    )
    return traffic


@dataclass(frozen=True, kw_only=True)
class ModeBytes:
    """What the tokens of a trace send in both modes: float64 bytes [F, L, R, R], diagonals zero; num_tokens_F: int64.

    home_dispatch_FLRR, home_combine_FLRR: tokens go home after each layer. home_kv_FLRR: the KV caches of prompts
        whose requests decode elsewhere (phase prefill).
    migrate_dispatch_FLRR, migrate_combine_FLRR: tokens migrate. coherence_FLRR: keys and values of new tokens, from
        where their attention was to all other devices.
    """

    num_tokens_F: Counts
    home_dispatch_FLRR: Floats
    home_combine_FLRR: Floats
    home_kv_FLRR: Floats
    migrate_dispatch_FLRR: Floats
    migrate_combine_FLRR: Floats
    coherence_FLRR: Floats

    @property
    def home_FLRR(self) -> Floats:
        """All that is sent in home mode."""
        return self.home_dispatch_FLRR + self.home_combine_FLRR + self.home_kv_FLRR

    @property
    def vectors_FLRR(self) -> Floats:
        """What is sent in migration mode but for the coherence of the KV cache."""
        return self.migrate_dispatch_FLRR + self.migrate_combine_FLRR

    @property
    def migrate_FLRR(self) -> Floats:
        """All that is sent in migration mode."""
        return self.vectors_FLRR + self.coherence_FLRR

    def per_token(self, bytes_FLRR: Floats, phase: Phase | None = None) -> float:
        """Return the mean over the tokens of a phase, or of both, of one of the fields above; 0 without tokens."""
        phases = slice(None) if phase is None else slice(int(phase), int(phase) + 1)
        return float(bytes_FLRR[phases].sum() / max(1, self.num_tokens_F[phases].sum()))


def bytes_by_mode(
    trace: TraceSource, placement: Placement, homes: HomePlan, card: ModelCard, message_format: MessageFormat
) -> ModeBytes:
    """Return what a trace's tokens send in home mode and in migration mode, both with dedup by device.

    Request number q of the trace, by ascending id, is request q of the homes.
    """
    requests = trace.requests
    plan = homes.assign(len(requests.request_id_Q))
    home_FQ = np.stack([plan.prefill_Q, plan.decode_Q])
    counts = _count_modes(trace, placement, home_FQ)
    kv_bytes_L = _kv_bytes_L(card, placement.num_layers)
    home_kv_LRR = kv_bytes_L[:, None, None] * _moving_prompt_tokens_RR(requests, home_FQ, placement.num_devices)
    kv_at_FLR = counts.attention_tokens_FLR * kv_bytes_L[:, None]
    form = message_format
    migrate_dispatch_FLRR = form.dispatch_bytes(counts.dispatch_tokens_FLRR, counts.dispatch_pairs_FLRR)
    return ModeBytes(
        num_tokens_F=counts.num_tokens_F,
        home_dispatch_FLRR=_off_diagonal(form.dispatch_bytes(counts.home_tokens_FLRR, counts.home_pairs_FLRR)),
        home_combine_FLRR=_off_diagonal(form.combine_bytes(counts.home_tokens_FLRR)),
        home_kv_FLRR=_off_diagonal(np.stack([home_kv_LRR, np.zeros_like(home_kv_LRR)])),
        migrate_dispatch_FLRR=_off_diagonal(migrate_dispatch_FLRR),
        migrate_combine_FLRR=_off_diagonal(form.combine_bytes(counts.combine_tokens_FLRR)),
        coherence_FLRR=_off_diagonal(np.repeat(kv_at_FLR[..., None], placement.num_devices, axis=3)),
    )


@dataclass(frozen=True, kw_only=True)
class _ModeCounts:
    """Counts of a trace by phase: home_.. in home mode (`StepTraffic`), the others as of `MigrationTraffic`.

    attention_tokens_FLR: `tokens_at_LR` without where tokens end.
    """

    num_tokens_F: Counts
    home_tokens_FLRR: Counts
    home_pairs_FLRR: Counts
    dispatch_tokens_FLRR: Counts
    dispatch_pairs_FLRR: Counts
    combine_tokens_FLRR: Counts
    attention_tokens_FLR: Counts


def _count_modes(trace: TraceSource, placement: Placement, home_FQ: npt.NDArray[np.int32]) -> _ModeCounts:
    """Count what a trace's tokens do in both modes. home_FQ: where each request lives in each phase."""
    num_layers, num_devices = placement.num_layers, placement.num_devices
    counter = TrafficCounter(placement)
    num_tokens_F = np.zeros(2, np.int64)
    counts_XFLRR = np.zeros((5, 2, num_layers, num_devices, num_devices), np.int64)
    at_FLR = np.zeros((2, num_layers, num_devices), np.int64)
    for rows in trace.batches():
        request_T = np.searchsorted(trace.requests.request_id_Q, rows.request_id_T)
        ids_TLK = primary_first(rows)
        for phase in Phase:
            own_T = np.flatnonzero(rows.phase_T == phase)
            home_T, own_ids_TLK = home_FQ[phase, request_T[own_T]], ids_TLK[own_T]
            home, moved = counter.count(own_ids_TLK, home_T), migration_traffic(own_ids_TLK, home_T, placement)
            num_tokens_F[phase] += len(own_T)
            counts_XFLRR[:2, phase] += home.tokens_LCRR[:, 0], home.pairs_LCRR[:, 0]
            counts_XFLRR[2:, phase] += moved.dispatch_tokens_LRR, moved.dispatch_pairs_LRR, moved.combine_tokens_LRR
            at_FLR[phase] += moved.tokens_at_LR[:-1]
    home_tokens_FLRR, home_pairs_FLRR, tokens_FLRR, pairs_FLRR, combine_FLRR = counts_XFLRR
    return _ModeCounts(
        num_tokens_F=num_tokens_F,
        home_tokens_FLRR=home_tokens_FLRR,
        home_pairs_FLRR=home_pairs_FLRR,
        dispatch_tokens_FLRR=tokens_FLRR,
        dispatch_pairs_FLRR=pairs_FLRR,
        combine_tokens_FLRR=combine_FLRR,
        attention_tokens_FLR=at_FLR,
    )


def _moving_prompt_tokens_RR(requests: RequestTable, home_FQ: npt.NDArray[np.int32], num_devices: int) -> Floats:
    """Return the prompt tokens whose keys and values move to where their requests decode, float64 [R, R]."""
    moving_RR = np.zeros((num_devices, num_devices))
    decodes_Q = requests.num_decode_tokens_Q > 0
    np.add.at(moving_RR, tuple(home_FQ[:, decodes_Q]), requests.num_prefill_tokens_Q[decodes_Q])
    return moving_RR


def least_exchange_s_L(bytes_LRR: Floats, cluster: Cluster) -> Floats:
    """Return a lower bound of the time of each layer's exchange, float64 [L]: what its busiest link must carry.

    bytes_LRR: sent directly, by the cluster's routes. A link carries its bytes and frames at its bandwidth, but for a
    burst. Overheads of messages, latencies and waiting for one another come on top in any real exchange, so that this
    is no prediction.
    """
    load_XL = np.zeros((len(cluster.links) + 1, len(bytes_LRR)))  # the last for the -1 that pads a route
    for hop_RR in np.moveaxis(cluster.routes_RRH, 2, 0):
        np.add.at(load_XL, hop_RR, np.moveaxis(bytes_LRR, 0, 2))
    burst_X = np.array([link.burst_bytes / (1.0 + link.frame_overhead_frac) for link in cluster.links])
    seconds_XL = np.maximum(0.0, load_XL[:-1] - burst_X[:, None]) / cluster.link_payload_bytes_per_s_X[:, None]
    return np.asarray(seconds_XL.max(axis=0, initial=0.0))


def _kv_bytes_L(card: ModelCard, num_layers: int) -> Floats:
    """Return the bytes of a token's keys and values in each MoE layer; leading dense layers count to the first."""
    kv_bytes_L = np.full(num_layers, float(card.kv_bytes_per_token))
    kv_bytes_L[:1] *= 1 + card.num_dense_layers
    return kv_bytes_L


def _off_diagonal(values_xRR: Floats) -> Floats:
    return values_xRR * (1.0 - np.eye(values_xRR.shape[-1]))


@numba.njit(cache=True, nogil=True)
def _walk(ids_TLK, home_T, device_of_expert_RLE, dispatch_LRR, pairs_LRR, combine_LRR, at_LR):  # type: ignore[no-untyped-def]
    """Follow each token from its home through all layers, and add what it sends to the counts."""
    num_tokens, num_layers, topk = ids_TLK.shape
    seen_R = np.full(at_LR.shape[1], -1, np.int64)
    visit = 0
    for t in range(num_tokens):
        here = home_T[t]
        for layer in range(num_layers):
            at_LR[layer, here] += 1
            onward = device_of_expert_RLE[here, layer, ids_TLK[t, layer, 0]]
            for k in range(topk):
                device = device_of_expert_RLE[here, layer, ids_TLK[t, layer, k]]
                pairs_LRR[layer, here, device] += 1
                if seen_R[device] != visit:
                    seen_R[device] = visit
                    dispatch_LRR[layer, here, device] += 1
                    combine_LRR[layer, device, onward] += 1
            visit += 1
            here = onward
        at_LR[num_layers, here] += 1
