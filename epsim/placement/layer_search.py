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
from epsim.placement.swap_search import Effort, LayerTokens, integer_costs, search_layer

Assignment = npt.NDArray[np.int32]
Loads = npt.NDArray[np.int64]
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


def search_placement(
    problem: PlacementProblem, policy: str, options: SearchOptions, *, max_load: float | None = None
) -> npt.NDArray[np.int32]:
    """Return physical_to_logical_LP, equal experts on each device, with a low `TransferObjective.cost_L`.

    max_load: no device's load is above max_load times the mean of its layer, or, in a layer where the search finds no
    such assignment, above the least that it finds.
    """
    problem.require_even_split()
    objective = problem.objective
    tokens = objective.charged(FitTokens.of(problem.require_trace(policy)))
    bias_LE, load_LE = text_bias(problem.expert_load_MLE), problem.load_LE
    seeds = np.random.SeedSequence(options.seed).spawn(problem.num_layers)
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
            options=options,
        )
        return np.argsort(_device_E(layer, objective, max_load), kind="stable").astype(np.int32)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.stack(list(pool.map(place, range(problem.num_layers))))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's rows and loads, and which random numbers are its own."""

    ids_TK: npt.NDArray[np.integer]
    phase_T: npt.NDArray[np.uint8]
    load_E: Loads
    bias_E: npt.NDArray[np.float64]
    rng: np.random.Generator
    options: SearchOptions


def _device_E(layer: _Layer, objective: TransferObjective, max_load: float | None) -> Assignment:
    """Return the device of each expert: where nodes cost anything, in the node that a search over nodes gives it."""
    everyone, num_devices = np.arange(len(layer.load_E)), objective.num_devices
    per_device, node_R = len(everyone) // num_devices, objective.node_of_device_R
    cap = None if max_load is None else max_load * layer.load_E.sum() / num_devices
    if not objective.node_cost_FN.any():
        devices = _Bins(layer, everyone, objective.device_cost_FR, np.full(num_devices, per_device), cap)
        return devices.search()
    nodes_N, sizes_N = np.unique(node_R, return_counts=True)
    nodes = _Bins(layer, everyone, objective.node_cost_FN[:, nodes_N], per_device * sizes_N, cap and cap * sizes_N)
    node_E, device_E = nodes_N[nodes.search()], np.empty(len(everyone), np.int32)
    for node in nodes_N:
        experts, devices_of_node = np.flatnonzero(node_E == node), np.flatnonzero(node_R == node)
        costs_FB = objective.device_cost_FR[:, devices_of_node]
        inside = _Bins(layer, experts, costs_FB, np.full(len(devices_of_node), per_device), cap)
        device_E[experts] = devices_of_node[inside.search()]
    if cap is None:
        return device_E
    cost_FR = objective.device_cost_FR + objective.node_cost_FN[:, node_R] / np.bincount(node_R)[node_R]
    return _Bins(layer, everyone, cost_FR, np.full(num_devices, per_device), cap).repaired(device_E)


