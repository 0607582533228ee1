"""Gated feed-forward parts: `GatedFfn` of dense layers and shared experts, `RoutedExperts` of a rank's slots.

Shapes: X slots of a rank, V vectors, N (vector, slot) pairs, H hidden size, F width of an expert.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu

from epsim.measure.weights import Weights


class GatedFfn:
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, layer: int, part: str, hidden_size: int, ffn_size: int) -> None:
        gate_up = (2 * ffn_size, hidden_size)
        self._gate_up = weights.matrix(layer, f"{part} gate up", *gate_up, fan_in=hidden_size)
        self._down = weights.matrix(layer, f"{part} down", hidden_size, ffn_size, fan_in=ffn_size)

    def __call__(self, vectors_VH: Tensor) -> Tensor:
        return linear(_gated(linear(vectors_VH, self._gate_up)), self._down)


def _gated(both_x2F: Tensor) -> Tensor:
    gate, up = both_x2F.chunk(2, dim=-1)
    return silu(gate) * up


class RoutedExperts:
    """The experts in a rank's slots of one layer; expert_X: logical expert of each slot, -1 for an empty one."""

    def __init__(
        self, weights: Weights, layer: int, expert_X: npt.NDArray[np.integer], hidden_size: int, ffn_size: int
    ) -> None:
        num_slots, device, dtype = len(expert_X), weights.device, weights.dtype
        self._gate_up_XHF = torch.zeros(num_slots, hidden_size, 2 * ffn_size, device=device, dtype=dtype)
        self._down_XFH = torch.zeros(num_slots, ffn_size, hidden_size, device=device, dtype=dtype)
        for slot, expert in enumerate(expert_X.tolist()):
            for part, matrix_HF in (("gate up", self._gate_up_XHF[slot]), ("down", self._down_XFH[slot])):
                if expert >= 0:
                    fan_in, fan_out = matrix_HF.shape
                    matrix_HF.copy_(
                        weights.matrix(layer, f"expert {part}", fan_in, fan_out, fan_in=fan_in, expert=expert)
                    )

    def __call__(
        self, vectors_VH: Tensor, vector_of_pair_N: Tensor, slot_of_pair_N: Tensor, weight_N: Tensor
    ) -> Tensor:
        """Return [V, H]: the sum over the pairs of a vector of weight * expert(vector); 0 for one without pairs."""
        order_N = slot_of_pair_N.argsort(stable=True)
        vector_N, weight_N1 = vector_of_pair_N[order_N], weight_N[order_N, None].to(vectors_VH.dtype)
        counts_X = torch.bincount(slot_of_pair_N, minlength=len(self._down_XFH))
        together = vectors_VH.device.type == "cuda"
        compute = self.all_at_once if together else self.one_by_one
        return compute(vectors_VH, vector_N, weight_N1, counts_X)

    def one_by_one(self, vectors_VH: Tensor, vector_N: Tensor, weight_N1: Tensor, counts_X: Tensor) -> Tensor:
        """Loop over the slots that have pairs; pairs are ordered by slot."""
        out_VH = torch.zeros_like(vectors_VH)
        start = 0
        for slot, count in enumerate(counts_X.tolist()):
            if count:
                span = slice(start, start + count)
                gated = _gated(vectors_VH.index_select(0, vector_N[span]) @ self._gate_up_XHF[slot])
                out_VH.index_add_(0, vector_N[span], (gated @ self._down_XFH[slot]).mul_(weight_N1[span]))
                start += count
        return out_VH

    def all_at_once(self, vectors_VH: Tensor, vector_N: Tensor, weight_N1: Tensor, counts_X: Tensor) -> Tensor:
        """Run two grouped products, so that the host need not know the counts; pairs are ordered by slot."""
        out_VH = torch.zeros_like(vectors_VH)
        if not len(vector_N):
            return out_VH
        ends_X = counts_X.cumsum(0, dtype=torch.int32)
        both = grouped_mm(vectors_VH.index_select(0, vector_N), self._gate_up_XHF, offs=ends_X)
        each_NH = grouped_mm(_gated(both), self._down_XFH, offs=ends_X)
        return out_VH.index_add_(0, vector_N, each_NH * weight_N1)
