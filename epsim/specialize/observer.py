"""Hooks after the router of every MoE layer that keep what a loss needs of it: `GateObserver`.

Shapes: T = B S tokens of a pass, B samples, S columns, L MoE layers, E experts, K top-k.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from epsim.capture.model import ForwardPass, MoeModel
from epsim.specialize.routed import RoutedPass


class GateObserver:
    """Keeps gating scores, with their gradients, and picks of a pass; a `Watcher` of the model.

    In every backbone a router returns (logits [T, E], weights [T, K], picks [T, K]). The scores are those over all
    experts: the softmax of the logits, or where the router has a correction bias (Moonlight), their sigmoids over the
    sum of them. The correction bias only moves picks and is not in the scores.
    """

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._pass: ForwardPass | None = None

    def attach(self) -> None:
        """Hook the routers of all MoE layers."""
        for layer_id in self._model.layer_ids:
            self._handles.append(self._model.layers[layer_id].mlp.gate.register_forward_hook(self._keep))

    def detach(self) -> None:
        """Take the hooks away; without any nothing happens."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def start_batch(self) -> None:
        """Nothing is kept from batch to batch."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Forget the last pass."""
        self._pass, self._layers = forward_pass, []

    def routed(self) -> RoutedPass:
        """Return what the routers did in the pass that just ran."""
        if self._pass is None or len(self._layers) != len(self._model.layer_ids):
            raise RuntimeError(f"{len(self._layers)} of {len(self._model.layer_ids)} MoE layers ran since start_pass")
        is_token_BS = self._pass.is_token_BS
        size = (len(self._layers), *is_token_BS.shape, -1)
        return RoutedPass(
            gate_LBSE=torch.stack([gate_TE for gate_TE, _ in self._layers]).view(size),
            picks_LBSK=torch.stack([picks_TK for _, picks_TK in self._layers]).view(size),
            is_text_BS=self._pass.is_text_BS,
            is_token_BS=is_token_BS,
        )

    def _keep(self, gate: Any, _args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, picks_TK = output
        if hasattr(gate, "e_score_correction_bias"):
            score_TE = logits_TE.float().sigmoid()
            gate_TE = score_TE / score_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        else:
            gate_TE = logits_TE.float().softmax(dim=-1)
        self._layers.append((gate_TE, picks_TK))