class _Bins:
    """Some experts of a layer, and the bins that they go to; bin b has room for sizes_B[b] of them."""

    def __init__(
        self,
        layer: _Layer,
        experts: npt.NDArray[np.integer],
        cost_FB: npt.NDArray[np.float64],
        sizes_B: npt.NDArray[np.integer],
        cap: float | npt.NDArray[np.float64] | None,
    ) -> None:
        """cap: the most load of every bin, or of each; None: no matter."""
        local_E = np.full(len(layer.load_E), -1, np.int32)
        local_E[experts] = np.arange(len(experts))
        self._layer, self._options = layer, layer.options
        self._in_order = np.repeat(np.arange(len(sizes_B)), sizes_B).astype(np.int32)
        self._bias_E, self._load_E = layer.bias_E[experts], layer.load_E[experts]
        self._costs_FB = integer_costs(cost_FB)
        self._cap_B = None if cap is None else np.broadcast_to(np.floor(cap), len(sizes_B)).astype(np.int64)
        stride = -(-len(layer.ids_TK) // layer.options.search_tokens) or 1
        self._some, self._all = (
            LayerTokens(ids_TK=local_E[layer.ids_TK[::step]], phase_T=layer.phase_T[::step], num_experts=len(experts))
            for step in (stride, 1)
        )
        num_swaps = int(layer.options.rounds * len(experts))
        self._effort = Effort(num_swaps=num_swaps, patience=len(experts))
        self._last = None if stride == 1 else Effort(num_swaps=num_swaps, patience=_LAST_PATIENCE)

    def search(self) -> Assignment:
        """Return the bin of each expert, the best from all starts."""
        if len(self._costs_FB[0]) == 1:
            return self._in_order
        found = [self._walk(self._some, start_E, self._cap_B, self._effort) for start_E in self._starts()]
        best_E, excess, _ = min(found, key=lambda result: result[1:])
        cap_B = self._cap_B
        if excess and cap_B is not None:
            best_E, cap_B = self._least_full([assignment_E for assignment_E, _, _ in found], cap_B)
            best_E, _, _ = self._walk(self._some, best_E, cap_B, self._effort)
        return best_E if self._last is None else self._walk(self._all, best_E, cap_B, self._last)[0]

    def repaired(self, start_E: Assignment) -> Assignment:
        """Return an assignment within the caps, few swaps away, or else with the least load above them found."""
        best_E, num_swaps = start_E, 1
        while self._cap_B is not None and self._over(best_E, self._cap_B) > 0:
            if num_swaps > self._effort.num_swaps:
                return self._least_full([best_E], self._cap_B)[0]
            effort = Effort(num_swaps=num_swaps, patience=num_swaps)
            best_E, _, _ = self._walk(self._some, start_E, self._cap_B, effort)
            num_swaps *= 2
        return best_E

    def _least_full(self, found: list[Assignment], cap_B: Loads) -> tuple[Assignment, Loads]:
        """Return the assignment whose fullest bin is least above its cap, and caps that allow just that."""
        best_E = min(found, key=lambda assignment_E: self._over(assignment_E, cap_B))
        while True:
            over = self._over(best_E, cap_B)
            trial_E, excess, _ = self._walk(self._some, best_E, cap_B + over - 1, self._effort)
            if excess or over <= 1:
                return best_E, cap_B + over
            best_E = trial_E

    def _over(self, assignment_E: Assignment, cap_B: Loads) -> int:
        return int((self._loads_B(assignment_E) - cap_B).max())

    def _loads_B(self, assignment_E: Assignment) -> Loads:
        loads_B = np.bincount(assignment_E, weights=self._load_E, minlength=self._costs_FB.shape[1])
        return loads_B.astype(np.int64)

    def _walk(
        self, tokens: LayerTokens, start_E: Assignment, cap_B: Loads | None, effort: Effort
    ) -> tuple[Assignment, int, int]:
        seed = int(self._layer.rng.integers(2**31))
        return search_layer(
            tokens, self._costs_FB, start_E, effort=effort, seed=seed, load_E=self._load_E, max_load_B=cap_B
        )

    def _starts(self) -> list[Assignment]:
        """Return bins that grow by co-activation, by id, by text bias (vision experts first), and at random."""
        in_order, num_starts = self._in_order, self._options.starts
        by_bias = np.empty_like(in_order)
        by_bias[np.argsort(self._bias_E, kind="stable")] = in_order
        makers: list[Callable[[], Assignment]] = [lambda: self._grown(), lambda: in_order, lambda: by_bias]
        makers += [lambda: self._layer.rng.permutation(in_order)] * max(0, num_starts - len(makers))
        return [make() for make in makers[:num_starts]]

    def _grown(self) -> Assignment:
        """Fill bin after bin, each time with the expert that is chosen most often together with those in it."""
        tokens, in_order = self._some, self._in_order
        chosen_TE = np.zeros((len(tokens.ids_TK), tokens.num_experts + 1), np.float32)
        chosen_TE[np.arange(len(chosen_TE))[:, None], tokens.ids_TK] = 1.0  # -1 is the last column
        together_EE = chosen_TE[:, :-1].T @ chosen_TE[:, :-1]
        np.fill_diagonal(together_EE, 0.0)
        grown_E = np.empty_like(in_order)
        is_free_E = np.ones(len(in_order), dtype=bool)
        members = np.zeros(len(in_order), np.float32)
        for place, in_bin in enumerate(in_order):
            if place == 0 or in_bin != in_order[place - 1]:
                pull_E = together_EE[:, is_free_E].sum(axis=1)
                members[:] = 0.0
            expert = int(np.argmax(np.where(is_free_E, pull_E, -1.0)))
            members[expert] = 1.0
            pull_E = together_EE @ members
            grown_E[expert], is_free_E[expert] = in_bin, False
        return grown_E
