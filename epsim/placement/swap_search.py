"""`search_layer`: which bin (device or node) each expert of a layer goes to, by swaps of two experts.

The search keeps the same number of experts in every bin and lowers the cost of the bins that tokens touch. It walks to
the best swap that is not tabu, even where that costs more, and returns the best assignment that it has seen. Tables
that are kept up to date give the exact change of each of the E^2 / 2 swaps in constant time; a swap itself touches only
the tokens of its two experts. Costs are integers, so nothing is lost to rounding and equal seeds give equal results.

With c_b what a token pays for touching bin b, and a(e) the bin of expert e, over the tokens t that chose e:
    enter[e, b] = sum of c_b over the t with nothing in b               (what e would add there)
    leave[e]    = sum of c_a(e) over the t with only e in a(e)          (what e would save here)
    shared[e,f] = the part of leave[e] of the t that also chose f
    change(e <-> f) = enter[e, a(f)] - leave[e] + enter[f, a(e)] - leave[f] + shared[e, f] + shared[f, e],
the last two because a token that chose both still touches both bins. This is Kernighan and Lin's gain (1970) for
hyperedges (Fiduccia and Mattheyses 1982), under a tabu list (Taillard 1991).

Letters: T tokens, K top-k, E experts, B bins, F phase (prefill, decode).
"""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

COST_SCALE = 1 << 12  # integer costs: units of 1 / COST_SCALE
NO_CAP = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTokens:
    """The tokens of one layer, ready for the search.

    ids_TK: int32, experts 0 to E - 1; -1 is none (a choice that does not concern these bins).
    phase_T: uint8.
    """

    ids_TK: npt.NDArray[np.int32]
    phase_T: npt.NDArray[np.uint8]
    num_experts: int

    def __post_init__(self) -> None:
        if self.ids_TK.ndim != 2 or self.phase_T.shape != self.ids_TK.shape[:1]:
            raise ValueError("ids_TK must be (tokens, top-k) and phase_T (tokens,)")
        if self.ids_TK.size and not -1 <= self.ids_TK.min() <= self.ids_TK.max() < self.num_experts:
            raise ValueError("ids_TK must hold experts below num_experts, or -1")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to search: at most num_swaps swaps; none after `patience` of them without a new best."""

    num_swaps: int
    patience: int


def integer_costs(cost_FB: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return costs in units of 1 / COST_SCALE."""
    return np.rint(cost_FB * COST_SCALE).astype(np.int64)


def search_layer(
    tokens: LayerTokens,
    cost_FB: npt.NDArray[np.int64],
    start_E: npt.NDArray[np.int32],
    *,
    effort: Effort,
    seed: int,
    load_E: npt.NDArray[np.int64] | None = None,
    max_load_B: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int32], int, int]:
    """Return the best assignment found from `start_E` (int32 [E]), its excess load, and its cost in integer units.

    load_E, max_load_B: what is above its cap in some bin counts before any cost.
    """
    num_experts, num_bins = tokens.num_experts, cost_FB.shape[1]
    loads_E = np.zeros(num_experts, np.int64) if load_E is None else load_E
    tenure_X2 = 2 + np.random.default_rng(seed).integers(0, num_experts // 4 + 2, (effort.num_swaps, 2))
    first, token = _tokens_by_expert(tokens.ids_TK, num_experts)
    best_E, excess, cost = _search(
        tokens.ids_TK,
        tokens.phase_T,
        first,
        token,
        cost_FB,
        start_E.astype(np.int32),
        num_bins,
        loads_E,
        np.full(num_bins, NO_CAP) if max_load_B is None else max_load_B,
        tenure_X2,
        effort.patience,
    )
    return best_E, int(excess), int(cost)


@numba.njit(cache=True, nogil=True)
def _tokens_by_expert(ids_TK, num_experts):  # type: ignore[no-untyped-def]
    """Return first [E + 1] and token [T K]: the tokens of expert e are token[first[e] : first[e + 1]]."""
    first = np.zeros(num_experts + 1, np.int64)
    for t in range(ids_TK.shape[0]):
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] >= 0:
                first[ids_TK[t, k] + 1] += 1
    for e in range(num_experts):
        first[e + 1] += first[e]
    place = first[:-1].copy()
    token = np.empty(first[-1], np.int32)
    for t in range(ids_TK.shape[0]):
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e >= 0:
                token[place[e]] = t
                place[e] += 1
    return first, token


