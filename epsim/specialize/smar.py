"""How far apart both modalities are routed, and a band for it (SMAR): `modality_routing_distance`, `smar_loss`.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k, M modalities (0 text, 1 vision).
"""

import torch
from torch import Tensor

from epsim.specialize.bins import is_of_modality
from epsim.specialize.distribution import normalised, symmetric_kl
from epsim.specialize.routed import RoutedPass


def modality_routing_distance(routed: RoutedPass) -> Tensor:
    """Return the symmetric KL divergence of both modality routing distributions, [L], in nats (SMAR eq. 5 to 12).

    The distributions are smoothed before, see `symmetric_kl`: F of eq. 6 is 0 for an expert that a modality did not
    pick, which makes the equations infinite. So it is at most 13.8, for distributions with no expert in common.
    Gradients go through the weights R (eq. 7); the frequencies F are counts. NaN if a modality has no tokens.
    """
    load_LME = routed.num_picks_LME
    mass_LME = load_LME * _weight_sums(routed)  # the denominators of eq. 6 and 7 cancel in eq. 8
    distribution_LME = normalised(mass_LME)
    distance_L = symmetric_kl(distribution_LME[:, 0], distribution_LME[:, 1])
    has_both_L = (load_LME.sum(dim=2) > 0).all(dim=1)
    return distance_L.masked_fill(~has_both_L, float("nan"))


def smar_loss(distance_L: Tensor, min_distance: float, max_distance: float) -> Tensor:
    """Return how far the distances are out of their band, summed over layers, a scalar (SMAR eq. 13).

    A layer whose distance is NaN, with tokens of one modality alone, gives 0, and so is its gradient.
    """
    excess_L = (min_distance - distance_L).relu() + (distance_L - max_distance).relu()
    return excess_L.masked_fill(distance_L.isnan(), 0.0).sum()


def _weight_sums(routed: RoutedPass) -> Tensor:
    """Return the sum over a modality's tokens of the weights, normalised within the top-k (eq. 5), [L, M, E]."""
    is_picked_LBSE = torch.zeros_like(routed.gate_LBSE, dtype=torch.bool).scatter(3, routed.picks_LBSK, True)
    weight_LBSE = normalised(torch.where(is_picked_LBSE, routed.gate_LBSE, 0.0))
    is_of_MBS1 = is_of_modality(routed)[..., None]
    return torch.stack([torch.where(is_of_BS1, weight_LBSE, 0.0).sum(dim=(1, 2)) for is_of_BS1 in is_of_MBS1], dim=1)
