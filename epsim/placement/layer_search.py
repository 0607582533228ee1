"""`search_placement`: the swap search over all layers of a problem, from several starts, nodes before devices.

Letters: T tokens, K top-k, L MoE layers, E experts, R devices, N nodes, F phase, B bins (nodes or devices).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.policies import text_bias
from epsim.placement.problem import PlacementProblem
from epsim.placement.swap_search import NO_CAP, Effort, LayerTokens, integer_costs, search_layer

Assignment = npt.NDArray[np.int32]
_LAST_PATIENCE = 4  # swaps over all tokens of a large trace are slow, and the search on a part has done most


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """starts: assignments to search from (grown by co-activation, by id, by text bias, then random ones).

    rounds: at most so many swaps per expert from each start, and no more than one per expert in a row without a gain.
    search_tokens: every start is searched on at most so many tokens, evenly spaced; the best then goes on with all,
    until some swaps in a row bring nothing.
    """

    starts: int
    rounds: float
    search_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's rows and loads, and which random numbers are its own."""

    ids_TK: npt.NDArray[np.integer]
    phase_T: npt.NDArray[np.uint8]
    load_E: npt.NDArray[np.int64]
    bias_E: npt.NDArray[np.float64]
    rng: np.random.Generator


def search_placement(
    problem: PlacementProblem, policy: str, options: SearchOptions, *, max_load: float | None = None
) -> npt.NDArray[np.int32]:
    """Return physical_to_logical_LP, equal experts on each device, with a low `TransferObjective.cost_L`.

    max_load: no device's load is above max_load times the mean of its layer, or, in a layer where the search finds no
    such assignment, above the least that it finds.
    """
    problem.require_even_split()
    tokens = FitTokens.of(problem.require_trace(policy))
    bias_LE, load_LE = text_bias(problem.expert_load_MLE), problem.expert_load_MLE.sum(axis=0)
    seeds = np.random.SeedSequence(options.seed).spawn(problem.num_layers)
    objective = problem.objective
    counts_F = np.bincount(tokens.phase_T, minlength=2)
    pays_F = (objective.device_cost_FR.any(axis=1) | objective.node_cost_FN.any(axis=1)) & (counts_F > 0)
    rows_T = slice(None) if pays_F[counts_F > 0].all() else np.flatnonzero(pays_F[tokens.phase_T])

    def place(index: int) -> Assignment:
        layer = _Layer(
            ids_TK=tokens.ids_LTK[index, rows_T],
            phase_T=tokens.phase_T[rows_T],
            load_E=load_LE[index],
            bias_E=bias_LE[index],
            rng=np.random.default_rng(seeds[index]),
        )
        device_E = _search_levels(layer, objective, options, max_load)
        return np.argsort(device_E, kind="stable").astype(np.int32)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.stack(list(pool.map(place, range(problem.num_layers))))


def _search_levels(
    layer: _Layer, objective: TransferObjective, options: SearchOptions, max_load: float | None
) -> Assignment:
    """Return the device of each expert: of the node that the search over nodes gives it, where nodes cost anything."""
    num_experts, num_devices = len(layer.load_E), objective.num_devices
    per_device, node_R = num_experts // num_devices, objective.node_of_device_R
    mean = layer.load_E.sum() / num_devices
    if not objective.node_cost_FN.any():
        cap = None if max_load is None else max_load * mean
        return _search(layer, np.arange(num_experts), objective.device_cost_FR, per_device, options, cap)
    sizes_N = np.bincount(node_R, minlength=objective.node_cost_FN.shape[1])
    whole = np.flatnonzero(sizes_N)
    cap = None if max_load is None else max_load * mean * sizes_N[whole].max()
    nodes_E = whole[
        _search(
            layer, np.arange(num_experts), objective.node_cost_FN[:, whole], per_device * sizes_N[whole], options, cap
        )
    ]
    device_E = np.empty(num_experts, np.int32)
    for node in whole:
        experts, devices = np.flatnonzero(nodes_E == node), np.flatnonzero(node_R == node)
        cap = None if max_load is None else max_load * mean
        costs_FB = objective.device_cost_FR[:, devices]
        device_E[experts] = devices[_search(layer, experts, costs_FB, per_device, options, cap)]
    return device_E


