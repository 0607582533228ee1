"""What the routers of a forward pass did, with gradients: `RoutedPass`.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k, M modalities (0 text, 1 vision).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NUM_MODALITIES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedPass:
    """Gating scores and picks of all MoE layers in a pass, and what its columns are.

    Attributes:
        gate_LBSE: float32, gating scores g of SMoES (section 3.1), P of SMAR (eq. 4): positive or 0, a row adds up
            to 1. A softmax router's probabilities over all experts; a sigmoid router's scores over their sum.
        picks_LBSK: int64, the experts that the token was sent to.
        is_text_BS: bool, text rather than vision.
        is_token_BS: bool, False for padding, which no loss counts.
    """

    gate_LBSE: Tensor
    picks_LBSK: Tensor
    is_text_BS: Tensor
    is_token_BS: Tensor

    @cached_property
    def num_picks_LME(self) -> Tensor:
        """How many tokens of each modality were sent to each expert, int64 (C of SMoES eq. 10); counted once."""
        num_layers, _, _, num_experts = self.gate_LBSE.shape
        counter_LBSK = self.picks_LBSK + num_experts * (~self.is_text_BS).to(torch.int64)[..., None]
        one_LBSK = self.is_token_BS.to(torch.int64)[..., None].expand_as(counter_LBSK)
        counts = counter_LBSK.new_zeros((num_layers, NUM_MODALITIES * num_experts))
        counts.scatter_add_(1, counter_LBSK.flatten(1), one_LBSK.flatten(1))
        return counts.view(num_layers, NUM_MODALITIES, num_experts)