@numba.njit(cache=True, nogil=True)
def _search(ids_TK, phase_T, first, token, cost_FB, start_E, num_bins, load_E, max_load_B, tenure_X2, patience):  # type: ignore[no-untyped-def]
    """Walk at most X swaps; return the best assignment, its excess load and its cost.

    tenure_X2: for how many swaps the two experts of each must not go back.
    """
    num_experts = len(start_E)
    bin_E = start_E.copy()
    count_TB, enter_EB, leave_E, shared_EE, cost = _tables(ids_TK, phase_T, cost_FB, bin_E, num_bins)
    load_B = np.zeros(num_bins, np.int64)
    for e in range(num_experts):
        load_B[bin_E[e]] += load_E[e]
    excess = np.int64(0)
    for b in range(num_bins):
        excess += max(0, load_B[b] - max_load_B[b])
    best_E, best_excess, best_cost, best_step = bin_E.copy(), excess, cost, 0
    tabu_until_EB = np.zeros((num_experts, num_bins), np.int64)
    for step in range(len(tenure_X2)):
        e, f, change, excess_change = _best_swap(
            bin_E, enter_EB, leave_E, shared_EE, load_E, load_B, max_load_B, tabu_until_EB, step,
            best_excess - excess, best_cost - cost,
        )  # fmt: skip
        if e < 0:
            break
        a, b = bin_E[e], bin_E[f]
        _move(e, a, b, ids_TK, phase_T, first, token, cost_FB, bin_E, count_TB, enter_EB, leave_E, shared_EE)
        _move(f, b, a, ids_TK, phase_T, first, token, cost_FB, bin_E, count_TB, enter_EB, leave_E, shared_EE)
        load_B[a] += load_E[f] - load_E[e]
        load_B[b] += load_E[e] - load_E[f]
        cost += change
        excess += excess_change
        tabu_until_EB[e, a], tabu_until_EB[f, b] = step + tenure_X2[step, 0], step + tenure_X2[step, 1]
        if excess < best_excess or (excess == best_excess and cost < best_cost):
            best_E, best_excess, best_cost, best_step = bin_E.copy(), excess, cost, step
        elif step - best_step >= patience:
            break
    return best_E, best_excess, best_cost


@numba.njit(cache=True, nogil=True)
def _tables(ids_TK, phase_T, cost_FB, bin_E, num_bins):  # type: ignore[no-untyped-def]
    """Return count_TB (experts of a token in a bin), enter_EB, leave_E, shared_EE and the cost."""
    num_tokens, topk = ids_TK.shape
    num_experts = len(bin_E)
    count_TB = np.zeros((num_tokens, num_bins), np.uint8)
    enter_EB = np.zeros((num_experts, num_bins), np.int64)
    leave_E = np.zeros(num_experts, np.int64)
    shared_EE = np.zeros((num_experts, num_experts), np.int64)
    cost = np.int64(0)
    for t in range(num_tokens):
        costs_B = cost_FB[phase_T[t]]
        for k in range(topk):
            if ids_TK[t, k] >= 0:
                count_TB[t, bin_E[ids_TK[t, k]]] += 1
        for b in range(num_bins):
            if count_TB[t, b] > 0:
                cost += costs_B[b]
        for k in range(topk):
            e = ids_TK[t, k]
            if e < 0:
                continue
            for b in range(num_bins):
                if count_TB[t, b] == 0:
                    enter_EB[e, b] += costs_B[b]
            if count_TB[t, bin_E[e]] == 1:
                _add_alone(e, costs_B[bin_E[e]], ids_TK[t], leave_E, shared_EE)
    return count_TB, enter_EB, leave_E, shared_EE, cost


