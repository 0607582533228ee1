"""What the routers of a forward pass did, with gradients: `RoutedPass`.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k.
"""

from dataclasses import dataclass

from torch import Tensor


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