def _search(
    layer: _Layer,
    experts: npt.NDArray[np.integer],
    cost_FB: npt.NDArray[np.float64],
    sizes_B: npt.NDArray[np.integer] | int,
    options: SearchOptions,
    cap: float | None,
) -> Assignment:
    """Return the bin of each of these experts, the best from all starts; bin b has room for sizes_B[b] of them."""
    num_bins = cost_FB.shape[1]
    in_order = np.repeat(np.arange(num_bins), sizes_B).astype(np.int32)
    if num_bins == 1:
        return in_order
    local_E = np.full(len(layer.load_E), -1, np.int32)
    local_E[experts] = np.arange(len(experts))
    costs_FB, load_E = integer_costs(cost_FB), layer.load_E[experts]
    stride = -(-len(layer.ids_TK) // options.search_tokens) or 1
    some, everything = (
        LayerTokens(ids_TK=local_E[layer.ids_TK[::step]], phase_T=layer.phase_T[::step], num_experts=len(experts))
        for step in (stride, 1)
    )

    num_swaps = int(options.rounds * len(experts))
    effort = Effort(num_swaps=num_swaps, patience=len(experts))

    def search(tokens: LayerTokens, start_E: Assignment, most: int, effort: Effort) -> tuple[Assignment, int, int]:
        seed = int(layer.rng.integers(2**31))
        return search_layer(tokens, costs_FB, start_E, effort=effort, seed=seed, load_E=load_E, max_load=most)

    most = NO_CAP if cap is None else int(cap)
    starts = _starts(some, layer.bias_E[experts], in_order, options.starts, layer.rng)
    found = [search(some, start_E, most, effort) for start_E in starts]
    best_E, excess, _ = min(found, key=lambda result: result[1:])
    if excess:
        most = int(np.bincount(best_E, weights=load_E).max())
        best_E, _, _ = search(some, best_E, most, effort)
    if stride == 1:
        return best_E
    return search(everything, best_E, most, Effort(num_swaps=num_swaps, patience=_LAST_PATIENCE))[0]


def _starts(
    tokens: LayerTokens,
    bias_E: npt.NDArray[np.float64],
    in_order: Assignment,
    num_starts: int,
    rng: np.random.Generator,
) -> list[Assignment]:
    """Return bins that grow by co-activation, by id, by text bias (vision experts first), and at random."""
    by_bias = np.empty_like(in_order)
    by_bias[np.argsort(bias_E, kind="stable")] = in_order
    makers: list[Callable[[], Assignment]] = [lambda: _grown(tokens, in_order), lambda: in_order, lambda: by_bias]
    makers += [lambda: rng.permutation(in_order)] * max(0, num_starts - len(makers))
    return [make() for make in makers[:num_starts]]


def _grown(tokens: LayerTokens, in_order: Assignment) -> Assignment:
    """Fill bin after bin, each time with the expert that is chosen most often together with those in it."""
    chosen_TE = np.zeros((len(tokens.ids_TK), tokens.num_experts + 1), np.float32)
    chosen_TE[np.arange(len(chosen_TE))[:, None], tokens.ids_TK] = 1.0  # -1 is the last column
    together_EE = chosen_TE[:, :-1].T @ chosen_TE[:, :-1]
    np.fill_diagonal(together_EE, 0.0)
    grown_E = np.empty_like(in_order)
    is_free_E = np.ones(len(in_order), dtype=bool)
    for place, in_bin in enumerate(in_order):
        if place == 0 or in_bin != in_order[place - 1]:
            pull_E = together_EE[:, is_free_E].sum(axis=1)
            members = np.zeros(len(in_order), np.float32)
        expert = int(np.argmax(np.where(is_free_E, pull_E, -1.0)))
        members[expert] = 1.0
        pull_E = together_EE @ members
        grown_E[expert], is_free_E[expert] = in_bin, False
    return grown_E
