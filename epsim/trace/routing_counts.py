"""One pass over a routing trace: `count_routing` makes `RoutingCounts`, loads, gate weights, modality scores.

Memory: sums over tokens, and `PIECE_TOKENS` rows at a time. Letters: P phase (prefill, decode), M modality (text,
vision), L MoE layers, E experts, T tokens, K top-k, X score bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numba
import numpy as np
import numpy.typing as npt

from epsim.errors import TraceError
from epsim.trace.meta import Modality
from epsim.trace.routing import RoutingTrace, TraceSource
from epsim.trace.statistics import add_load, no_load

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
PIECE_TOKENS = 4096
NUM_SCORE_BINS = 20


@dataclass(frozen=True, kw_only=True)
class ScoreCounts:
    """Of one estimator. histogram_MLX: scores in X equal bins from 0 to 1, the last with its end. sum_ML: of scores."""

    histogram_MLX: Counts
    sum_ML: Floats

    @property
    def mean_ML(self) -> Floats:
        """Mean score by modality and layer; NaN for a modality without tokens."""
        count_ML = self.histogram_MLX.sum(axis=2)
        nothing_ML = np.full_like(self.sum_ML, np.nan)
        return np.asarray(np.divide(self.sum_ML, count_ML, out=nothing_ML, where=count_ML > 0))


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Sums over all tokens of a trace.

    num_tokens_PM: tokens by phase and modality.
    load_PMLE: routed (token, expert) pairs.
    gate_mass_MLE: sum of gate weights, normalised within each token's top-k (SMAR eq. 5); None without gate weights.
    num_weightless_visits: (token, layer) visits whose K gate weights are all 0: eq. 5 says nothing of them, and they
    are left out of gate_mass_MLE.
    scores: by estimator.
    correlation_L: by pair of estimators, Pearson's over all tokens in each layer; NaN where a score does not vary.
    """

    num_tokens_PM: Counts
    load_PMLE: Counts
    gate_mass_MLE: Floats | None
    num_weightless_visits: int
    scores: dict[str, ScoreCounts] = field(default_factory=dict)
    correlation_L: dict[tuple[str, str], Floats] = field(default_factory=dict)

    @property
    def load_MLE(self) -> Counts:
        """Routed pairs of both phases."""
        return np.asarray(self.load_PMLE.sum(axis=0))


def count_routing(source: TraceSource) -> RoutingCounts:
    """Read the trace once. Raises TraceError for gate weights or scores that `epsim trace check` would refuse."""
    load_PMLE = no_load(source.meta)
    num_tokens_PM = np.zeros(load_PMLE.shape[:2], np.int64)
    gates, scores, moments = _Gates(load_PMLE.shape[1:]), _Scores(source), _Moments(source)
    for batch in source.batches():
        add_load(batch, load_PMLE)
        np.add.at(num_tokens_PM, (batch.phase_T, batch.modality_T), 1)
        for piece in _pieces(batch):
            gates.add(piece, source.name)
            scores.add(piece)
            moments.add(piece)
    return RoutingCounts(
        num_tokens_PM=num_tokens_PM,
        load_PMLE=load_PMLE,
        gate_mass_MLE=gates.mass_MLE if gates.found else None,
        num_weightless_visits=gates.num_weightless,
        scores=scores.counts,
        correlation_L=moments.correlations(),
    )


def _pieces(batch: RoutingTrace) -> Iterator[RoutingTrace]:
    for first in range(0, batch.num_tokens, PIECE_TOKENS):
        yield batch.take(slice(first, first + PIECE_TOKENS))


class _Gates:
    def __init__(self, shape_MLE: tuple[int, ...]) -> None:
        self.mass_MLE = np.zeros(shape_MLE)
        self.num_weightless = 0
        self.found = False

    def add(self, piece: RoutingTrace, name: str) -> None:
        if piece.gate_weights_TLK is None:
            return
        self.found = True
        weights_TLK = piece.gate_weights_TLK.astype(np.float32)
        if not (np.isfinite(weights_TLK) & (weights_TLK >= 0)).all():
            raise TraceError(
                f"{name}: gate weights must be finite and not negative; `epsim trace check` names the first bad row"
            )
        self.num_weightless += _add_gates(piece.topk_expert_ids_TLK, weights_TLK, piece.modality_T, self.mass_MLE)


