"""Placement policies without a model of the network: `contiguous`, `round_robin`, `random`, `modality_bins`.

A policy is a plain class with a `kind` and one method, `place(PlacementProblem) -> Placement`. Each other policy is a
file of its own; `POLICIES` in the package lists them all.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem
from epsim.trace import TraceSource


class Contiguous:
    """Experts in the order of their ids, E / R consecutive ones per device: what engines do by default."""

    kind: ClassVar[str] = "contiguous"

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        order_LE = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
        return problem.placement(self.kind, order_LE)


class RoundRobin:
    """Expert e on device e mod R (vLLM's `round_robin`; 4 experts on 2 devices: [0, 2] and [1, 3])."""

    kind: ClassVar[str] = "round_robin"

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        order_RX = np.arange(problem.num_experts).reshape(-1, problem.num_devices).T
        return problem.placement(self.kind, np.tile(order_RX.reshape(-1), (problem.num_layers, 1)))


class Random:
    """A uniformly random permutation per layer."""

    kind: ClassVar[str] = "random"

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        ids_LE = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
        order_LE = np.random.default_rng(self.seed).permuted(ids_LE, axis=1)
        return problem.placement(self.kind, order_LE)


class ModalityBins:
    """SMoES expert binning (section 3.3): experts sorted by text bias, cut into bins, bins put on devices in order.

    The text bias of expert e is f_spec(e) = C_text,e / (C_text,e + C_vision,e) (eq. 11), with the plain counts of the
    trace, or, given `momentum`, with eq. 10's moving averages over its requests (`moving_load`). The most vision-biased
    bin comes first. Experts that never fired count as 1/2. Inside a bin the experts keep the order of their ids, so
    the number of bins matters only where a device holds a part of a bin; the default is one bin a device.
    """

    kind: ClassVar[str] = "modality_bins"

    def __init__(
        self, *, num_bins: int | None = None, momentum: float | None = None, batch_requests: int | None = None
    ) -> None:
        """momentum: beta of eq. 10, from 0 to below 1. batch_requests: requests of a batch of eq. 10; None: 1."""
        self.num_bins = num_bins
        self.momentum = momentum
        self.batch_requests = batch_requests or 1

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        num_bins = self.num_bins or problem.num_devices
        if problem.num_experts % num_bins:
            raise PlacementError(
                f"placement.num_bins: {num_bins} does not divide {problem.num_experts} experts; "
                f"use a divisor, e.g. {problem.num_devices}"
            )
        by_bias_LE = np.argsort(text_bias(self._load(problem)), axis=1, kind="stable")
        bins_LBX = by_bias_LE.reshape(problem.num_layers, num_bins, -1)
        return problem.placement(self.kind, np.sort(bins_LBX, axis=2).reshape(problem.num_layers, -1))

    def _load(self, problem: PlacementProblem) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        if self.momentum is None:
            return problem.expert_load_MLE
        trace = problem.require_trace("modality_bins with momentum")
        return moving_load(trace, momentum=self.momentum, batch_requests=self.batch_requests)


def moving_load(trace: TraceSource, *, momentum: float, batch_requests: int) -> npt.NDArray[np.float64]:
    """Return SMoES eq. 10's moving averages of loads after the last batch, float64 [modality (text, vision), L, E].

    A batch is `batch_requests` requests in the order of their ids (the last may have fewer). From zeros, each batch
    makes C <- momentum C + (1 - momentum) (its counts), so batch b of n weighs (1 - momentum) momentum^(n - 1 - b).
    """
    ids_Q = trace.requests.request_id_Q
    num_batches = -(-len(ids_Q) // batch_requests)
    weight_B = (1 - momentum) * momentum ** np.arange(num_batches - 1, -1, -1.0)
    num_experts, topk = trace.meta.num_experts, trace.meta.topk
    load_MLE = np.zeros((2, trace.meta.num_layers, num_experts))
    for rows in trace.batches():
        weight_T = weight_B[np.searchsorted(ids_Q, rows.request_id_T) // batch_requests]
        first_T = rows.modality_T.astype(np.int64) * num_experts
        for layer in range(trace.meta.num_layers):
            pairs_TK = first_T[:, None] + rows.topk_expert_ids_TLK[:, layer]
            load_X = np.bincount(pairs_TK.reshape(-1), np.repeat(weight_T, topk), 2 * num_experts)
            load_MLE[:, layer] += load_X.reshape(2, num_experts)
    return load_MLE


def text_bias(expert_load_MLE: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return f_spec [L, E] in [0, 1] (SMoES eq. 11); 0.5 where an expert never fired."""
    text_LE, vision_LE = expert_load_MLE.astype(np.float64)
    total_LE = text_LE + vision_LE
    bias_LE: npt.NDArray[np.float64] = np.divide(text_LE, total_LE, out=np.full_like(total_LE, 0.5), where=total_LE > 0)
    return bias_LE