@numba.njit(cache=True, nogil=True)
def _best_swap(  # type: ignore[no-untyped-def]
    bin_E, enter_EB, leave_E, shared_EE, load_E, load_B, max_load_B, tabu_until_EB, step, excess_to_best, cost_to_best
):
    """Return the pair with the least (change of excess load, change of cost), and both.

    A pair is tabu when both experts would go back too soon, unless the two changes are below those to the best so far.
    """
    num_experts = len(bin_E)
    best_e, best_f = -1, -1
    best_change, best_excess = np.int64(0), np.int64(0)
    for e in range(num_experts):
        a = bin_E[e]
        for f in range(e + 1, num_experts):
            b = bin_E[f]
            if a == b:
                continue
            change = enter_EB[e, b] - leave_E[e] + enter_EB[f, a] - leave_E[f] + shared_EE[e, f] + shared_EE[f, e]
            moved = load_E[e] - load_E[f]
            excess = max(0, load_B[a] - moved - max_load_B[a]) - max(0, load_B[a] - max_load_B[a])
            excess += max(0, load_B[b] + moved - max_load_B[b]) - max(0, load_B[b] - max_load_B[b])
            if best_e >= 0 and (excess > best_excess or (excess == best_excess and change >= best_change)):
                continue
            is_new_best = excess < excess_to_best or (excess == excess_to_best and change < cost_to_best)
            if tabu_until_EB[e, b] > step and tabu_until_EB[f, a] > step and not is_new_best:
                continue
            best_e, best_f, best_change, best_excess = e, f, change, excess
    return best_e, best_f, best_change, best_excess


@numba.njit(cache=True, nogil=True)
def _move(e, a, b, ids_TK, phase_T, first, token, cost_FB, bin_E, count_TB, enter_EB, leave_E, shared_EE):  # type: ignore[no-untyped-def]
    """Move expert e from bin a to bin b, and keep the tables right."""
    for i in range(first[e], first[e + 1]):
        t = token[i]
        cost_a, cost_b = cost_FB[phase_T[t], a], cost_FB[phase_T[t], b]
        in_a, in_b = count_TB[t, a], count_TB[t, b]
        if in_a == 1:
            _add_alone(e, -cost_a, ids_TK[t], leave_E, shared_EE)
            _add_enter(a, cost_a, ids_TK[t], enter_EB)
        elif in_a == 2:
            _add_alone(_other(e, a, ids_TK[t], bin_E), cost_a, ids_TK[t], leave_E, shared_EE)
        if in_b == 0:
            _add_enter(b, -cost_b, ids_TK[t], enter_EB)
            _add_alone(e, cost_b, ids_TK[t], leave_E, shared_EE)
        elif in_b == 1:
            _add_alone(_other(e, b, ids_TK[t], bin_E), -cost_b, ids_TK[t], leave_E, shared_EE)
        count_TB[t, a] = in_a - 1
        count_TB[t, b] = in_b + 1
    bin_E[e] = b


@numba.njit(cache=True, nogil=True, inline="always")
def _other(e, b, ids_K, bin_E):  # type: ignore[no-untyped-def]
    """Return the expert of a token, not e, that is in bin b."""
    for f in ids_K:
        if f >= 0 and f != e and bin_E[f] == b:
            return f
    return -1


@numba.njit(cache=True, nogil=True, inline="always")
def _add_enter(b, cost, ids_K, enter_EB):  # type: ignore[no-untyped-def]
    for f in ids_K:
        if f >= 0:
            enter_EB[f, b] += cost


@numba.njit(cache=True, nogil=True, inline="always")
def _add_alone(e, cost, ids_K, leave_E, shared_EE):  # type: ignore[no-untyped-def]
    leave_E[e] += cost
    for f in ids_K:
        if f >= 0:
            shared_EE[e, f] += cost  # shared[e, e] is leave[e]; no swap reads it