class _Scores:
    def __init__(self, source: TraceSource) -> None:
        self._name, self._num_layers = source.name, source.meta.num_layers
        self.counts: dict[str, ScoreCounts] = {}

    def add(self, piece: RoutingTrace) -> None:
        for name, scores_TL in piece.modality_scores.items():
            if not ((scores_TL >= 0) & (scores_TL <= 1)).all():
                raise TraceError(
                    f"{self._name}: modality scores of {name!r} must be from 0 to 1; `epsim trace check` names the row"
                )
            own = self.counts.setdefault(name, self._nothing())
            _add_scores(scores_TL.astype(np.float64), piece.modality_T, own.histogram_MLX, own.sum_ML)

    def _nothing(self) -> ScoreCounts:
        shape = (len(Modality), self._num_layers)
        return ScoreCounts(histogram_MLX=np.zeros((*shape, NUM_SCORE_BINS), np.int64), sum_ML=np.zeros(shape))


class _Moments:
    """For each pair of estimators [5, L]: mean of either, sum of squared deviations of either, of their product."""

    def __init__(self, source: TraceSource) -> None:
        self._num_layers = source.meta.num_layers
        self._moments: dict[tuple[str, str], Floats] = {}
        self._num_tokens = 0

    def add(self, piece: RoutingTrace) -> None:
        for pair in combinations(sorted(piece.modality_scores), 2):
            moments = self._moments.setdefault(pair, np.zeros((5, self._num_layers)))
            first_TL, second_TL = (piece.modality_scores[name].astype(np.float64) for name in pair)
            _add_moments(first_TL, second_TL, self._num_tokens, moments)
        self._num_tokens += piece.num_tokens

    def correlations(self) -> dict[tuple[str, str], Floats]:
        found = {}
        for pair, (_, _, first_L, second_L, product_L) in self._moments.items():
            spread_L = np.sqrt(first_L * second_L)
            varies_L = np.minimum(first_L, second_L) > 1e-16 * self._num_tokens  # below float16's steps: rounding
            found[pair] = np.divide(product_L, spread_L, out=np.full_like(spread_L, np.nan), where=varies_L)
        return found


@numba.njit(cache=True)
def _add_gates(ids_TLK, weights_TLK, modality_T, mass_MLE):  # type: ignore[no-untyped-def]
    """Add each token's weights over their sum; return the number of visits whose weights are all 0."""
    num_tokens, num_layers, topk = ids_TLK.shape
    num_weightless = 0
    for t in range(num_tokens):
        for layer in range(num_layers):
            total = 0.0
            for k in range(topk):
                total += weights_TLK[t, layer, k]
            if total == 0.0:
                num_weightless += 1
                continue
            for k in range(topk):
                mass_MLE[modality_T[t], layer, ids_TLK[t, layer, k]] += weights_TLK[t, layer, k] / total
    return num_weightless


@numba.njit(cache=True)
def _add_scores(scores_TL, modality_T, histogram_MLX, sum_ML):  # type: ignore[no-untyped-def]
    num_tokens, num_layers = scores_TL.shape
    num_bins = histogram_MLX.shape[2]
    for t in range(num_tokens):
        for layer in range(num_layers):
            score = scores_TL[t, layer]
            histogram_MLX[modality_T[t], layer, min(int(score * num_bins), num_bins - 1)] += 1
            sum_ML[modality_T[t], layer] += score


@numba.njit(cache=True)
def _add_moments(first_TL, second_TL, num_before, moments):  # type: ignore[no-untyped-def]
    """Welford's update of means, squared deviations and their product, layer by layer."""
    num_tokens, num_layers = first_TL.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            first_off = first_TL[t, layer] - moments[0, layer]
            second_off = second_TL[t, layer] - moments[1, layer]
            moments[0, layer] += first_off / (num_before + t + 1)
            moments[1, layer] += second_off / (num_before + t + 1)
            second_left = second_TL[t, layer] - moments[1, layer]
            moments[2, layer] += first_off * (first_TL[t, layer] - moments[0, layer])
            moments[3, layer] += second_off * second_left
            moments[4, layer] += first_off * second_left
