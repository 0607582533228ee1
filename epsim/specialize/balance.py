"""Losses that are small when experts get as many tokens as each other: `load_balance`, `bin_load_balance`.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k, N bins, C experts of a bin.
"""

import torch
from torch import Tensor

from epsim.specialize.routed import RoutedPass


def load_balance(routed: RoutedPass) -> Tensor:
    """Return the load balance over all experts, a scalar (SMoES eq. 1): sum over layers of E sum_e f_e P_e.

    f_e is the share of tokens that were sent to e, so that they add up to K; P_e is the mean gating score. With all
    scores alike a layer gives K. Padding is left out; a pass of padding alone gives 0.
    """
    num_tokens = routed.is_token_BS.sum().clamp_min(1)
    frequency_LE = _picks(routed) / num_tokens
    mean_gate_LE = torch.where(routed.is_token_BS[..., None], routed.gate_LBSE, 0.0).sum(dim=(1, 2)) / num_tokens
    return routed.gate_LBSE.shape[3] * (frequency_LE * mean_gate_LE).sum()


def bin_load_balance(routed: RoutedPass, experts_LNC: Tensor) -> Tensor:
    """Return the load balance within each bin, a scalar (SMoES eq. 16): sum over layers and bins of C sum_e f_e P_e.

    f_e and P_e are those of eq. 1 over the tokens in the bin of e: we take them to be the tokens that picked at least
    one of its experts. P_e is the mean of the gating scores as they are, not normalised in the bin. A bin that no
    token is in gives 0.

    Args:
        routed: the pass.
        experts_LNC: int64, the experts of each bin, as `ExpertBins` has them.
    """
    is_in_bin_LBSE = _is_in_bin(routed, experts_LNC)
    num_tokens_LE = is_in_bin_LBSE.sum(dim=(1, 2)).clamp_min(1)
    frequency_LE = _picks(routed) / num_tokens_LE
    mean_gate_LE = torch.where(is_in_bin_LBSE, routed.gate_LBSE, 0.0).sum(dim=(1, 2)) / num_tokens_LE
    return experts_LNC.shape[2] * (frequency_LE * mean_gate_LE).sum()


def _picks(routed: RoutedPass) -> Tensor:
    """Return how many tokens were sent to each expert, [L, E], in the type of the gating scores."""
    return routed.num_picks_LME.sum(dim=1).to(routed.gate_LBSE.dtype)


def _is_in_bin(routed: RoutedPass, experts_LNC: Tensor) -> Tensor:
    """Return which tokens picked an expert of the bin that an expert is in, bool [L, B, S, E]; padding did not."""
    num_layers, num_bins, bin_size = experts_LNC.shape
    bin_LE = torch.arange(num_bins * bin_size, device=experts_LNC.device).expand(num_layers, -1) // bin_size
    bin_LE = torch.zeros_like(bin_LE).scatter(1, experts_LNC.flatten(1), bin_LE)
    bin_LBSE = bin_LE[:, None, None].expand_as(routed.gate_LBSE)
    is_in_LBSN = torch.zeros((*routed.gate_LBSE.shape[:3], num_bins), dtype=torch.bool, device=bin_LE.device)
    is_in_LBSN = is_in_LBSN.scatter(3, bin_LBSE.gather(3, routed.picks_LBSK), True) & routed.is_token_BS[..., None]
    return is_in_LBSN.gather(3, bin_LBSE)
