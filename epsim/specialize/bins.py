"""Experts sorted into bins by the modality that picks them (SMoES section 3.3): `ExpertBins`.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k, M modalities (0 text, 1 vision), N bins, C experts of a
bin.
"""

import torch
from torch import Tensor

from epsim.errors import InputError
from epsim.specialize.routed import NUM_MODALITIES, RoutedPass

_STATE_KEY = "mean_picks_LME"


class ExpertBins:
    """N bins of the E experts of each layer, as many in each, by a running mean of who picks them (eq. 10 and 11)."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_bins: int,
        *,
        decay: float,
        adaptive: bool,
        device: torch.device | str,
    ) -> None:
        """Start with means of 0, so with the experts in their own order.

        Args:
            num_layers, num_experts, num_bins: L, E and N.
            decay: beta of eq. 10, from 0 to 1; the paper's is 0.99.
            adaptive: False keeps the experts in their own order ("fixed" in SMoES table S7).
            device: where the means are, that of the passes to come.

        Raises InputError if N does not divide E.
        """
        if num_bins < 1 or num_experts % num_bins:
            raise InputError(
                f"method.num_bins: {num_bins} must divide the model's {num_experts} experts, so that every bin has as "
                f"many; write e.g. {_largest_divisor(num_experts, num_bins)}"
            )
        self._shape_LNC = (num_layers, num_bins, num_experts // num_bins)
        self._decay = decay
        self._adaptive = adaptive
        # an expert that nothing picks any more keeps its bias for 70 000 steps; in float32 it underflows at 10 000
        self._mean_picks_LME = torch.zeros(
            (num_layers, NUM_MODALITIES, num_experts), dtype=torch.float64, device=device
        )

    @torch.no_grad()
    def update(self, routed: RoutedPass) -> None:
        """Take the picks of a training step into the means (eq. 10)."""
        self._mean_picks_LME.mul_(self._decay).add_(routed.num_picks_LME, alpha=1 - self._decay)

    @property
    def text_bias_LE(self) -> Tensor:
        """Share of text in an expert's mean picks, float64 [L, E] (eq. 11); 0.5 for an expert that was never picked."""
        total_LE = self._mean_picks_LME.sum(dim=1)
        return torch.where(total_LE > 0, self._mean_picks_LME[:, 0] / total_LE, 0.5)

    @property
    def experts_LNC(self) -> Tensor:
        """The experts of each bin, int64 [L, N, C]: from vision's to text's, of equal bias the lower id first."""
        if self._adaptive:
            order_LE = self.text_bias_LE.argsort(dim=1, stable=True)
        else:
            num_layers, _, num_experts = self._mean_picks_LME.shape
            order_LE = torch.arange(num_experts, device=self._mean_picks_LME.device).repeat(num_layers, 1)
        return order_LE.view(self._shape_LNC)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the means, from which `load_state_dict` goes on to the bit."""
        return {_STATE_KEY: self._mean_picks_LME.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the means of another run's bins. Raises InputError if they are not there, or of another model."""
        wanted = list(self._mean_picks_LME.shape)
        if _STATE_KEY not in state:
            raise InputError(f"state of the expert bins: {_STATE_KEY} is missing; resume from a run with method smoes")
        if list(state[_STATE_KEY].shape) != wanted:
            raise InputError(
                f"state of the expert bins: {_STATE_KEY} has shape {list(state[_STATE_KEY].shape)}, this model needs "
                f"{wanted}; resume with the model that the run was started with"
            )
        self._mean_picks_LME.copy_(state[_STATE_KEY])


def is_of_modality(routed: RoutedPass) -> Tensor:
    """Return which columns are tokens of which modality, bool [M, B, S]; padding is of neither."""
    return torch.stack((routed.is_text_BS, ~routed.is_text_BS)) & routed.is_token_BS


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(max(min(at_most, number), 1), 0, -1) if number % divisor == 0)
