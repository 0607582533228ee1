"""What the bin says of the modality (SMoES section 3.4): `inter_bin_information`, and `inter_bin_divergence` for it.

Shapes: L MoE layers, B samples, S columns, E experts, M modalities (0 text, 1 vision), N bins, C experts of a bin.
"""

import torch
from torch import Tensor

from epsim.specialize.distribution import normalised, safe_log, symmetric_kl
from epsim.specialize.routed import RoutedPass


def inter_bin_information(routed: RoutedPass, experts_LNC: Tensor, score_LBS: Tensor, counts_B: Tensor) -> Tensor:
    """Return the loss L_MI, a scalar (SMoES eq. 15): minus the mutual information of modality and bin, in nats.

    Summed over layers, averaged over the samples that count; from 0 to -L log 2. With no such sample 0, and so is its
    gradient.

    Args:
        routed: the pass.
        experts_LNC: int64, the experts of each bin, as `ExpertBins` has them.
        score_LBS: float32, the share of text in a token, from 0 to 1; the rest is vision.
        counts_B: bool, samples that count: those with tokens of both modalities. Eq. 12 is 0/0 for the others.
    """
    mass_LBMN = _mean_gates(routed, experts_LNC, score_LBS).double()  # the logarithms below nearly cancel
    joint_LBMN = normalised(mass_LBMN.flatten(2)).view(mass_LBMN.shape)
    modality_LBM1 = joint_LBMN.sum(dim=3, keepdim=True)
    bin_LB1N = joint_LBMN.sum(dim=2, keepdim=True)
    terms_LBMN = joint_LBMN * (safe_log(joint_LBMN) - safe_log(modality_LBM1) - safe_log(bin_LB1N))
    return -_sum_of_means(terms_LBMN.sum(dim=(2, 3)), counts_B).to(routed.gate_LBSE.dtype)


def inter_bin_divergence(routed: RoutedPass, experts_LNC: Tensor, score_LBS: Tensor, counts_B: Tensor) -> Tensor:
    """Return minus the symmetric KL divergence of P(bin | text) and P(bin | vision), a scalar in nats.

    The "inter-bin KL" of SMoES tables 3 and S6, for which the paper gives no formula. This one is ours: conditionals of
    the joint probability of eq. 13, the divergence of SMAR eq. 10 to 12 with its smoothing, sum and mean as in eq. 15.
    The arguments are those of `inter_bin_information`.
    """
    given_LBMN = normalised(_mean_gates(routed, experts_LNC, score_LBS))
    return -_sum_of_means(symmetric_kl(given_LBMN[:, :, 0], given_LBMN[:, :, 1]), counts_B)


def _mean_gates(routed: RoutedPass, experts_LNC: Tensor, score_LBS: Tensor) -> Tensor:
    """Return the mean gating score by sample, modality and bin, [L, B, M, N] (eq. 12); 0 for a missing modality."""
    gate_LBSE = routed.gate_LBSE
    text_LBS = score_LBS.to(gate_LBSE.dtype)
    weights_LBS = tuple(share_LBS * routed.is_token_BS for share_LBS in (text_LBS, 1 - text_LBS))
    sums_LBME = torch.stack([(gate_LBSE * weight_LBS[..., None]).sum(dim=2) for weight_LBS in weights_LBS], dim=2)
    total_LBM1 = torch.stack([weight_LBS.sum(dim=2) for weight_LBS in weights_LBS], dim=2)[..., None]
    means_LBME = sums_LBME / torch.where(total_LBM1 > 0, total_LBM1, 1.0)
    members_LBME = experts_LNC.flatten(1)[:, None, None].expand_as(means_LBME)
    return means_LBME.gather(3, members_LBME).view(*means_LBME.shape[:3], *experts_LNC.shape[1:]).mean(dim=4)


def _sum_of_means(values_LB: Tensor, counts_B: Tensor) -> Tensor:
    """Return the sum over layers of the mean over samples that count; 0 if none does."""
    return torch.where(counts_B, values_LB, 0.0).sum() / counts_B.sum().clamp_min(1)
