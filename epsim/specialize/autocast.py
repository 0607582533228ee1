"""Experts in bfloat16 under autocast: `autocast_experts`. Autocast knows torch's linear layers, and not grouped ones.

Without it experts with float32 weights are computed in float32, on CUDA by a slow fallback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from epsim.capture.model import MoeModel

IMPLEMENTATION = "epsim_autocast"


@contextmanager
def autocast_experts(model: MoeModel) -> Iterator[None]:
    """Run the model's grouped experts, inside the block, in autocast's type where autocast is on.

    Weights and their gradients stay float32, as those of a linear layer do. Another implementation of the experts
    than "grouped_mm" is left as it is.
    """
    decoder = model.decoder
    before = decoder.config._experts_implementation
    if before != "grouped_mm":
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    decoder.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        decoder.set_experts_implementation(before)


def _forward(experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    device_type = hidden_states.device.type
    cast: Any = experts
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        cast, hidden_states = _Cast(experts, dtype), hidden_states.to(dtype)
    result: torch.Tensor = grouped_mm_experts_forward(cast, hidden_states, *routing)
    return result


class _Cast:
    """A module whose parameters are read in another type."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value
