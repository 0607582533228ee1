"""What the router did in a pass, exactly as executed: `RouterRecorder`.

Shapes: B requests, S columns of a pass, L MoE layers, K top-k.
"""

from typing import Any

import torch
from torch import Tensor

from epsim.capture.model import ForwardPass, MoeModel


class RouterRecorder:
    """Hooks before the experts of every MoE layer that keep the picks and gate weights that the experts get.

    What the experts get is what is executed: after any bias, mask or normalisation of the router, whatever the
    implementation of the experts, in prefill and in decode. The arguments of `experts` are (hidden states [B·S, D],
    picks [B·S, K], gate weights [B·S, K]) in every backbone.
    """

    def __init__(self, model: MoeModel) -> None:
        self._shape = model.shape
        self._ids_dtype = torch.uint8 if self._shape.num_experts <= 256 else torch.int32
        self._size = (0, 0)
        self._num_layers_seen = 0
        self._ids_LNK: Tensor | None = None
        self._weights_LNK: Tensor | None = None
        self._handles = [
            model.layers[layer_id].mlp.experts.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer_id in enumerate(model.layer_ids)
        ]

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def start_batch(self) -> None:
        """Nothing is kept from batch to batch."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Make room for a pass: earlier picks stay valid where they were handed out."""
        shape = self._shape
        num_rows = forward_pass.is_token_BS.numel()
        size = (shape.num_layers, num_rows, shape.topk)
        device = forward_pass.is_token_BS.device
        self._num_layers_seen = 0
        self._size = (forward_pass.is_token_BS.shape[0], forward_pass.is_token_BS.shape[1])
        self._ids_LNK = torch.empty(size, dtype=self._ids_dtype, device=device)
        self._weights_LNK = torch.empty(size, dtype=torch.float16, device=device)

    def picks(self) -> tuple[Tensor, Tensor]:
        """Return the pass's picks, uint8 (int32 above 256 experts), and gate weights, float16: each [L, B, S, K]."""
        assert self._ids_LNK is not None
        assert self._weights_LNK is not None
        if self._num_layers_seen != self._shape.num_layers:
            raise RuntimeError(f"{self._num_layers_seen} of {self._shape.num_layers} MoE layers ran")
        size = (self._shape.num_layers, *self._size, self._shape.topk)
        return self._ids_LNK.view(size), self._weights_LNK.view(size)

    def _hook(self, index: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._ids_LNK is None or self._weights_LNK is None:
                return
            picks = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weights = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            self._ids_LNK[index].copy_(picks)
            self._weights_LNK[index].copy_(weights)
            self._num_layers_seen += 1

        return keep
