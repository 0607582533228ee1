"""`TokenMinorant`: what tokens cost at least, as a linear function of who shares a bin with whom.

Let Y[i, j] be 1 where items i and j share a bin, else 0. A token with the items t touches x bins, x = sum over i in t
of 1 / s_i, where s_i = sum over j in t of Y[i, j] says how many items of the token are in i's bin. A chord of 1 / s
between two whole numbers that follow each other is above none of the values that s can take, so the sum of such
chords, linear in Y, is never above x. Nor is a chord of the least x that keeps so many pairs apart (`most_cut`), which
is all that the bound of Donath and Hoffman uses. At a point Z the higher of the two is taken, and likewise a chord of
a convex rising price of x. Letters: T tokens, K top-k, I items, V views, F phase (prefill, decode), X bins touched.
"""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """What tokens pay in one role, e.g. as tokens that live on one device.

    weight_F: by which share tokens of a phase have this role. terminal: an item that each of them has beside its own,
    or -1. price_X: what touching x = 0, 1, .. bins costs at least; rising, and convex.
    """

    weight_F: Floats
    terminal: int
    price_X: Floats

    def __post_init__(self) -> None:
        steps_X = np.diff(self.price_X)
        if (steps_X < 0).any() or (np.diff(steps_X) < -1e-12).any():
            raise ValueError("price_X must rise and be convex")


class TokenMinorant:
    """A linear function of Y that is at most what these tokens cost under any partition, high at a chosen point."""

    def __init__(self, ids_TK: npt.NDArray[np.integer], phase_T: npt.NDArray[np.uint8], views: list[View]) -> None:
        self.ids_TK = np.ascontiguousarray(ids_TK, np.int32)
        self.phase_T = phase_T
        self._views = views
        self._weight_VF = np.stack([view.weight_F for view in views])
        self._terminal_V = np.array([view.terminal for view in views])
        self._price_VX = np.stack([view.price_X for view in views])
        most = ids_TK.shape[1] + 2
        self._cut_NX = np.zeros((most, most))
        for size in range(1, most):
            self._cut_NX[size, :size] = most_cut(size)

    def at(self, at_II: Floats) -> tuple[Floats, float, float]:
        """Return W and b, <W, Y> + b being at most the cost of every partition Y, and its value at `at_II`."""
        weight_II, constant, value = _minorant(
            self.ids_TK, self.phase_T, self._weight_VF, self._terminal_V, self._price_VX, self._cut_NX, at_II
        )
        return weight_II, float(constant), float(value)

    def least(self, size: int) -> float:
        """Return what the tokens cost if each touched as few bins of this size as it can."""
        topk, counts_F = self.ids_TK.shape[1], np.bincount(self.phase_T, minlength=2)
        total = 0.0
        for view in self._views:
            num_bins = -(-(topk + (view.terminal >= 0)) // size)
            total += float(view.weight_F @ counts_F) * float(view.price_X[min(num_bins, len(view.price_X) - 1)])
        return total


def most_cut(num_items: int) -> Floats:
    """Return how many pairs of `num_items` are apart at most when they touch 1, 2, .., num_items bins.

    >>> most_cut(6).tolist()
    [0.0, 9.0, 12.0, 13.0, 14.0, 15.0]
    """
    sizes = [np.bincount(np.arange(num_items) % x) for x in range(1, num_items + 1)]
    return np.array([(num_items**2 - float((size**2).sum())) / 2 for size in sizes])


@numba.njit(cache=True, nogil=True)
def _minorant(ids_TK, phase_T, weight_VF, terminal_V, price_VX, cut_NX, at_II):  # type: ignore[no-untyped-def]
    """Return W, b and the value at `at_II`; cut_NX[n, x - 1]: pairs of n items that are apart at most on x bins."""
    num_tokens, topk = ids_TK.shape
    weight_II = np.zeros_like(at_II)
    constant, value = 0.0, 0.0
    items = np.empty(topk + 1, np.int64)
    slope = np.empty(topk + 1)
    for t in range(num_tokens):
        for v in range(len(terminal_V)):
            share = weight_VF[v, phase_T[t]]
            if share == 0.0:
                continue
            size = topk
            items[:topk] = ids_TK[t]
            if terminal_V[v] >= 0:
                items[topk] = terminal_V[v]
                size += 1
            touched = _by_sizes(items[:size], at_II, slope)
            by_cut, per_pair = _by_cut(items[:size], at_II, cut_NX[size])
            if by_cut > touched:
                touched = by_cut
                slope[:size] = -per_pair / 2.0  # each pair is in the sums of two items
            low = min(max(int(touched), 1), price_VX.shape[1] - 2)  # every token touches a bin
            step = price_VX[v, low + 1] - price_VX[v, low]
            paid = share * (price_VX[v, low] + step * (touched - low))
            value += paid
            constant += paid
            for i in range(size):
                for j in range(size):
                    part = share * step * slope[i] / 2.0
                    weight_II[items[i], items[j]] += part
                    weight_II[items[j], items[i]] += part
                    constant -= 2.0 * part * at_II[items[i], items[j]]
    return weight_II, constant, value


@numba.njit(cache=True, nogil=True)
def _by_sizes(items, at_II, slope):  # type: ignore[no-untyped-def]
    """Return the sum of the chords of 1 / s from floor(s) to floor(s) + 1, and put the slopes, -1 / (s (s + 1))."""
    size, touched = len(items), 0.0
    for i in range(size):
        together = 0.0
        for j in range(size):
            together += at_II[items[i], items[j]]
        whole = min(max(int(together), 1), max(size - 1, 1))
        slope[i] = -1.0 / (whole * (whole + 1.0))
        touched += 1.0 / whole + slope[i] * (together - whole)
    return touched


@numba.njit(cache=True, nogil=True)
def _by_cut(items, at_II, cut_X):  # type: ignore[no-untyped-def]
    """Return the bins that so many pairs apart need, between whole numbers of bins by a chord, and its slope."""
    size, cut = len(items), 0.0
    if size == 1:
        return 1.0, 0.0
    for i in range(size):
        for j in range(i):
            cut += 1.0 - at_II[items[i], items[j]]
    low = 0
    while low < size - 2 and cut > cut_X[low + 1]:
        low += 1
    per_pair = 1.0 / (cut_X[low + 1] - cut_X[low])
    return low + 1.0 + per_pair * (cut - cut_X[low]), per_pair
