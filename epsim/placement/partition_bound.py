"""`PartitionBound`: a number that the cost of no partition of items into bins is below (docs/bounds.md has the proof).

Let Y[i, j] be 1 where items i and j share a bin, else 0. Every token has a linear minorant of its cost in Y
(`epsim.placement.minorant`). Their sum <W, Y> + b is bounded over a convex set that holds the Y of all partitions:
0 <= Y <= 1, diagonal 1, and, from the bins' sizes, a spectrum. For any L,

    cost >= b + min over the box of <W + L, Y> + min over the spectral set of <-L, Y>,

whose two minima are sums of the least entries, and of eigenvalues. Terminals, items that stand for bins, say where a
token lives. A primal-dual iteration looks for a good point for the minorants and a good L; whatever it finds, the bound
holds. Letters: T tokens, I items (experts, then terminals).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.placement.minorant import TokenMinorant, View

Floats = npt.NDArray[np.float64]
_PRIMAL_STEP, _DUAL_STEP = 0.9, 0.3  # over and times the largest weight; their product must be below 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Bins:
    """Into what the items are parted.

    num_items: experts, then terminals. size: at most so many items are in a bin. num_full: how many bins hold exactly
    `size` items and everything, or 0 where bins may stay partly empty. num_terminals: the last items, each in a bin of
    its own.
    """

    num_items: int
    size: int
    num_full: int
    num_terminals: int = 0

    def __post_init__(self) -> None:
        if self.num_full and self.num_full * self.size != self.num_items:
            raise ValueError("full bins must hold all items")


def partition_bound(
    ids_TK: npt.NDArray[np.integer],
    phase_T: npt.NDArray[np.uint8],
    views: list[View],
    bins: Bins,
    *,
    num_iterations: int,
    max_tokens: int,
) -> float:
    """Return a lower bound on the sum over tokens and views of what the bins that a token touches cost.

    num_iterations: of the search for a good bound, on at most max_tokens tokens; more make it tighter, never wrong.
    """
    stride = -(-len(ids_TK) // max_tokens) or 1
    some = TokenMinorant(ids_TK[::stride], phase_T[::stride], views)
    at_II, dual_II = _search(some, bins, num_iterations)
    everything = some if stride == 1 else TokenMinorant(ids_TK, phase_T, views)
    grows = len(everything.phase_T) / max(1, len(some.phase_T))
    weight_II, constant, _ = everything.at(at_II)
    found = _dual_value(weight_II, constant, grows * dual_II, bins)
    return max(found, everything.least(bins.size))


def _search(tokens: TokenMinorant, bins: Bins, num_iterations: int) -> tuple[Floats, Floats]:
    """Return the point of the minorant and the dual with the best bound found (Chambolle and Pock 2011)."""
    at_II = np.full((bins.num_items, bins.num_items), (bins.size - 1) / max(1, bins.num_items - 1))
    _into_box(at_II, bins)
    dual_II = np.zeros_like(at_II)
    best = (-np.inf, at_II, dual_II)
    scale = max(1e-9, float(np.abs(tokens.at(at_II)[0]).max()))
    step = _DUAL_STEP * scale
    for iteration in range(num_iterations):
        weight_II, constant, _ = tokens.at(at_II)
        if iteration % 5 == 4 or iteration == 0:
            value = _dual_value(weight_II, constant, dual_II, bins)
            if value > best[0]:
                best = value, at_II, dual_II
        next_II = at_II - _PRIMAL_STEP / scale * (weight_II + dual_II)
        _into_box(next_II, bins)
        ahead_II = 2 * next_II - at_II
        dual_II = dual_II + step * (ahead_II - _into_spectrum(dual_II / step + ahead_II, bins))
        at_II = next_II
    return best[1], best[2]


def _into_box(at_II: Floats, bins: Bins) -> None:
    """Project onto the box: entries from 0 to 1, diagonal 1, pairs of terminals 0, a terminal for each expert."""
    np.clip(at_II, 0.0, 1.0, out=at_II)
    if bins.num_terminals:
        first = bins.num_items - bins.num_terminals
        if bins.num_full:
            at_II[:first, first:] = _into_simplex(at_II[:first, first:])
            at_II[first:, :first] = at_II[:first, first:].T
        at_II[first:, first:] = 0.0
    np.fill_diagonal(at_II, 1.0)


def _into_simplex(rows_XB: Floats) -> Floats:
    """Return the nearest rows that are not negative and sum to 1."""
    down_XB = -np.sort(-rows_XB, axis=1)
    over_XB = (np.cumsum(down_XB, axis=1) - 1.0) / np.arange(1, rows_XB.shape[1] + 1)
    last_X = (down_XB > over_XB).sum(axis=1) - 1
    return np.asarray(np.maximum(rows_XB - over_XB[np.arange(len(rows_XB)), last_X][:, None], 0.0))


def _least_in_box(linear_II: Floats, bins: Bins) -> float:
    """Return min <linear, Y> over the box."""
    first = bins.num_items - bins.num_terminals
    off_II = np.minimum(linear_II, 0.0)
    np.fill_diagonal(off_II, 0.0)
    value = float(np.trace(linear_II) + off_II[:first, :first].sum())
    if bins.num_terminals:
        both_ET = linear_II[:first, first:] + linear_II[first:, :first].T
        value += float((both_ET.min(axis=1) if bins.num_full else np.minimum(both_ET, 0.0).sum(axis=1)).sum())
    return value


def _dual_value(weight_II: Floats, constant: float, dual_II: Floats, bins: Bins) -> float:
    """Return the bound at any minorant and dual, less what rounding may have added."""
    value = constant + _least_in_box(weight_II + dual_II, bins) + _least_in_spectrum(-dual_II, bins)
    size = abs(constant) + np.abs(weight_II).sum() + bins.num_items * np.abs(dual_II).sum()
    return float(value - 1e-13 * size)


def _least_in_spectrum(linear_II: Floats, bins: Bins) -> float:
    """Return min <linear, Y> over the symmetric Y with trace I and eigenvalues from 0 to `size`.

    Where all bins are full, the vector of ones is an eigenvector of Y, with eigenvalue `size`.
    """
    if bins.num_full:
        values_I = np.linalg.eigvalsh(_off_ones(linear_II))
        ones = linear_II.sum() / bins.num_items
        return float(bins.size * (ones + values_I[: bins.num_full - 1].sum()))
    values_I = np.linalg.eigvalsh(linear_II)
    whole, rest = divmod(bins.num_items, bins.size)
    part = rest * values_I[whole] if rest else 0.0
    return float(bins.size * values_I[:whole].sum() + part)


def _into_spectrum(at_II: Floats, bins: Bins) -> Floats:
    """Return the nearest matrix of the set of `_least_in_spectrum`."""
    if bins.num_full:
        values_I, vectors_II = np.linalg.eigh(-_off_ones(-at_II))
        values_I, vectors_II = values_I[1:], vectors_II[:, 1:]  # without the vector of ones, which is the lowest
        ones_II = np.full_like(at_II, bins.size / bins.num_items)
        clipped_I = _clip_to_sum(values_I, bins.size, bins.num_items - bins.size)
    else:
        values_I, vectors_II = np.linalg.eigh(at_II)
        ones_II = np.zeros_like(at_II)
        clipped_I = _clip_to_sum(values_I, bins.size, bins.num_items)
    found_II: Floats = (vectors_II * clipped_I) @ vectors_II.T + ones_II
    return found_II


def _off_ones(linear_II: Floats) -> Floats:
    """Return the matrix on the complement of the vector of ones, which gets a larger eigenvalue than all others."""
    mean_I = linear_II.mean(axis=0)
    inside_II = linear_II - mean_I[:, None] - mean_I[None, :] + mean_I.mean()
    high = 1.0 + np.abs(inside_II).sum()
    found_II: Floats = inside_II + high / len(linear_II)
    return found_II


def _clip_to_sum(values_I: Floats, most: float, total: float) -> Floats:
    """Return clip(values - shift, 0, most) with the shift that makes the sum `total`."""
    low, high = float(values_I.min()) - most - 1.0, float(values_I.max()) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(values_I - middle, 0.0, most).sum() > total:
            low = middle
        else:
            high = middle
    return np.clip(values_I - low, 0.0, most)
