"""Lower bounds that hold for every placement: `transfer_bound_L`, `max_load_bound_L`, `gap` (docs/bounds.md).

Letters: F phase (prefill, decode), S sources, L MoE layers, E experts, R devices, B bins (devices or nodes), X touched.
"""

import numpy as np
import numpy.typing as npt

from epsim.placement.minorant import View
from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.partition_bound import Bins, partition_bound

Floats = npt.NDArray[np.float64]


def transfer_bound_L(
    objective: TransferObjective,
    tokens: FitTokens,
    *,
    num_experts: int,
    slots_per_device: int,
    num_iterations: int = 100,
    max_tokens: int = 16384,
) -> Floats:
    """Return what `objective.cost_L` is at least in each layer, for every placement with so many slots per device.

    num_iterations, max_tokens: of the search for a tight bound (`partition_bound`).
    """
    if slots_per_device * objective.num_devices < num_experts:
        raise ValueError("the slots must hold all experts")
    num_tokens, tokens = max(1, tokens.num_tokens), objective.charged(tokens)
    parts = _parts(objective, tokens, num_experts, slots_per_device)

    def bound(ids_TK: npt.NDArray[np.integer]) -> float:
        return sum(
            partition_bound(ids_TK, tokens.phase_T, *part, num_iterations=num_iterations, max_tokens=max_tokens)
            for part in parts
        )

    return np.array([bound(ids_TK) for ids_TK in tokens.ids_LTK]) / num_tokens


def max_load_bound_L(load_LE: npt.NDArray[np.integer], num_devices: int, slots_per_device: int) -> Floats:
    """Return what the load of a layer's fullest device is at least; a replicated expert's load is split evenly.

    The largest of: the mean; the load of an expert over the most copies that fit; and without redundant slots also,
    for each n, the n smallest of the (n - 1) R + 1 largest experts, of which n share a device (pigeonhole), with the
    smallest experts of all in the slots that are left there.
    """
    num_experts = load_LE.shape[1]
    down_LE = -np.sort(-load_LE.astype(np.float64), axis=1)
    mean_L = down_LE.sum(axis=1) / num_devices
    spare = num_devices * slots_per_device - num_experts
    if spare < 0:
        raise ValueError("the slots must hold all experts")
    if spare:
        return np.asarray(np.maximum(mean_L, down_LE[:, 0] / (1 + spare)))
    best_L = mean_L
    for n in range(1, slots_per_device + 1):
        # Among the (n - 1) R + 1 largest, n share a device: at least the n smallest of them.
        last = (n - 1) * num_devices + 1
        shared_L = down_LE[:, last - n : last].sum(axis=1)
        rest_L = down_LE[:, num_experts - (slots_per_device - n) :].sum(axis=1)
        best_L = np.maximum(best_L, shared_L + rest_L)
    return np.asarray(best_L)


def gap(value: float, bound: float) -> float | None:
    """Return by what share a value is above its bound, (value - bound) / value; None where the value is 0."""
    return (value - bound) / value if value else None


Part = tuple[list[View], Bins]


def _parts(objective: TransferObjective, tokens: FitTokens, num_experts: int, slots_per_device: int) -> list[Part]:
    """Return partitions into devices and, where nodes cost anything, into nodes: their bounds add up."""
    num_devices, most = objective.num_devices, tokens.ids_LTK.shape[2] + 1
    is_device = len(objective.device_cost_SR) == num_devices
    parts = []
    if objective.device_cost_FR.any():
        home_S = np.arange(num_devices) if is_device else None
        shape = (num_experts, slots_per_device, num_devices)
        parts += _views(objective.home_share_FS, objective.device_cost_SR, home_S, shape, most)
    if objective.node_cost_FN.any():
        nodes_N, node_R, size_N = np.unique(objective.node_of_device_R, return_inverse=True, return_counts=True)
        shape = (num_experts, slots_per_device * int(size_N.max()), len(nodes_N))
        home_S = node_R if is_device else None
        parts += _views(objective.home_share_FS, objective.node_cost_SN[:, nodes_N], home_S, shape, most)
    return parts


def _views(
    share_FS: Floats, cost_SB: Floats, home_S: npt.NDArray[np.integer] | None, shape: tuple[int, int, int], most: int
) -> list[Part]:
    """Return how tokens pay for bins, and the bins.

    Where homes are not alike, each source is a view with a terminal in its bin, whose touching costs nothing. With
    replicas each source may see a partition of its own: they are bounded apart, those that are alike together.
    home_S: the bin of each source; None: it is in none of them. shape: experts, size of a bin, bins. most: bins that a
    token may touch.
    """
    num_experts, size, num_bins = shape
    full = num_bins if size * num_bins == num_experts else 0
    mean_FB = share_FS @ cost_SB
    alike = bool((np.ptp(mean_FB, axis=1) <= 1e-9 * mean_FB.max()).all())
    if full and (home_S is None or alike):
        views = [View(weight_F=np.eye(2)[f], terminal=-1, price_X=_price(mean_FB[f], most)) for f in range(2)]
        return [(views, Bins(num_items=num_experts, size=size, num_full=full))]
    views = [
        View(
            weight_F=share_FS[:, source],
            terminal=-1 if home_S is None else num_experts + (int(home_S[source]) if full else 0),
            price_X=_price(cost_SB[source], most),
        )
        for source in np.flatnonzero(share_FS.any(axis=0))
    ]
    if full:
        return [(_merged(views), Bins(num_items=num_experts + full, size=size + 1, num_full=full, num_terminals=full))]
    if home_S is None:
        return [([view], Bins(num_items=num_experts, size=size, num_full=0)) for view in _merged(views)]
    bins = Bins(num_items=num_experts + 1, size=size + 1, num_full=0, num_terminals=1)
    return [([view], bins) for view in _merged(views)]


def _merged(views: list[View]) -> list[View]:
    """Return the views with those added up that differ in how much they weigh alone."""
    merged: dict[tuple[int, bytes, bytes], View] = {}
    for view in views:
        ratio_F = np.round(view.weight_F / view.weight_F.sum(), 12)
        key = view.terminal, view.price_X.tobytes(), ratio_F.tobytes()
        before = merged[key].weight_F if key in merged else 0.0
        merged[key] = View(weight_F=view.weight_F + before, terminal=view.terminal, price_X=view.price_X)
    return list(merged.values())


def _price(cost_B: Floats, most: int) -> Floats:
    """Return the sums of the 0, 1, .., most smallest costs; as many bins as there are, the rest goes on rising."""
    ascending_B = np.sort(cost_B)
    steps = ascending_B[np.minimum(np.arange(most), len(ascending_B) - 1)]
    return np.concatenate(([0.0], np.cumsum(steps)))
