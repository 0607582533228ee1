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

    The text bias of expert e is f_spec(e) = C_text,e / (C_text,e + C_vision,e) (eq. 11), here with the plain counts of
    the trace: eq. 10's moving average over training batches has no batches to follow in a finished trace. The most
    vision-biased bin comes first. Experts that never fired count as 1/2. Inside a bin the experts keep the order of
    their ids, so the number of bins matters only where a device holds a part of a bin; the default is one bin a device.
    """

    kind: ClassVar[str] = "modality_bins"

    def __init__(self, *, num_bins: int | None = None) -> None:
        self.num_bins = num_bins

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        num_bins = self.num_bins or problem.num_devices
        if problem.num_experts % num_bins:
            raise PlacementError(
                f"placement.num_bins: {num_bins} does not divide {problem.num_experts} experts; "
                f"use a divisor, e.g. {problem.num_devices}"
            )
        by_bias_LE = np.argsort(text_bias(problem.expert_load_MLE), axis=1, kind="stable")
        bins_LBX = by_bias_LE.reshape(problem.num_layers, num_bins, -1)
        return problem.placement(self.kind, np.sort(bins_LBX, axis=2).reshape(problem.num_layers, -1))


def text_bias(expert_load_MLE: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return f_spec [L, E] in [0, 1] (SMoES eq. 11); 0.5 where an expert never fired."""
    text_LE, vision_LE = expert_load_MLE.astype(np.float64)
    total_LE = text_LE + vision_LE
    bias_LE: npt.NDArray[np.float64] = np.divide(text_LE, total_LE, out=np.full_like(total_LE, 0.5), where=total_LE > 0)
    return bias_LE
